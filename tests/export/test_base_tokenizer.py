"""Tokenizer, template and end tokens of a base are those that transformers finds in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from edgecompose.errors import ExportError
from edgecompose.generation.chat_template import ChatTemplate
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose_export.tokenizer.base_tokenizer import BaseTokenizer
from edgecompose_export.tokenizer.folder import tokenizer_of_folder
from tests.export.tokenizer_folders import ADDED, IDS, WORDS
from tests.tiny import CHAT_TEMPLATE, write_json

pytestmark = pytest.mark.slow

TEXTS = ["hello", "", " a <think>b</think>", "<s>hello", "<bos>x", "<|im_start|>user\n<|im_end|>", "<extra> é日"]
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _folder(path: Path, settings: dict[str, Any] | None = None, **files: Any) -> Path:
    """A folder with a byte-level tokenizer.json, a tokenizer_config.json, and other JSON files by their stem."""
    made = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    for text, special in ADDED.items():
        made.add_tokens([tokenizers.AddedToken(text, normalized=False, special=special)])
    path.mkdir(exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    if settings is not None:
        write_json(path / "tokenizer_config.json", settings)
    for name, value in files.items():
        write_json(path / f"{name}.json", value)
    return path


def _compare(folder: Path) -> BaseTokenizer:
    """Ours, after its ids, special tokens and prompts were compared with transformers'."""
    ours, theirs = tokenizer_of_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ours.write(folder / "ours" / "tokenizer.json")
    made = Tokenizer(folder / "ours" / "tokenizer.json", chat_template=ours.template)
    for text in TEXTS:
        expected = theirs(text)["input_ids"]
        raw = tokenizers.Tokenizer.from_file(str(folder / "ours" / "tokenizer.json")).encode(text)
        assert raw.ids == expected
        assert made.decode(raw.ids) == theirs.decode(
            expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    assert (ours.bos, ours.eos, ours.unk, ours.pad) == (
        theirs.bos_token,
        theirs.eos_token,
        theirs.unk_token,
        theirs.pad_token,
    )
    assert ours.size == max(theirs.get_vocab().values()) + 1
    assert theirs.eos_token_id is None or theirs.eos_token_id in ours.end_tokens
    if theirs.chat_template is not None:
        talk = [{"role": "user", "content": "a"}]
        text = made.chat(talk)
        assert text == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert made.encode(text) == list(theirs.apply_chat_template(talk, add_generation_prompt=True))
    return ours


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        (LLAMA, "<s>"),
        (LLAMA | {"add_bos_token": False}, None),
        (LLAMA | {"add_eos_token": True}, "<s>"),
        (
            LLAMA
            | {
                "tokenizer_class": "LlamaTokenizerFast",
                "bos_token": {
                    "content": "<bos>",
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "single_word": False,
                    "__type": "AddedToken",
                },
            },
            "<bos>",
        ),
        ({"tokenizer_class": "LlamaTokenizer"}, "<s>"),
        ({"tokenizer_class": "GemmaTokenizer"}, "<bos>"),
        ({"tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "add_eos_token": True}, None),
        ({"tokenizer_class": "GPTNeoXTokenizer"}, None),
        ({"tokenizer_class": "GPTNeoXTokenizerFast", "add_bos_token": True}, "<|endoftext|>"),
        ({"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": True, "bos_token": None}, None),
        ({"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}, None),
        ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, None),
        ({"tokenizer_class": "CohereTokenizer", "bos_token": "<bos>", "eos_token": "<eos>"}, "<bos>"),
        (PLAIN | {"add_bos_token": True}, None),
        (PLAIN | {"additional_special_tokens": ["<extra>", "<think>"], "pad_token": "<pad>"}, None),
        (PLAIN | {"added_tokens_decoder": {"269": {"content": "<extra>", "special": False}}}, None),
        (PLAIN | {"added_tokens_decoder": {"267": {"content": "<think>", "special": True, "normalized": False}}}, None),
        (PLAIN | {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}, None),
        ({"tokenizer_class": "GemmaTokenizer", "chat_template": GEMMA}, "<bos>"),
        (
            PLAIN
            | {"chat_template": "{{ eos_token }}{{ image_token }}", "extra_special_tokens": {"image_token": "<i>"}},
            None,
        ),
    ],
)
def test_a_folder_is_read_as_transformers_reads_it(tmp_path: Path, settings: dict[str, Any], first: str | None) -> None:
    ours = _compare(_folder(tmp_path / "base", settings))
    assert ours.first_token == (None if first is None else IDS[first])


@pytest.mark.parametrize("model", ["llama", "gemma", "qwen2", "gpt_neox"])
def test_a_folder_that_names_no_class_has_that_of_its_model(tmp_path: Path, model: str) -> None:
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = _compare(_folder(tmp_path / "base", settings, config={"model_type": model}))
    assert ours.first_token == (IDS["<s>"] if model in ("llama", "gemma") else None)


def test_older_files_are_read_too(tmp_path: Path) -> None:
    folder = _folder(
        tmp_path / "base",
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        special_tokens_map={"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"},
        added_tokens={"<extra>": 269, "<think>": 267},
    )
    ours = tokenizer_of_folder(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.bos, ours.eos, ours.token_id("<extra>")) == (
        "<s>",
        "<|im_end|>",
        theirs.convert_tokens_to_ids("<extra>"),
    )


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "base", LLAMA, generation_config={"eos_token_id": [258, 265]}, config={})
    expected = tokenizer_of_folder(folder)
    for path in folder.glob("*.json"):
        path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert tokenizer_of_folder(folder) == expected


def _settings(template: Any) -> dict[str, Any]:
    return PLAIN if template is None else PLAIN | {"chat_template": template}


@pytest.mark.parametrize(
    ("template", "files", "expected"),
    [
        ("config", {}, "config"),
        ([{"name": "default", "template": "default"}, {"name": "tool_use", "template": "tools"}], {}, "default"),
        ({"default": "default", "rag": "rag"}, {}, "default"),
        ("config", {"chat_template.jinja": "file"}, "file"),
        ("config", {"chat_template.jinja": "\ufefffile"}, "file"),
        (None, {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "tools"}, "file"),
        (None, {"chat_template.json": '{"chat_template": "json"}'}, "json"),
        (None, {}, None),
        ("", {}, None),
    ],
)
def test_the_default_template_counts(
    tmp_path: Path, template: Any, files: dict[str, str], expected: str | None
) -> None:
    folder = _folder(tmp_path / "base", _settings(template))
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    assert tokenizer_of_folder(folder).template == expected


def test_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "base", _settings([{"name": "rag", "template": "x"}, {"name": "a", "template": "x"}]))
    with pytest.raises(ExportError, match=r"chat templates a, rag, expected one called 'default'"):
        tokenizer_of_folder(folder)


