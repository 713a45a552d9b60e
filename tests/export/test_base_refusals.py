"""Sources that are no base, or a damaged one, are refused; an export is named by its weights."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")
pytest.importorskip("peft", reason="a package of edgecompose-export")

import transformers

from edgecompose.bundle.files import sha256_of
from edgecompose.errors import ExportError
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose_export.base.export import export_base
from edgecompose_export.base.source import locate_base, weights_digest
from edgecompose_export.base.spec import read_base_spec
from edgecompose_export.graphs.decoder import write_decoder
from tests import tiny
from tests.export.decoders import logits_of, open_decoder
from tests.fixtures_tiny import Exported, TinyZoo

pytestmark = pytest.mark.slow


@pytest.fixture(params=list(tiny.ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(zoo: TinyZoo, architecture: str) -> Exported:
    return zoo.base(architecture)


def test_too_great_a_distance_is_refused(zoo: TinyZoo, tmp_path: Path) -> None:
    distance = zoo.base("llama", "int4").spec.distance
    assert distance is not None
    assert distance.kl > 0.01
    with pytest.raises(ExportError, match=rf"int4 is {distance.kl:.3f} nats from .*--accept-distance"):
        export_base(zoo.model("llama"), tmp_path / "base", "int4")
    with pytest.raises(ExportError, match=r"holds no base\.json"):
        read_base_spec(tmp_path / "base")


def test_a_decoder_that_is_not_its_blocks_is_refused(
    zoo: TinyZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_another_scale(*args: Any, **named: Any) -> Any:
        graph = write_decoder(*args, **named)
        attention = [node for node in graph.nodes if node.op_type == "GroupQueryAttention"]
        next(a for a in attention[-1].attribute if a.name == "scale").f *= 4
        return graph

    monkeypatch.setattr("edgecompose_export.base.write.write_decoder", with_another_scale)
    with pytest.raises(ExportError, match="nats from its own blocks"):
        export_base(zoo.model("llama"), tmp_path / "base", "fp32")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(zoo: TinyZoo) -> None:
    folder = zoo.base("llama").folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ExportError, match="exists and is not empty"):
        export_base(zoo.model("llama"), folder, "fp32")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_architecture_without_a_row_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_gpt2(tmp_path / "gpt2-tiny")
    with pytest.raises(
        ExportError, match=r"'gpt2-tiny' has the architecture 'gpt2', expected one of llama, .*; give such a base"
    ):
        export_base(folder, tmp_path / "base", "fp32")


def test_what_is_no_base_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "model.bin"
    text.write_bytes(b"weights")
    with pytest.raises(ExportError, match=r"model\.bin' is neither a folder nor a \.gguf file"):
        locate_base(text)
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(ExportError, match=r"has no config\.json but 0 GGUF models"):
            locate_base(folder)
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ExportError, match=r"2 GGUF models"):
        locate_base(tmp_path)
    assert locate_base(tmp_path / "one.gguf") == tmp_path / "one.gguf"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"not a GGUF file" * 100, id="other"),
        pytest.param(b"GGUF", id="cut"),
        pytest.param(b"GGUF\x03\0\0\0" + b"\xff" * 64, id="nonsense"),
        pytest.param(b"GGUF\0\0\0\x03" + b"\0" * 64, id="big-endian"),
    ],
)
def test_a_damaged_gguf_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"model\.gguf'.*(copy it again|no GGUF file|convert it)"):
        export_base(path, tmp_path / "base", "fp32")


def _remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def _unknown_model(folder: Path) -> None:
    tiny.write_json(folder / "config.json", {"model_type": "mystery", "architectures": ["MysteryForCausalLM"]})


@pytest.mark.parametrize(
    "harm",
    [
        _remove_weights,
        _unknown_model,
        pytest.param(_truncate_weights),
        pytest.param(_remove_tokenizer),
    ],
)
def test_a_damaged_folder_is_refused(zoo: TinyZoo, tmp_path: Path, harm: Any) -> None:
    folder = shutil.copytree(zoo.model("llama"), tmp_path / "llama")
    harm(folder)
    with pytest.raises(ExportError, match="llama"):
        export_base(folder, tmp_path / "base", "fp32")


def test_a_base_is_named_by_its_weights(zoo: TinyZoo, tmp_path: Path) -> None:
    source = zoo.model("llama")
    identity = weights_digest(source)
    assert zoo.base("llama").spec.identity == zoo.base("llama", "int4").spec.identity == identity
    copy = shutil.copytree(source, tmp_path / "elsewhere")
    for name in ("README.md", "training_args.bin", "consolidated.safetensors"):
        (copy / name).write_text("?", encoding="utf-8")
    assert weights_digest(copy) == identity
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert weights_digest(copy) != identity
    weights.unlink()
    with pytest.raises(ExportError, match="holds no weights"):
        weights_digest(copy)


def test_a_gguf_file_is_exported_as_the_folder_that_it_was_made_of(zoo: TinyZoo, tmp_path: Path) -> None:
    folder = zoo.model("llama")
    path = tiny.write_gguf(tmp_path / "tiny.gguf", folder)
    spec = export_base(path, tmp_path / "base", "fp32")
    original = zoo.base("llama").spec
    assert (
        dataclasses.replace(
            spec, source="llama", identity=original.identity, end_tokens=original.end_tokens, distance=original.distance
        )
        == original
    )
    assert (spec.source, spec.identity) == ("tiny.gguf", sha256_of(path))
    ours, theirs = (open_decoder(base) for base in (Exported(tmp_path / "base", spec), zoo.base("llama")))
    assert np.array_equal(logits_of(ours), logits_of(theirs))
    tokenizers = [Tokenizer(place / "tokenizer.json") for place in (tmp_path / "base", folder)]
    text = "the cat, l'été\n<|im_start|>user"
    assert tokenizers[0].encode(text) == tokenizers[1].encode(text)


def test_the_exported_tokenizer_is_that_of_transformers(zoo: TinyZoo) -> None:
    base = zoo.base("llama")
    template = (base.folder / "chat_template.jinja").read_text(encoding="utf-8")
    ours = Tokenizer(base.folder / base.spec.tokenizer, chat_template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(zoo.model("llama"), local_files_only=True)
    messages = [{"role": "user", "content": "the cat, l'été, 猫 🐈"}]
    expected = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert ours.encode(ours.chat(messages)) == list(expected)
    assert ours.vocabulary_size == len(theirs) == base.spec.vocabulary
    assert base.spec.end_tokens == (theirs.pad_token_id, theirs.eos_token_id)  # <|endoftext|> ends a text, too
