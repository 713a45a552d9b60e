"""The tokenizer of a Hugging Face folder, with the results of the fast tokenizers of transformers.

The classes are `PreTrainedTokenizerFast`, `LlamaTokenizerFast` and others of 4.57. transformers itself is needed only
where a folder has no tokenizer.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from edgecompose.errors import ExportError
from edgecompose.guard.native import native
from edgecompose_export.tokenizer.base_tokenizer import BaseTokenizer, assemble_tokenizer, default_template, id_of
from edgecompose_export.tokenizer.post_processor import State, template_processing

#: Names under which transformers passes special tokens to a chat template.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class _Class:
    """A class of tokenizers in transformers.

    Attributes:
        defaults: special tokens where the config names none.
        first: whether the first token stands before each text by default, None where the tokenizer.json decides.
    """

    defaults: Mapping[str, str] = field(default_factory=dict)
    first: bool | None = None


_ENDOFTEXT = "<|endoftext|>"
_GPT2 = _Class(dict.fromkeys(("unk_token", "bos_token", "eos_token"), _ENDOFTEXT))
_LLAMA = _Class({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, first=True)
_CLASSES: Mapping[str, _Class] = {
    "Llama": _LLAMA,
    "CodeLlama": _LLAMA,
    "Gemma": _Class(
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}, first=True
    ),
    "Cohere": _Class(
        {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "unk_token": "<UNK>"}, first=True
    ),
    "GPTNeoX": _Class(_GPT2.defaults, first=False),
    "GPT2": _GPT2,
    "CodeGen": _GPT2,
    "Qwen2": _Class(dict.fromkeys(("unk_token", "eos_token", "pad_token"), _ENDOFTEXT)),
}
#: The class of tokenizer by model type, where tokenizer_config.json names none.
_BY_MODEL = {
    "llama": "Llama",
    "mistral": "Llama",
    "mixtral": "Llama",
    "phi3": "Llama",
    "phimoe": "Llama",
    "ernie4_5": "Llama",
    "gemma": "Gemma",
    "gemma2": "Gemma",
    "gemma3": "Gemma",
    "gemma3_text": "Gemma",
    "cohere": "Cohere",
    "cohere2": "Cohere",
    "gpt_neox": "GPTNeoX",
    "olmo": "GPTNeoX",
    "olmo2": "GPTNeoX",
    "olmoe": "GPTNeoX",
    "olmo3": "GPT2",
    "granite": "GPT2",
    "granitemoe": "GPT2",
    "gpt2": "GPT2",
    "phi": "CodeGen",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2",
    "qwen3": "Qwen2",
    "qwen3_moe": "Qwen2",
}

#: Ids without a token that a vocabulary may have beside as many as it has tokens.
_MOST_HOLES = 1 << 16


def tokenizer_of_folder(folder: Path) -> BaseTokenizer:
    """The tokenizer of a Hugging Face folder.

    Files: tokenizer.json, or files that transformers can convert; if present also tokenizer_config.json,
    special_tokens_map.json, added_tokens.json, config.json, generation_config.json, chat_template.jinja,
    additional_chat_templates/*.jinja and chat_template.json. A byte order mark is skipped.

    Raises:
        ExportError: no tokenizer, a file that cannot be read, or several chat templates without a default.
    """
    settings, config = _read(folder / "tokenizer_config.json"), _read(folder / "config.json")
    kind = _class_of(settings, config)
    state = _read(folder / "tokenizer.json") or _converted(folder)
    if not isinstance(state.get("model"), dict) or not isinstance(state["model"].get("vocab"), dict):
        raise ExportError(
            f"'{folder / 'tokenizer.json'}' has a model of the kind {_kind(state)!r:.40}, expected one with a "
            "vocabulary of words (BPE); give a base whose tokenizer is BPE"
        )
    loaded = _load(folder, state)
    values = _special_tokens(folder, settings, kind)
    state = _with_added(folder, {"added_tokens": [], **state}, loaded=loaded, settings=settings, values=values)
    if kind.first is not None:
        state |= {"post_processor": _ends_of_text(state, settings, values, first=kind.first)}
    template = default_template(_templates(folder, settings), f"'{folder}'")
    ends = [id_of(state, str(values[name])) for name in ("eos_token", "bos_token") if name in values]
    ends += _ids_in(config.get("eos_token_id")) + _ids_in(_read(folder / "generation_config.json").get("eos_token_id"))
    text_config = config.get("text_config")
    if isinstance(text_config, dict):
        ends += _ids_in(text_config.get("eos_token_id"))
    return assemble_tokenizer(state, template=template, values=values, ends=ends)


def _templates(folder: Path, settings: Mapping[str, Any]) -> Any:
    """Chat templates; separate files come before the config, as in transformers."""
    named = {p.stem: _text(p) for p in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        named["default"] = _text(folder / "chat_template.jinja")
    return named or settings.get("chat_template") or _read(folder / "chat_template.json").get("chat_template")


def _class_of(settings: Mapping[str, Any], config: Mapping[str, Any]) -> _Class:
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if isinstance(name, str):
        name = name.removesuffix("Fast").removesuffix("Tokenizer")
    else:
        name = _BY_MODEL.get(str(config.get("model_type")))
    return _CLASSES.get(str(name), _Class())


def _special_tokens(folder: Path, settings: Mapping[str, Any], kind: _Class) -> dict[str, str | list[str]]:
    """Special tokens by the names under which a chat template sees them."""
    values: dict[str, Any] = {**kind.defaults}
    values |= {name: settings[name] for name in (*_NAMES, "additional_special_tokens") if name in settings}
    if "added_tokens_decoder" not in settings:  # as transformers 4 writes it; before, the map was the last word
        values |= _read(folder / "special_tokens_map.json")
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, dict):
        values |= extra
    elif isinstance(extra, list):  # as transformers 5 writes additional ones
        listed = values.get("additional_special_tokens")
        values["additional_special_tokens"] = [*(listed if isinstance(listed, list) else []), *extra]
    texts: dict[str, str | list[str]] = {}
    for name, value in values.items():
        if isinstance(value, list):
            several = [text for text in map(_content, value) if text]
            if several:
                texts[name] = several
        elif text := _content(value):
            texts[name] = text
    return texts


def _load(folder: Path, state: State) -> Any:
    """Load the tokenizer, so that the export refuses a damaged file."""
    rows = state.get("added_tokens")
    added = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    ids = [*state["model"]["vocab"].values(), *added]
    largest = max((number for number in ids if isinstance(number, int)), default=0)
    if largest > 2 * len(ids) + _MOST_HOLES:  # the library lists all ids between, in memory and on standard error
        raise ExportError(
            f"'{folder / 'tokenizer.json'}' has {len(ids)} tokens, one with the id {largest!s:.40}; copy it again"
        )
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(state))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exception on malformed files, and Rust panics
        raise ExportError(
            f"'{folder / 'tokenizer.json'}' cannot be read: {' '.join(str(error).split()):.200}; copy it again"
        ) from error


def _with_added(
    folder: Path, state: State, *, loaded: Any, settings: Mapping[str, Any], values: Mapping[str, str | list[str]]
) -> State:
    """The state with the tokens of the other files that tokenizer.json lacks or describes otherwise."""
    special = [text for value in values.values() for text in ([value] if isinstance(value, str) else value)]
    rows = _missing_rows(state, _named_rows(folder, state, settings, special=special), special)
    prefix = settings.get("add_prefix_space", False)
    pre = state.get("pre_tokenizer")
    if isinstance(pre, dict) and pre.get("add_prefix_space", prefix) != prefix and isinstance(prefix, bool):
        state = state | {"pre_tokenizer": pre | {"add_prefix_space": prefix}}
    if not rows:
        return state
    with native(ExportError, f"the added tokens of '{folder}' cannot be used", "copy the tokenizer's files again"):
        for row in rows:
            content, single, left, right, normalized, is_special = _flags(row)
            token = tokenizers.AddedToken(
                content, single_word=single, lstrip=left, rstrip=right, normalized=normalized, special=is_special
            )
            loaded.add_tokens([token])
        text = loaded.to_str()
    whole: State = json.loads(text)
    return whole


def _named_rows(folder: Path, state: State, settings: Mapping[str, Any], *, special: list[str]) -> dict[int, Any]:
    """Added tokens by id: those of tokenizer_config.json, or of older files and tokenizer.json."""
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        named = {int(number): row for number, row in decoder.items() if number.isdecimal() and isinstance(row, dict)}
        return {number: row for number, row in named.items() if _content(row)}
    older = _read(folder / "added_tokens.json")
    named = {
        number: {"content": text, "special": text in special}
        for text, number in older.items()
        if isinstance(number, int)
    }
    return named | {row["id"]: row for row in state["added_tokens"]}


def _missing_rows(state: State, named: Mapping[int, Any], special: list[str]) -> list[Any]:
    """Added tokens that the state lacks or describes otherwise, in the order of ids; then other special tokens."""
    rows = [row | {"special": bool(row.get("special")) or row.get("content") in special} for row in named.values()]
    known = {_flags(row) for row in state["added_tokens"]}
    rows = [
        row for _, row in sorted(zip(named, rows, strict=True), key=lambda item: item[0]) if _flags(row) not in known
    ]
    present = {row["content"] for row in (*state["added_tokens"], *rows)}
    return rows + [{"content": text, "special": True} for text in dict.fromkeys(special) if text not in present]


def _flags(row: Mapping[str, Any]) -> tuple[str, bool, bool, bool, bool, bool]:
    special = bool(row.get("special", False))
    normalized = row.get("normalized")
    return (
        str(row.get("content")),
        bool(row.get("single_word", False)),
        bool(row.get("lstrip", False)),
        bool(row.get("rstrip", False)),
        not special if normalized is None else bool(normalized),
        special,
    )


def _ends_of_text(
    state: State, settings: Mapping[str, Any], values: Mapping[str, str | list[str]], *, first: bool
) -> State | None:
    """The post-processor of classes with `add_bos_token`; it replaces that of tokenizer.json."""
    pairs: list[tuple[str | None, int | None]] = []
    for name, default in (("bos", first), ("eos", False)):
        text, add = values.get(f"{name}_token"), settings.get(f"add_{name}_token", default)
        pairs.append((text, id_of(state, text)) if add and isinstance(text, str) else (None, None))
    return template_processing(pairs[0], pairs[1])


def _converted(folder: Path) -> State:
    """A tokenizer.json that transformers converts from older files."""
    older = [name for name in ("tokenizer.model", "vocab.json", "merges.txt") if (folder / name).is_file()]
    if not older:
        raise ExportError(f"'{folder}' has no tokenizer.json (and no tokenizer.model); add the one of this model")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        state: State = json.loads(loaded.backend_tokenizer.to_str())
    except Exception as error:  # transformers and sentencepiece raise classes of all kinds, and may not be installed
        raise ExportError(
            f"'{folder}' has no tokenizer.json, and transformers cannot convert {', '.join(older)}: "
            f"{' '.join(str(error).split()) or type(error).__name__:.200}; add the tokenizer.json of this model"
        ) from error
    return state


def _ids_in(value: Any) -> list[int | None]:
    """Ids of the `eos_token_id` of a config, which is a number, a list or null."""
    return [v for v in (value if isinstance(value, list) else [value]) if type(v) is int and v >= 0]


def _content(value: Any) -> str | None:
    """The text of a token, which a config gives as text or as an object with flags."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _kind(state: State) -> Any:
    model = state.get("model")
    return model.get("type") if isinstance(model, dict) else None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"'{path}' is not JSON: {error}; copy it again") from error
    if not isinstance(value, dict):
        raise ExportError(f"'{path}' holds a {type(value).__name__}, expected a JSON object; copy it again")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"'{path}' cannot be read: {error}; save it as UTF-8") from error