def test_a_gemma_folder_whose_config_says_eos_ends_at_the_end_of_a_turn(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "GemmaTokenizer", "chat_template": GEMMA}
    ours = tokenizer_of_folder(_folder(tmp_path / "base", settings, config={"eos_token_id": IDS["<eos>"]}))
    assert {IDS["<eos>"], IDS["<end_of_turn>"], IDS["<bos>"]} <= set(ours.end_tokens)


def test_end_tokens_come_from_all_files_and_the_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} <tool_call>\n{% endfor %}"
    folder = _folder(
        tmp_path / "base",
        PLAIN | {"chat_template": template},
        config={"eos_token_id": 1, "text_config": {"eos_token_id": [2]}},
        generation_config={"eos_token_id": [3, 4]},
    )
    ends = set(tokenizer_of_folder(folder).end_tokens)
    assert {1, 2, 3, 4, IDS["<tool_call>"], IDS["</s>"], IDS["<s>"], IDS["<|im_end|>"], IDS["<|endoftext|>"]} <= ends
    assert not ends & {IDS["<think>"], IDS["<|im_start|>"], IDS["<unk>"], IDS["<pad>"]}


def test_a_tag_that_is_no_special_token_is_no_end(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "base", {"tokenizer_class": "GemmaTokenizer"})
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for row in state["added_tokens"]:
        row["special"] = row["special"] and row["content"] != "</s>"
    write_json(folder / "tokenizer.json", state)
    assert IDS["</s>"] not in tokenizer_of_folder(folder).end_tokens


