"""LoRA files of llama.cpp, against what transformers makes of GGUF weights.

`benchmarks/speed.py` attaches such a file in llama.cpp itself.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import Composer, Request, open_bundle
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import EdgeComposeError, MergeError
from edgecompose.formats.gguf import interleaved, write_gguf_lora

Float = npt.NDArray[np.float32]
MODULES = {"q_proj": "attn_q", "k_proj": "attn_k", "o_proj": "attn_output", "down_proj": "ffn_down"}


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as composer:
        yield composer


@pytest.fixture(scope="module")
def merged(opened: Composer) -> MergedAdapter:
    return opened.compose("x", Request(weights={"animals": 0.5, "numbers": -0.75})).merged


def read(path: Path) -> tuple[dict[str, Any], dict[str, Float]]:
    """Fields, and tensors by name."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def test_a_file_holds_the_blend(opened: Composer, merged: MergedAdapter, tmp_path: Path) -> None:
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    base = opened.bundle.manifest.base
    fields, tensors = read(write_gguf_lora(merged, tmp_path / "made" / "blend.gguf", base))
    expected = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    assert {name: fields[name] for name in expected} == expected and fields["adapter.lora.alpha"] == 1.0
    factors = merged.factors()
    assert len(tensors) == 2 * sum(len(a) for a, _ in factors.values())
    back = LlamaTensorProcessor({})._reverse_permute_weights
    for module, name in MODULES.items():
        a, b = factors[module]
        for layer in range(len(a)):
            found_a, found_b = (tensors[f"blk.{layer}.{name}.weight.lora_{side}"] for side in "ab")
            if module in ("q_proj", "k_proj"):
                heads = len(found_b) // base.head_size
                found_b = back(found_b, heads, heads)
            scale = fields["adapter.lora.alpha"] / found_b.shape[1]  # what llama.cpp multiplies by
            np.testing.assert_array_equal(found_a, a[layer])
            np.testing.assert_allclose(found_b * scale, b[layer].T, rtol=1e-6)


def test_rows_take_turns() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]  # two heads of two pairs
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_only_llama_takes_turns(opened: Composer, merged: MergedAdapter, tmp_path: Path, architecture: str) -> None:
    base = dataclasses.replace(opened.bundle.manifest.base, architecture=architecture)
    _, tensors = read(write_gguf_lora(merged, tmp_path / "blend.gguf", base))
    a, b = merged.factors()["q_proj"]
    same = np.allclose(tensors["blk.0.attn_q.weight.lora_b"] / a.shape[1], b[0].T)
    assert same == (architecture == "qwen2")


def test_what_cannot_be_written(
    opened: Composer, merged: MergedAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, path = opened.bundle.manifest.base, tmp_path / "blend.gguf"
    assert base.architecture == "llama"
    for architecture in ("granitemoehybrid", None):
        with pytest.raises(MergeError, match="can be written as GGUF"):
            write_gguf_lora(merged, path, dataclasses.replace(base, architecture=architecture))
    with pytest.raises(MergeError, match="no adapter"):
        write_gguf_lora(MergedAdapter({}, "none"), path, base)
    assert not path.exists()
    before = write_gguf_lora(merged, path, base).read_bytes()
    with pytest.raises(MergeError, match="exists"):
        write_gguf_lora(merged, path, base)
    assert path.read_bytes() == before
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EdgeComposeError, match="pip install"):
        write_gguf_lora(merged, tmp_path / "other", base)
