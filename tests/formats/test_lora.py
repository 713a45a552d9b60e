"""Adapters with the same factors in three formats become the same arrays."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("gguf", reason="a package of edgecompose-export")

from safetensors.torch import save_file

from edgecompose import Request, open_bundle
from edgecompose.bundle.adapter import adapter_metadata
from edgecompose.errors import AdapterError
from edgecompose.tasks import add_task
from tests import tiny
from tests.fixtures_tiny import TASKS, TinyZoo
from tests.lora_files import (
    BASE,
    FIELDS,
    MLX_CONFIG,
    exported,
    format_of,
    gguf_tensors,
    mlx_tensors,
    refused,
    same_arrays,
    write_gguf,
    write_mlx,
)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_same_factors_in_three_formats_give_the_same_arrays(zoo: TinyZoo, tmp_path: Path, bits: Any) -> None:
    peft = zoo.lora("one")
    sources = {
        "peft": peft,
        "mlx": write_mlx(tmp_path / "one-mlx", mlx_tensors(peft)),
        "gguf": write_gguf(tmp_path / "one.gguf", gguf_tensors(peft)),
    }
    made = {}
    for kind, source in sources.items():
        assert format_of(source) == kind
        output = tmp_path / f"{kind}.safetensors"
        made[kind] = exported(source, output, bits=bits)
        about = json.loads(adapter_metadata(output)["source"])
        assert about.get("kind", "peft") == kind
        assert about["name"] == source.stem and len(about["weights_sha256"]) == 64
    assert same_arrays(made["peft"], made["mlx"])
    assert same_arrays(made["peft"], made["gguf"])


@pytest.mark.parametrize("kind", ["mlx", "gguf"])
def test_packed_projections_are_split(zoo: TinyZoo, tmp_path: Path, kind: str) -> None:
    peft, base = zoo.lora("packed all", "phi3"), dataclasses.replace(BASE, architecture="phi3")
    if kind == "mlx":
        source = write_mlx(tmp_path / "mlx", mlx_tensors(peft))
    else:
        source = write_gguf(tmp_path / "x.gguf", gguf_tensors(peft, "phi3"), FIELDS | {"general.architecture": "phi3"})
    made = [exported(path, tmp_path / f"{i}.safetensors", base) for i, path in enumerate((peft, source))]
    assert len(made[0].modules) == 7
    assert same_arrays(*made)


@pytest.mark.parametrize("kind", ["mlx", "gguf"])
def test_a_task_takes_an_adapter_of_any_kind(zoo: TinyZoo, bundle_copy: Path, tmp_path: Path, kind: str) -> None:
    peft = zoo.lora("one")
    if kind == "mlx":
        source = write_mlx(tmp_path / "mlx", mlx_tensors(peft))
    else:
        source = write_gguf(tmp_path / "x.gguf", gguf_tensors(peft))
    manifest = add_task(bundle_copy, "travel", source, tiny.write_task(tmp_path / "t.jsonl", TASKS["animals"]))
    assert manifest.adapters["travel"].source["kind"] == kind
    with open_bundle(bundle_copy, device="cpu") as composer:
        assert composer.run("x", Request(weights={"travel": 1.0}, max_tokens=1)).text is not None


def test_peft_is_taken_where_both_lie(zoo: TinyZoo, tmp_path: Path) -> None:
    folder = shutil.copytree(zoo.lora("one"), tmp_path / "both")
    save_file(mlx_tensors(folder), folder / "adapters.safetensors")
    assert format_of(folder) == "peft"
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tiny.write_json(folder / "adapter_config.json", config | MLX_CONFIG)
    assert format_of(folder) == "peft"


def test_weights_decide_where_a_config_has_the_settings_of_both(zoo: TinyZoo, tmp_path: Path) -> None:
    """Converters to mlx leave PEFT's settings in the file."""
    peft = zoo.lora("one")
    config = json.loads((peft / "adapter_config.json").read_text(encoding="utf-8")) | MLX_CONFIG
    folder = write_mlx(tmp_path / "both", mlx_tensors(peft), config)
    assert format_of(folder) == "mlx"
    assert same_arrays(exported(peft, tmp_path / "peft"), exported(folder, tmp_path / "mlx"))
    whole = (folder / "adapters.safetensors").read_bytes()
    (folder / "adapters.safetensors").write_bytes(whole[:-1])
    refused(folder, BASE, tmp_path, AdapterError, r"adapters\.safetensors cannot be read")
    shutil.copyfile(peft / "adapter_model.safetensors", folder / "adapters.safetensors")
    assert format_of(folder) == "peft"  # its own names, under the name of mlx_lm's file
    refused(folder, BASE, tmp_path, AdapterError, r"no adapter_model\.safetensors")
