"""Tokenizers and templates of GGUF files, and bases without a template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgecompose.bundle.manifest import MANIFEST_FILE
from edgecompose.errors import ExportError
from edgecompose.formats.gguf_file import read_gguf
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose_export.bundles import build_bundle
from edgecompose_export.tokenizer.folder import tokenizer_of_folder
from edgecompose_export.tokenizer.gguf import tokenizer_of_gguf
from tests import tiny
from tests.export.tokenizer_folders import ADDED, IDS, WORDS
from tests.fixtures_tiny import TinyZoo
from tests.tiny import write_json


def _metadata(**changes: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "general.architecture": "qwen2",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*WORDS, *ADDED],
        "tokenizer.ggml.merges": ["Ġ Ġ"],
        "tokenizer.ggml.token_type": [1] * 256 + [3 if special else 4 for special in ADDED.values()],
        "tokenizer.ggml.bos_token_id": IDS["<s>"],
        "tokenizer.ggml.eos_token_id": IDS["<unk>"],
    }
    metadata["tokenizer.ggml.tokens"] += ["ĠĠ"]
    metadata["tokenizer.ggml.token_type"] += [1]
    return metadata | {name.replace("__", "."): value for name, value in changes.items()}


def test_a_gguf_ends_where_its_turns_end() -> None:
    changes = {"tokenizer__ggml__eot_token_id": IDS["<think>"], "tokenizer__ggml__eom_token_id": 7}
    ours = tokenizer_of_gguf(_metadata(**changes))
    assert {IDS["<unk>"], IDS["<think>"], 7, IDS["<s>"], IDS["<|im_end|>"], IDS["<end_of_turn>"]} <= set(
        ours.end_tokens
    )
    assert (ours.bos, ours.eos, ours.first_token, ours.template) == ("<s>", "<unk>", None, None)
    template = "{% for m in messages %}{{ m.content }}<tool_call>{% endfor %}"
    with_template = tokenizer_of_gguf(_metadata(tokenizer__chat_template=template))
    assert IDS["<tool_call>"] in with_template.end_tokens


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ({"tokenizer__chat_template": "one", "tokenizer__chat_template__rag": "two"}, "one"),
        ({"tokenizer__chat_template__default": "one", "tokenizer__chat_template__rag": "two"}, "one"),
        ({"tokenizer__chat_templates": ["rag"]}, None),
        ({"tokenizer__chat_template": "{{ bos_token }}"}, '{% set bos_token = "<s>" %}\n{{ bos_token }}'),
    ],
)
def test_a_gguf_has_the_default_template(templates: dict[str, Any], expected: str | None) -> None:
    assert tokenizer_of_gguf(_metadata(**templates)).template == expected


def test_a_gguf_with_named_templates_alone_is_refused() -> None:
    with pytest.raises(ExportError, match="the GGUF file has the chat templates rag"):
        tokenizer_of_gguf(_metadata(tokenizer__chat_template__rag="x"))


def test_a_gguf_and_its_folder_say_the_same(zoo: TinyZoo, tmp_path: Path) -> None:
    folder = zoo.model("llama")
    ours = tokenizer_of_gguf(read_gguf(tiny.write_gguf(tmp_path / "tiny.gguf", folder)).metadata)
    theirs = tokenizer_of_folder(folder)
    ours.write(tmp_path / "ours.json")
    theirs.write(tmp_path / "theirs.json")
    text = "the cat's 3 mats\n\n<|im_start|>"
    encoded = [Tokenizer(tmp_path / f"{name}.json").encode_prompt(text) for name in ("ours", "theirs")]
    assert encoded[0] == encoded[1]
    assert (ours.template, ours.eos, ours.size) == (theirs.template, theirs.eos, theirs.size)
    assert set(theirs.end_tokens) <= set(ours.end_tokens)


@pytest.mark.parametrize("form", ["", 'prompt_form = "raw"', 'prompt_form = "chat"'])
def test_a_base_without_a_template_gives_a_bundle_of_raw_prompts(zoo: TinyZoo, tmp_path: Path, form: str) -> None:
    source = zoo.recipe()
    base = shutil.copytree(zoo.base("llama").folder, tmp_path / "base")
    spec = json.loads((base / "base.json").read_text(encoding="utf-8"))
    write_json(base / "base.json", spec | {"chat_template": None})
    text = source.read_text(encoding="utf-8").replace("[defaults]", f"[defaults]\n{form}")
    recipe = source.with_name(f"{tmp_path.name}.toml")
    recipe.write_text(text, encoding="utf-8")
    steps: list[str] = []
    try:
        if "chat" in form:
            with pytest.raises(ExportError, match=r'says prompt_form = "chat", but base .* has no chat template'):
                build_bundle(recipe, tmp_path / "out", base=base)
            return
        build_bundle(recipe, tmp_path / "out", base=base, advance=steps.append)
    finally:
        recipe.unlink()
    manifest = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert manifest["defaults"]["prompt_form"] == "raw"
    assert any("no chat template" in step for step in steps) == (form == "")