def test_a_template_needs_no_variable_beside_the_conversation(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ additional_special_tokens[1] }}{{ mask_token is defined }}"
    )
    settings = LLAMA | {"chat_template": template, "additional_special_tokens": ["<think>", "<tool_call>"]}
    ours = tokenizer_of_folder(_folder(tmp_path / "base", settings))
    assert ours.template is not None
    assert ChatTemplate(ours.template).render([]) == "<s></s><unk><tool_call>False"


def test_added_tokens_without_a_row_are_dropped(tmp_path: Path) -> None:
    ours = tokenizer_of_folder(_folder(tmp_path / "base", LLAMA))
    fitted = ours.fitted(IDS["<tool_call>"])
    assert (fitted.size, fitted.token_id("<tool_call>")) == (IDS["<tool_call>"], None)
    fitted.write(tmp_path / "fitted" / "tokenizer.json")
    assert max(Tokenizer(tmp_path / "fitted" / "tokenizer.json").encode("<think><tool_call>")) < IDS["<tool_call>"]
    assert ours.fitted(ours.size) is ours
    assert ours.fitted(10**6) is ours
    assert fitted.end_tokens == ours.end_tokens
    assert IDS["<|im_end|>"] not in ours.fitted(IDS["<|im_end|>"]).end_tokens


@pytest.mark.parametrize(
    ("vocabulary", "message"), [(200, "56 words with ids from 200 on"), (257, "begins texts with")]
)
def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path, vocabulary: int, message: str) -> None:
    ours = tokenizer_of_folder(_folder(tmp_path / "base", LLAMA))
    with pytest.raises(ExportError, match=message):
        ours.fitted(vocabulary)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{", r"tokenizer\.json' is not JSON"),
        ("tokenizer.json", '{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}', "kind 'Unigram'"),
        ("tokenizer.json", '{"model": 3}', "kind None"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": "x"}}}', r"tokenizer\.json' cannot be read"),
        ("tokenizer_config.json", "[1]", "holds a list"),
        ("tokenizer_config.json", b"\xff\xfe{\x00", "save it as UTF-8"),
        ("generation_config.json", "nothing", "generation_config.json' is not JSON"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    folder = _folder(tmp_path / "base", LLAMA)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ExportError, match=message):
        tokenizer_of_folder(folder)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.sampled_from(["<s>", "a", "", "é", "{{", "default"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["1", "x", "content", "special", "name", "template", "default"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
_FIELDS = (
    "added_tokens_decoder",
    "bos_token",
    "eos_token",
    "additional_special_tokens",
    "extra_special_tokens",
    "chat_template",
    "tokenizer_class",
    "add_bos_token",
    "add_prefix_space",
    "eos_token_id",
    "text_config",
    "model_type",
    "<extra>",
)


@given(st.lists(st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=4), min_size=5, max_size=5))
def test_whatever_the_files_say_there_is_a_tokenizer_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, settings: list[dict[str, Any]]
) -> None:
    folder = _folder(tmp_path_factory.getbasetemp() / "odd", LLAMA)
    names = ("tokenizer_config", "special_tokens_map", "added_tokens", "config", "generation_config")
    for name, value in zip(names, settings, strict=True):
        write_json(folder / f"{name}.json", value)
    try:
        ours = tokenizer_of_folder(folder)
    except ExportError:
        return
    tokenizers.Tokenizer.from_str(json.dumps(ours.state))


def test_a_folder_with_older_files_only_is_converted(tmp_path: Path) -> None:
    folder = tmp_path / "older"
    folder.mkdir()
    write_json(folder / "vocab.json", {word: i for i, word in enumerate([*WORDS, "<|endoftext|>"])})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    ours, theirs = tokenizer_of_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ours.write(tmp_path / "ours.json")
    text = "hello e\u0301 <|endoftext|>"
    assert Tokenizer(tmp_path / "ours.json").encode_prompt(text) == theirs(text)["input_ids"]
    (folder / "merges.txt").unlink()
    with pytest.raises(ExportError, match=r"transformers cannot convert vocab\.json: .*add the tokenizer\.json"):
        tokenizer_of_folder(folder)
