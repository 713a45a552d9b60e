"""Exported encoders give the vectors of transformers, pooled as the folder says."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")
pytest.importorskip("optimum", reason="a package of edgecompose-export")

import torch
import transformers

from edgecompose.errors import ExportError
from edgecompose.retrieval.embedder import Embedder, head_and_tail
from edgecompose_export.embedder import describe_encoder, export_embedder, open_embedder, read_embedder_spec
from tests import tiny
from tests.fixtures_tiny import TinyZoo

pytestmark = pytest.mark.slow

Float = npt.NDArray[np.float32]
SHORT = ("the cat sat on a mat", "?", "l'été, 猫 🐈", "two\nlines")
LONG = " ".join(f"word {i}" for i in range(60))


def wanted_vector(source: Path, text: str, *, pooling: str, window: int, ends: int = 0, unit: bool = True) -> Float:
    """What transformers and plain torch give."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    ids = head_and_tail(tokenizer(text)["input_ids"], window)
    model = transformers.BertModel.from_pretrained(source, add_pooling_layer=False, local_files_only=True).eval()
    with torch.no_grad():
        hidden = model(torch.tensor([ids])).last_hidden_state[0]
    whole = {"cls": hidden[0], "mean": hidden.mean(0), "max": hidden.amax(0)}[pooling]
    parts = [whole] + ([hidden[:ends].mean(0), hidden[-ends:].mean(0)] if ends else [])
    if unit:
        parts = [torch.nn.functional.normalize(part, dim=0) / len(parts) ** 0.5 for part in parts]
    return np.asarray(torch.cat(parts).numpy())


def open_exported(zoo: TinyZoo, precision: str, **settings: Any) -> Embedder:
    embedder, _ = open_embedder(zoo.embedder(precision, **settings)[0])
    return embedder


@pytest.mark.parametrize(("pooling", "ends"), [("mean", 4), ("mean", 0), ("cls", 4), ("max", 0)])
@pytest.mark.parametrize("text", [*SHORT, LONG], ids=["words", "mark", "unicode", "lines", "long"])
def test_a_float_encoder_gives_the_vectors_of_transformers(zoo: TinyZoo, pooling: str, ends: int, text: str) -> None:
    result = open_exported(zoo, "f32", pooling=pooling, ends=ends).embed(text)
    expected = wanted_vector(zoo.encoder(pooling=pooling), text, pooling=pooling, window=32, ends=ends)
    assert np.abs(result - expected).max() <= 1e-4
    assert result.dtype == np.float32
    assert np.linalg.norm(result) == pytest.approx(1, abs=1e-5)


def test_what_the_folder_says_is_recorded(zoo: TinyZoo) -> None:
    _, spec = zoo.embedder("f32", pooling="cls")
    assert (spec.pooling, spec.normalize, spec.max_length, spec.dimension, spec.ends) == ("cls", True, 32, 96, 4)
    assert (spec.precision, spec.source) == ("f32", "bert-cls")
    assert spec.cosine == pytest.approx(1, abs=1e-5)
    folder, mean = zoo.embedder("f32", pooling="mean")
    assert mean.identity == spec.identity
    assert read_embedder_spec(folder) == mean
    assert sorted(path.name for path in folder.iterdir()) == [
        "embedder.json",
        "encoder.onnx",
        "encoder.onnx.data",
        "tokenizer.json",
    ]


def test_an_int8_encoder_is_close_and_says_how_close(zoo: TinyZoo) -> None:
    exact, near = open_exported(zoo, "f32", pooling="mean"), open_exported(zoo, "int8", pooling="mean")
    _, spec = zoo.embedder("int8", pooling="mean")
    assert 0.95 < spec.cosine < 1
    assert spec.precision == "int8"
    for text in (*SHORT, LONG):
        assert float(exact.embed(text) @ near.embed(text)) > 0.9
    sizes = [(zoo.embedder(p, pooling="mean")[0] / "encoder.onnx.data").stat().st_size for p in ("f32", "int8")]
    assert sizes[1] < 0.7 * sizes[0]


def test_a_long_text_keeps_its_head_and_its_tail(zoo: TinyZoo) -> None:
    embedder = open_exported(zoo, "f32", pooling="mean")
    vector = embedder.embed(LONG)
    middle = LONG.replace("word 30", "something else altogether")
    assert np.array_equal(embedder.embed(middle), vector)
    for end in (LONG.replace("word 0", "verb 0"), f"{LONG}?"):
        assert not np.allclose(embedder.embed(end), vector, atol=1e-3)


def test_a_text_alone_is_the_text_in_company(zoo: TinyZoo) -> None:
    embedder = open_exported(zoo, "int8", pooling="mean")
    first = embedder.embed(SHORT[0])
    embedder.embed(LONG)
    assert np.array_equal(embedder.embed(SHORT[0]), first)


def test_without_a_normalize_module_vectors_are_free(zoo: TinyZoo, tmp_path: Path) -> None:
    folder = shutil.copytree(zoo.encoder(pooling="mean"), tmp_path / "free")
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    tiny.write_json(folder / "modules.json", modules[:2])
    assert describe_encoder(folder, "f32").normalize is False
    (folder / "modules.json").unlink()
    plain = describe_encoder(folder, "f32")
    assert (plain.pooling, plain.normalize) == ("mean", True)
    (folder / "sentence_bert_config.json").unlink()
    assert describe_encoder(folder, "f32").max_length == 64


