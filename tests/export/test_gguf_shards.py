"""GGUF files in shards, and files with missing, doubled or misshapen tensors."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")


from edgecompose.errors import ExportError
from edgecompose_export.weights.places import tensor_names
from edgecompose_export.weights.source import open_weights
from tests.export.gguf_bases import assert_same_decoder
from tests.gguf_models import MODELS, write_gguf

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A Hugging Face folder of each model."""
    root = tmp_path_factory.mktemp("models")
    return {name: model.write(root / name) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def shards(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model in four files."""
    root = tmp_path_factory.mktemp("shards")
    write_gguf(root / "model.gguf", folders["llama-3.2"], shard_tensors=9)
    return sorted(root.glob("*.gguf"))


def copied(shards: list[Path], folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [Path(shutil.copy(path, folder)) for path in shards]


def test_any_shard_opens_the_model(shards: list[Path], folders: Mapping[str, Path]) -> None:
    assert len(shards) == 4
    folder = open_weights(folders["llama-3.2"])
    for path in (shards[0], shards[1], shards[-1]):
        source = open_weights(path)
        assert_same_decoder(source.config, folder.config)
        for tensor, _ in tensor_names(folder.config):
            assert np.array_equal(source.floats(tensor), folder.floats(tensor)), tensor


@pytest.mark.parametrize("number", range(4))
def test_a_missing_shard_is_named(shards: list[Path], tmp_path: Path, number: int) -> None:
    paths = copied(shards, tmp_path / "m")
    paths[number].unlink()
    rest = next(path for path in paths if path.exists())
    with pytest.raises(ExportError, match=rf"{rest.name}.*{paths[number].name} is missing; put all shards into one"):
        open_weights(rest)


def test_shards_of_two_models_are_refused(shards: list[Path], folders: Mapping[str, Path], tmp_path: Path) -> None:
    paths = copied(shards, tmp_path / "m")
    (tmp_path / "other").mkdir()
    write_gguf(tmp_path / "other" / "model.gguf", folders["qwen3"], shard_tensors=11)
    others = sorted((tmp_path / "other").glob("*.gguf"))
    assert len(others) == len(paths)
    shutil.copy(others[2], paths[2])
    for path in (paths[0], paths[3]):
        with pytest.raises(ExportError, match="model-00003-of-00004|tensors|architecture"):
            open_weights(path)


def test_shards_in_the_wrong_order_are_refused(shards: list[Path], tmp_path: Path) -> None:
    paths = copied(shards, tmp_path / "m")
    shutil.copy(shards[2], paths[1])
    with pytest.raises(ExportError, match=r"model-00002-of-00004\.gguf' does not say that it is shard 2 of 4"):
        open_weights(paths[0])


def test_a_renamed_shard_is_refused(shards: list[Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(shards[0], tmp_path / "model.gguf"))
    with pytest.raises(ExportError, match=r"model\.gguf.* is one of 4 shards.*llama-gguf-split --merge"):
        open_weights(path)


def test_tensors_that_are_left_out_are_named(folders: Mapping[str, Path], tmp_path: Path) -> None:
    omit = ["blk.1.ffn_up.weight", "output_norm.weight"]
    path = write_gguf(tmp_path / "model.gguf", folders["llama"], omit=omit)
    with pytest.raises(ExportError, match=re.escape("base 'model.gguf' (llama): 2 tensors are missing")) as caught:
        open_weights(path)
    assert all(name in str(caught.value) for name in omit)
    path = write_gguf(tmp_path / "model.gguf", folders["llama"], omit=["token_embd.weight"])
    with pytest.raises(ExportError, match=r"base 'model\.gguf': token_embd\.weight is missing"):
        open_weights(path)


def test_tensors_that_are_misshapen_or_left_over_are_named_together(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    extra = {
        "blk.0.attn_q.weight": np.zeros((32, 64), np.float32),
        "blk.0.strange.weight": np.zeros(4, np.float32),
        "blk.7.attn_q.weight": np.zeros((64, 64), np.float32),
    }
    path = write_gguf(tmp_path / "model.gguf", folders["llama"], extra=extra, omit=["blk.2.attn_k.weight"])
    with pytest.raises(ExportError) as caught:
        open_weights(path)
    for part in (
        "base 'model.gguf' (llama)",
        "1 tensors are missing",
        "blk.2.attn_k.weight",
        "1 tensors have another shape",
        "blk.0.attn_q.weight [32, 64], expected [64, 64]",
        "2 tensors are not part of such a model",
        "blk.0.strange.weight, blk.7.attn_q.weight",
    ):
        assert part in str(caught.value)


def test_a_doubled_tensor_is_named(folders: Mapping[str, Path], shards: list[Path], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", folders["llama"])
    content = path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.2.ffn_up.weight")
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"model\.gguf' holds a tensor twice: blk\.2\.ffn_up\.weight"):
        open_weights(path)
    paths = copied(shards, tmp_path / "m")
    names = [set(re.findall(rb"blk\.\d\.[a-z_]+\.weight", shard.read_bytes())) for shard in shards]
    first, second = (next(n for n in sorted(group) if n.startswith(b"blk.") and len(n) == 19) for group in names[1:3])
    paths[2].write_bytes(paths[2].read_bytes().replace(second, first))
    with pytest.raises(ExportError, match=f"holds a tensor twice: {re.escape(first.decode())}"):
        open_weights(paths[0])


def test_a_file_that_is_cut_is_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", folders["llama"])
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ExportError, match=r"model\.gguf.*tensor '.*' .*the file ends at byte"):
        open_weights(path)


def test_parts_that_are_not_exported_are_named(folders: Mapping[str, Path], tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("olmo2", {"olmo2.attention.sliding_window": 16}, "OLMo 3"),
        ("llama", {"llama.expert_count": 8}, "mixture of experts"),
        ("llama", {"llama.rope.scaling.type": "su"}, "rope.scaling.type is 'su'"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, "there is no rope_factors_long"),
        ("llama", {"general.type": "adapter"}, "is a GGUF 'adapter', expected a model"),
        ("llama", {"llama.attention.value_length": 8}, "different length"),
        ("llama", {"general.architecture": "mamba"}, "architecture 'mamba', expected one of llama, qwen2"),
    ]
    for name, metadata, message in cases:
        path = write_gguf(tmp_path / "model.gguf", folders[name], metadata=metadata)
        with pytest.raises(ExportError, match=re.escape(message)):
            open_weights(path)
