"""Hugging Face folders with one thing wrong are refused in one line, before the work."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")

import torch

from edgecompose.generation.tokenizer import Tokenizer
from edgecompose_export.base.spec import read_base_spec
from edgecompose_export.cli import main
from tests import tiny
from tests.export.refusals import listed, one_line
from tests.gguf_models import MODELS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS["llama"].write(tmp_path_factory.mktemp("refused") / "model", num_hidden_layers=1)


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder, to be damaged."""
    return shutil.copytree(folder, tmp_path / "model")


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Runs the command on a base; returns what it says, having seen that it refuses it by the headers alone."""

    def at_last(*args: Any, **named: Any) -> Any:
        raise AssertionError("the long work has begun")

    def run(source: Path) -> str:
        before = listed(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr("edgecompose_export.base.export.float_states", at_last)
            result = CliRunner().invoke(main, ["base", str(source), "-o", str(tmp_path / "out")])
        assert listed(tmp_path) == before
        return one_line(result, source)

    return run


def edited(path: Path, **fields: Any) -> None:
    tiny.write_json(path, json.loads(path.read_text(encoding="utf-8")) | fields)


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**64 - 1])
def test_safetensors_with_another_length_of_header(length: int, model: Path, refused: Callable[[Path], str]) -> None:
    path = model / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert "model.safetensors' cannot be read" in refused(model)


@pytest.mark.parametrize("header", [b"[]", b"{", b"\xff\xfe", b'{"lm_head.weight": 3}', b'{"a": {"dtype": "F32"}}'])
def test_safetensors_with_a_damaged_header(header: bytes, model: Path, refused: Callable[[Path], str]) -> None:
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    assert "model.safetensors' cannot be read" in refused(model)


class Code:
    """What runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_pickled_code_does_not_run(model: Path, tmp_path: Path, refused: Callable[[Path], str]) -> None:
    (model / "model.safetensors").unlink()
    path = model / "pytorch_model.bin"
    torch.save({"lm_head.weight": Code(tmp_path / "ran")}, path)
    assert "pytorch_model.bin' cannot be read" in refused(model)
    path.write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    assert "convert them to safetensors" in refused(model)
    for content in ([1, 2], {"a": 3}, {3: torch.zeros(2)}, torch.zeros(2)):
        torch.save(content, path)
        assert "pytorch_model.bin" in refused(model)
    assert not (tmp_path / "ran").exists()


def test_weights_of_packages_that_quantise(model: Path, refused: Callable[[Path], str]) -> None:
    for method in ("gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"):
        edited(model / "config.json", quantization_config={"quant_method": method})
        assert f"is quantised ({method}); give the float base, or a GGUF file of it" in refused(model)
    edited(model / "config.json", quantization_config=None, quantization={"group_size": 64, "bits": 4})
    assert "is quantised (mlx); give the float base" in refused(model)


def test_a_tokenizer_of_another_model(model: Path, refused: Callable[[Path], str]) -> None:
    state = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    state["model"]["vocab"] |= {"more": 300, "most": 301}
    tiny.write_json(model / "tokenizer.json", state)
    assert "2 words with ids from 300 on, such as 'more'" in refused(model)


def test_no_tokenizer(model: Path, refused: Callable[[Path], str]) -> None:
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(model)
    (model / "tokenizer.model").write_bytes(b"\x00" * 100)
    assert "tokenizer.model" in refused(model)


DAMAGE: Mapping[str, dict[str, Any]] = {
    "an unknown token that is none": {"model": {"unk_token": "<nothing>"}},
    "a vocabulary with holes": {"model": {"vocab": {"a": 0, "b": 7}, "merges": []}},
    "no words": {"model": {"vocab": {}, "merges": []}},
    "words of the wrong kind": {"model": {"vocab": {"a": "b"}, "merges": []}},
    "merges of no words": {"model": {"merges": [["zz", "yy"]]}},
    "a first token that is none": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "a first token beyond all": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"x": {"id": "x", "ids": [10**9], "tokens": ["x"]}},
        }
    },
    "a normalizer that is damaged": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a pattern that is damaged": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
    },
    "added tokens of the wrong kind": {"added_tokens": [3]},
    "an added token beyond all": {"added_tokens": [{"id": 10**9, "content": "x", "special": True}]},
    "no model": {"model": None},
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_tokenizer(case: str, model: Path, tmp_path: Path) -> None:
    """It is refused, or read by what is left of it; whatever is written can be used."""
    state = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    for key, value in DAMAGE[case].items():
        state[key] = state[key] | value if isinstance(value, dict) and key == "model" else value
    tiny.write_json(model / "tokenizer.json", state)
    result = CliRunner().invoke(main, ["base", str(model), "-o", str(tmp_path / "out"), "--precision", "fp32"])
    if result.exit_code == 0:
        tokenizer = Tokenizer(tmp_path / "out" / "tokenizer.json")
        assert all(token < 300 for token in tokenizer.encode_prompt("the cat sat, <|im_end|> é"))
        return
    one_line(result, model)
    assert listed(tmp_path) == sorted(["model", *(f"model/{name}" for name in listed(model))])


def test_no_chat_template_is_fine(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").unlink()
    result = CliRunner().invoke(main, ["base", str(model), "-o", str(tmp_path / "out"), "--precision", "fp32"])
    assert result.exit_code == 0, result.stderr
    assert read_base_spec(tmp_path / "out").chat_template is None
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"partial_rotary_factor": 3},
        {"partial_rotary_factor": "4"},
        {"rope_theta": "x"},
        {"head_dim": 2**31},
        {"vocab_size": 2**40},
        {"num_attention_heads": 10**300},
        {"hidden_size": -64},
        {"hidden_size": "64"},
        {"num_hidden_layers": True},
        {"rms_norm_eps": float("nan")},
        {"num_hidden_layers": 2**31},
        {"max_position_embeddings": 0},
        {"model_type": ["llama"]},
        {"architectures": [3]},
        {"hidden_act": ["silu"]},
    ],
    ids=str,
)
def test_a_configuration_with_one_thing_wrong(
    fields: dict[str, Any], model: Path, refused: Callable[[Path], str]
) -> None:
    edited(model / "config.json", **fields)
    refused(model)


def test_weights_whose_products_overflow(model: Path, tmp_path: Path) -> None:
    """Finite numbers, of which a forward pass makes others."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] += 3e38
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for precision in ("fp32", "auto", "int8"):
        arguments = ["base", str(model), "-o", str(tmp_path / "out"), "--precision", precision, "--accept-distance"]
        assert "not finite" in one_line(CliRunner().invoke(main, arguments), model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
