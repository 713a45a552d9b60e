"""Float checkpoints that a blend cannot be written into are refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")
pytest.importorskip("peft", reason="exports need the packages of edgecompose-export")

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edgecompose.adapters import convert_adapter
from edgecompose.bundle.adapter import load_adapter
from edgecompose.bundle.atomic import new_folder
from edgecompose.bundle.files import sha256_of
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import CheckpointError, EdgeComposeError, ExportError, MergeError
from edgecompose.formats.checkpoint import (
    BASE_KEY,
    INDEX_FILE,
    open_checkpoint,
    weights_identity,
)
from edgecompose.formats.merged_model import write_merged_model
from edgecompose.merging.merger import Merger
from edgecompose.settings import MergeSettings
from edgecompose_export.base.checkpoint import DType, load_model
from edgecompose_export.base.checkpoint import write_checkpoint as convert
from edgecompose_export.base.source import open_base
from tests import tiny
from tests.fixtures_tiny import TinyZoo
from tests.formats.checkpoints import (
    FEW,
    SHARDED,
    Blend,
    Float,
    base_of,
    load,
    logits,
    merge,
    weights,
    write_checkpoint,
)
from tests.lora_files import slots_of_llama

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def blend(zoo: TinyZoo, merger: Merger, tmp_path_factory: pytest.TempPathFactory) -> Blend:
    """A blend of two adapters, one of them in one layer and few modules, for an architecture."""

    def make(architecture: str) -> MergedAdapter:
        folder, adapters, base = tmp_path_factory.mktemp("blend"), [], slots_of_llama()
        few = FEW.get(architecture, ["q_proj", "v_proj", "down_proj"])
        for i, settings in enumerate([{}, {"r": 2, "target_modules": few, "layers_to_transform": [1]}]):
            lora = zoo.lora(f"merged{i}", architecture, **settings)
            convert_adapter(lora, base, folder / f"{i}.safetensors", 8)
            adapters.append(load_adapter(folder / f"{i}.safetensors", str(i), base.slots, base.identity))
        return merger.merge(adapters, (0.8, -0.5), MergeSettings())

    return make


def test_a_checkpoint_out_of_a_gguf_file_records_its_base(zoo: TinyZoo, blend: Blend, tmp_path: Path) -> None:
    file = tiny.write_gguf(tmp_path / "x.gguf", zoo.model("llama"))
    source, folder = open_base(file), tmp_path / "deep" / "float"
    assert convert(source, folder) == sha256_of(file)
    assert np.array_equal(logits(load(folder)), logits(load_model(source)))
    assert not {path.suffix for path in folder.iterdir()} - {".json", ".jinja", ".safetensors"}
    loaded, first = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, zoo.model("llama")))
    assert (loaded.bos_token, loaded.eos_token) == ("<|im_start|>", "<|im_end|>")  # as the file says
    message = [{"role": "user", "content": "a 12"}]
    assert loaded.apply_chat_template(message, tokenize=False) == first.apply_chat_template(message, tokenize=False)
    assert loaded.tokenize("12") == ["1", "2"]  # as llama.cpp splits digits
    base = dataclasses.replace(slots_of_llama(), identity=sha256_of(file))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.is_recorded(base.identity)
    read: list[int] = []
    write_merged_model(blend("llama"), checkpoint, tmp_path / "merged", base, advance=read.append)
    assert sum(read) <= checkpoint.bytes  # nothing was hashed
    with safe_open(tmp_path / "merged/model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # it is the base no longer
    with pytest.raises(CheckpointError, match="the bundle's base was exported from"):
        merge(blend("llama"), tmp_path / "merged", tmp_path / "again", base)
    with pytest.raises(ExportError, match="exists"):
        convert(source, folder)


def test_converted_types(zoo: TinyZoo, tmp_path: Path) -> None:
    dtypes: tuple[DType, ...] = ("float16", "bfloat16")
    for dtype in dtypes:
        identity = convert(open_base(zoo.model("qwen2")), tmp_path / dtype, dtype)
        assert identity == weights_identity(zoo.model("qwen2"))
        checkpoint = open_checkpoint(tmp_path / dtype)
        assert checkpoint.is_recorded(identity)
        assert {t.dtype for s in checkpoint.shards for t in s.tensors} == {"F16" if dtype == "float16" else "BF16"}
        assert json.loads((tmp_path / dtype / "config.json").read_text(encoding="utf-8"))["dtype"] == dtype


def test_a_converted_folder_is_also_a_base_of_its_own(zoo: TinyZoo, tmp_path: Path) -> None:
    convert(open_base(zoo.model("llama")), tmp_path / "float")
    open_checkpoint(tmp_path / "float").check_base(weights_identity(tmp_path / "float"))


def test_the_identity_is_that_of_the_export(zoo: TinyZoo, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "float", zoo.model("llama"), size=SHARDED)
    assert open_base(folder).identity == weights_identity(folder)


def _config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        tiny.write_json(path, json.loads(path.read_text(encoding="utf-8")) | values)

    return change


_Q = "model.layers.0.self_attn.q_proj.weight"


def _leave(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    tiny.write_json(folder / INDEX_FILE, {"weight_map": {"a": "../x.safetensors"}})


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "quantised": (_config(quantization_config={"quant_method": "gptq"}), r"is quantised \(config\.json says so\)"),
    "8 bits": (
        weights(lambda t: t.update({_Q: t[_Q].to(torch.int8)})),
        "q_proj.weight' is of type I8; F32, F16",
    ),
    "double": (weights(lambda t: t.update({_Q: t[_Q].double()})), "is of type F64"),
    "no weight": (
        weights(lambda t: t.pop(_Q)),
        r"changes weights that the checkpoint lacks: layers\.0\.q_proj; give",
    ),
    "another shape": (weights(lambda t: t.update({_Q: t[_Q][:32].clone()})), r"\(32, 64\), expected \(64, 64\)"),
    "two decoders": (
        weights(lambda t: t.update({f"eye.{_Q}": t[_Q].clone()})),
        "more than one 'q_proj' in layer 0",
    ),
    "truncated": (_truncate, "model.safetensors' cannot be read"),
    "no safetensors": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "edgecompose-export checkpoint SOURCE -o FOLDER",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "a list": (lambda folder: tiny.write_json(folder / "config.json", []), "config.json is no object"),
    "an index that leaves": (_leave, "names no files beside it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_checkpoints_are_refused(zoo: TinyZoo, blend: Blend, tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    folder = write_checkpoint(tmp_path / "float", zoo.model("llama"))
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        merge(blend("llama"), folder, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_a_stranger_is_refused(zoo: TinyZoo, blend: Blend, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "float", zoo.model("llama"))
    base = base_of(folder)
    weights(lambda t: t[_Q].mul_(1.001))(folder)
    with pytest.raises(CheckpointError, match=f"the bundle's base was exported from {base.identity[:12]}"):
        merge(blend("llama"), folder, tmp_path / "merged", base)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", BASE_KEY: "b" * 64})
    with pytest.raises(CheckpointError, match="give the folder that it was exported from"):
        merge(blend("llama"), folder, tmp_path / "merged", base)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path / "absent")


def test_what_cannot_be_written(zoo: TinyZoo, blend: Blend, tmp_path: Path) -> None:
    folder, output = write_checkpoint(tmp_path / "float", zoo.model("llama"), "F16"), tmp_path / "merged"
    with pytest.raises(MergeError, match="no adapter"):
        merge(MergedAdapter({}, "none"), folder, output)
    output.mkdir()
    with pytest.raises(MergeError, match="exists"):
        merge(blend("llama"), folder, output)
    output.rmdir()
    weights(lambda t: t[_Q].fill_(65504.0))(folder)
    factors = {"q_proj": (np.full((2, 1, 64), 8.0, np.float32), np.full((2, 1, 64), 8.0, np.float32))}

    class Large(MergedAdapter):
        def factors(self) -> dict[str, tuple[Float, Float]]:
            return factors

    with pytest.raises(MergeError, match="values after merging that F16 cannot hold"):
        merge(Large(blend("llama").modules, "large"), folder, output)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(EdgeComposeError), new_folder(tmp_path / "x") as work:
        (work / "file").write_text("half", encoding="utf-8")
        raise EdgeComposeError("stop")
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "a" / "x") as work:
        (work / "file").write_text("all", encoding="utf-8")
    assert (tmp_path / "a/x/file").read_text(encoding="utf-8") == "all"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]