@pytest.mark.parametrize("pooling", ["lasttoken", "mean_sqrt_len_tokens", "nothing"])
def test_an_unknown_pooling_is_refused(zoo: TinyZoo, tmp_path: Path, pooling: str) -> None:
    folder = tiny.write_encoder(tmp_path / "other", pooling=pooling)
    named = "nothing" if pooling == "nothing" else f"pooling_mode_{pooling}"
    with pytest.raises(ExportError, match=f"pools by {named}, expected mean or cls"):
        export_embedder(folder, tmp_path / "out", "f32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["mean", ["mean"], "cls", "max"])
def test_a_pooling_may_have_a_name_instead_of_flags(zoo: TinyZoo, tmp_path: Path, mode: Any) -> None:
    """As sentence-transformers writes it since version 5.4."""
    folder = shutil.copytree(zoo.encoder(pooling="mean"), tmp_path / "encoder")
    fields = {"embedding_dimension": 32, "pooling_mode": mode, "include_prompt": True}
    tiny.write_json(folder / "1_Pooling/config.json", fields)
    assert describe_encoder(folder, "f32").pooling == (mode if isinstance(mode, str) else mode[0])


def test_a_byte_order_mark_in_a_folder_is_skipped(zoo: TinyZoo, tmp_path: Path) -> None:
    folder = shutil.copytree(zoo.encoder(pooling="mean"), tmp_path / "encoder")
    for name in ("config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    plain = describe_encoder(zoo.encoder(pooling="mean"), "f32")
    assert describe_encoder(folder, "f32") == dataclasses.replace(plain, source="encoder")


def test_the_width_of_a_distilbert_is_its_dim(tmp_path: Path) -> None:
    """transformers calls it so in the configurations of this model alone."""
    folder = tiny.write_encoder(tmp_path / "distil", pooling="mean")
    tokens = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    config = transformers.DistilBertConfig(
        vocab_size=tokens, dim=32, n_heads=2, n_layers=1, hidden_dim=48, max_position_embeddings=64
    )
    torch.manual_seed(0)
    model = transformers.DistilBertModel(config).eval()
    model.save_pretrained(folder)
    assert describe_encoder(folder, "f32", 4).dimension == 96
    export_embedder(folder, tmp_path / "out", "f32", ends=0)
    embedder, _ = open_embedder(tmp_path / "out")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    with torch.no_grad():
        hidden = model(torch.tensor([tokenizer("the cat sat")["input_ids"]])).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
    assert np.abs(embedder.embed("the cat sat") - expected).max() <= 1e-4


def _delete(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def _cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _forget_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tiny.write_json(folder / "config.json", {k: v for k, v in config.items() if k != "hidden_size"} | {"dim": 32})


_DENSE = '[{"type": "sentence_transformers.models.Transformer"}, {"type": "sentence_transformers.models.Dense"}]'
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (_delete("config.json"), r"config\.json' is missing"),
    "no weights": (_delete("model.safetensors"), r"has no model\.safetensors"),
    "no tokenizer": (_delete("tokenizer.json"), r"has no tokenizer\.json"),
    "no pooling": (_delete("1_Pooling/config.json"), r"1_Pooling/config\.json' is missing"),
    "bad JSON": (_write("modules.json", "{"), r"modules\.json' cannot be read"),
    "dense layer": (_write("modules.json", _DENSE), "has modules Dense, expected Transformer, Pooling and Normalize"),
    "cut weights": (_cut_weights, "cannot be exported by optimum"),
    "no width": (_forget_width, "hidden_size"),
    "modules that are none": (_write("modules.json", "[1]"), "no list of objects"),
    "a config that is none": (_write("config.json", "[]"), "holds no object"),
    "a window that is none": (_write("sentence_bert_config.json", '{"max_seq_length": "x"}'), "max_seq_length"),
    "another folder": (
        _write("modules.json", '[{"type": "x.Pooling", "path": "../1_Pooling"}]'),
        "the path '../1_Pooling', expected one inside",
    ),
    "two poolings": (_write("1_Pooling/config.json", '{"pooling_mode": ["cls", "mean"]}'), "pools by cls, mean"),
    "a pooling without a name": (_write("1_Pooling/config.json", '{"pooling_mode": 5}'), "pools by 5, expected mean"),
}


@pytest.mark.parametrize(
    "damage",
    REFUSED,
)
def test_a_folder_that_lacks_something_is_refused_by_name(zoo: TinyZoo, tmp_path: Path, damage: str) -> None:
    harm, message = REFUSED[damage]
    folder = shutil.copytree(zoo.encoder(pooling="mean"), tmp_path / "encoder")
    harm(folder)
    with pytest.raises(ExportError, match=message):
        export_embedder(folder, tmp_path / "out", "f32")


def test_a_window_longer_than_the_positions_is_cut(tmp_path: Path) -> None:
    folder = tiny.write_encoder(tmp_path / "wide", max_length=128)
    assert describe_encoder(folder, "f32").max_length == 64


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config\.json' is missing"):
        export_embedder(tmp_path / "absent", tmp_path / "out", "f32")
    with pytest.raises(ExportError, match=r"holds no embedder\.json"):
        read_embedder_spec(tmp_path)


def test_what_is_there_is_not_overwritten(zoo: TinyZoo) -> None:
    folder, _ = zoo.embedder("f32", pooling="mean")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ExportError, match="already holds an exported embedder"):
        export_embedder(zoo.encoder(pooling="mean"), folder, "int8")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
