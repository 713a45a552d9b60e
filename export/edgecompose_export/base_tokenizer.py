"""Tokenizer, chat template and end tokens of a base, out of a GGUF file or a Hugging Face folder.

Folders are read as transformers' fast tokenizers read them (`PreTrainedTokenizerFast`, `LlamaTokenizerFast` and others,
4.57), without transformers where a tokenizer.json is there.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from edgecompose.errors import BundleError, ExportError, GenerationError
from edgecompose.generation.chat_template import ChatTemplate, self_contained
from edgecompose_export.gguf_tokenizer import State, gguf_tokenizer, read_vocabulary, template_processing

#: Texts of special tokens that end a turn or a text, in the models that have them.
_ENDS = frozenset(
    {
        "</s>", "<eos>", "<end_of_turn>", "<turn|>", "<end_of_utterance>", "<|im_end|>", "<|end|>", "<|eot_id|>",
        "<|eom_id|>", "<|eot|>", "<|eom|>", "<|EOT|>", "<|endoftext|>", "<|end_of_text|>", "<|endofturn|>",
        "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<|return|>", "<|call|>", "<EOT>", "[EOS]", "[EOT]",
        "[|endofturn|]", "<｜end▁of▁sentence｜>",
    }
)  # fmt: skip
#: Names under which transformers passes special tokens to a chat template.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MARK = "qzxanswerqzx"


@dataclass(frozen=True)
class _Class:
    """A class of transformers' tokenizers: special tokens where the config names none, and whether it puts the first
    token before each text where the config says nothing (None: the tokenizer.json decides).
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
#: The class of models whose tokenizer_config.json names none.
_BY_MODEL = {
    "llama": "Llama", "mistral": "Llama", "mixtral": "Llama", "phi3": "Llama", "phimoe": "Llama", "ernie4_5": "Llama",
    "gemma": "Gemma", "gemma2": "Gemma", "gemma3": "Gemma", "gemma3_text": "Gemma", "cohere": "Cohere",
    "cohere2": "Cohere", "gpt_neox": "GPTNeoX", "olmo": "GPTNeoX", "olmo2": "GPTNeoX", "olmoe": "GPTNeoX",
    "olmo3": "GPT2", "granite": "GPT2", "granitemoe": "GPT2", "gpt2": "GPT2", "phi": "CodeGen", "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2", "qwen3": "Qwen2", "qwen3_moe": "Qwen2",
}  # fmt: skip


@dataclass(frozen=True)
class BaseTokenizer:
    """What a base says about text.

    `state` is its tokenizer.json; `template` its chat template, which needs no variable beside the conversation, None
    where there is none; `end_tokens` the sorted ids that end an answer; `first_token` the id that `tokenizer(text)`
    puts first, None where it puts none. The others are texts of special tokens.
    """

    state: State
    template: str | None
    end_tokens: tuple[int, ...]
    first_token: int | None
    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    pad: str | None = None

    @property
    def size(self) -> int:
        """One more than the largest id."""
        ids: list[int] = [*self.state["model"]["vocab"].values(), *(row["id"] for row in self.state["added_tokens"])]
        return 1 + max(ids)

    def token_id(self, text: str | None) -> int | None:
        """Id of one token by its exact spelling, None when there is no such token."""
        return None if text is None else _id_of(self.state, text)

    def fitted(self, vocabulary: int) -> BaseTokenizer:
        """The tokenizer for a base whose embedding has `vocabulary` rows.

        Added tokens without a row are dropped, since no graph could read them (Gemma 3 has one for images): their text
        is then tokenised like any other. A smaller tokenizer is fine, embeddings are often padded.

        Raises:
            ExportError: words of the vocabulary itself have no row, so this is the tokenizer of another model.
        """
        model = self.state["model"]
        dropped = {row["content"] for row in self.state["added_tokens"] if row["id"] >= vocabulary}
        beyond = [word for word, number in model["vocab"].items() if number >= vocabulary and word not in dropped]
        if beyond:
            raise ExportError(
                f"the tokenizer has {len(beyond)} words with ids from {vocabulary} on, such as {beyond[0]!r:.40}; the "
                f"base's vocabulary has {vocabulary} rows; put the tokenizer of this model beside its weights"
            )
        if self.first_token is not None and self.first_token >= vocabulary:
            raise ExportError(
                f"the tokenizer begins texts with token {self.first_token}, the base's vocabulary has {vocabulary} "
                "rows; put the tokenizer of this model beside its weights"
            )
        ends = tuple(token for token in self.end_tokens if token < vocabulary)
        if not dropped:
            return self if ends == self.end_tokens else dataclasses.replace(self, end_tokens=ends)
        added = [row for row in self.state["added_tokens"] if row["content"] not in dropped]
        words = {word: number for word, number in model["vocab"].items() if word not in dropped}
        merges = [merge for merge in model["merges"] if not dropped.intersection(_parts(merge))]
        state = self.state | {"added_tokens": added, "model": model | {"vocab": words, "merges": merges}}
        return dataclasses.replace(self, state=state, end_tokens=ends)

    def write(self, path: Path) -> None:
        """Write the tokenizer.json, making its folder if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.state, ensure_ascii=False), encoding="utf-8")


def tokenizer_of_gguf(metadata: Mapping[str, Any]) -> BaseTokenizer:
    """The tokenizer of a GGUF model.

    Args:
        metadata: of the (first) file, as `gguf_file.read_gguf` reads it.

    Raises:
        ExportError: as `gguf_tokenizer.gguf_tokenizer` does, or chat templates of which none is the default.
    """
    vocabulary = read_vocabulary(metadata)
    state = gguf_tokenizer(metadata)
    texts = {name: vocabulary.tokens[number] for name, number in vocabulary.special.items()}
    values = {
        f"{short}_token": texts[name]
        for short, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if name in texts
    }
    prefix = "tokenizer.chat_template"
    named = {key[len(prefix) + 1 :]: value for key, value in metadata.items() if key.startswith(f"{prefix}.")}
    template = _default_template(metadata.get(prefix) or named, "the GGUF file")
    ends = [vocabulary.special.get(name) for name in ("eos", "eot", "eom", "bos")]
    return _finished(state, template, values, ends)


def tokenizer_of_folder(folder: Path) -> BaseTokenizer:
    """The tokenizer of a Hugging Face folder.

    Files: tokenizer.json, or what transformers can make one of; tokenizer_config.json, special_tokens_map.json,
    added_tokens.json, config.json, generation_config.json, chat_template.jinja, additional_chat_templates/*.jinja and
    chat_template.json where they are there. A byte order mark is skipped.

    Raises:
        ExportError: no tokenizer, a file that cannot be read, or chat templates of which none is the default.
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
    state = _with_added(folder, {"added_tokens": [], **state}, loaded, settings, values)
    if kind.first is not None:
        state |= {"post_processor": _ends_of_text(state, settings, values, first=kind.first)}
    template = _default_template(_templates(folder, settings), f"'{folder}'")
    ends = [_id_of(state, str(values[name])) for name in ("eos_token", "bos_token") if name in values]
    ends += _ids_in(config.get("eos_token_id")) + _ids_in(_read(folder / "generation_config.json").get("eos_token_id"))
    text_config = config.get("text_config")
    if isinstance(text_config, dict):
        ends += _ids_in(text_config.get("eos_token_id"))
    return _finished(state, template, values, ends)


def _finished(
    state: State, template: str | None, values: Mapping[str, str | Sequence[str]], ends: Iterable[int | None]
) -> BaseTokenizer:
    added = {row["content"]: row for row in state["added_tokens"]}
    if template is not None:
        template = self_contained(template, values)
        if any("\ud800" <= character <= "\udfff" for character in template):
            raise ExportError("the chat template is not UTF-8; convert or copy the model again")
    known = {
        row["id"]
        for text, row in added.items()
        if text in _ENDS and (row.get("special") or text.startswith("<|") or text == "<end_of_turn>")
    }  # Gemma has </s> as a tag of HTML, which is not special
    turn = None if template is None else _end_of_turn(template, added)
    texts = {name: values.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    return BaseTokenizer(
        state, template, tuple(sorted(known.union(end for end in (*ends, turn) if end is not None))),
        _first_token(state.get("post_processor")),
        **{name: text if isinstance(text, str) else None for name, text in texts.items()},
    )  # fmt: skip


def _end_of_turn(template: str, added: Mapping[str, State]) -> int | None:
    """The added token that the template writes after an assistant's message, None where it writes none."""
    talk = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": _MARK}]
    try:
        text = ChatTemplate(template).render(talk, add_generation_prompt=False)
    except GenerationError:
        return None
    except BundleError as error:
        reason = str(error.__cause__ or error)
        raise ExportError(f"the chat template is not valid Jinja: {reason:.200}; copy that of this model") from error
    _, mark, rest = text.rpartition(_MARK)
    rest = rest.lstrip()
    ends = [token for token in added if token.strip() and rest.startswith(token)] if mark else []
    return int(added[max(ends, key=len)]["id"]) if ends else None


def _default_template(templates: Any, source: str) -> str | None:
    """The one template, or the default of several."""
    if isinstance(templates, list):
        templates = {str(row.get("name")): row.get("template") for row in templates if isinstance(row, dict)}
    if isinstance(templates, dict):
        if templates and "default" not in templates:
            raise ExportError(
                f"{source} has the chat templates {', '.join(map(str, sorted(templates)))}, and none is called "
                "'default'; give the one that conversations use that name"
            )
        templates = templates.get("default")
    return templates if isinstance(templates, str) and templates else None


def _templates(folder: Path, settings: Mapping[str, Any]) -> Any:
    """Templates in the order in which transformers takes them: files of their own before the config's."""
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
    """Special tokens by the name under which a template sees them; those that are none are left out."""
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
    """The tokenizer, so that a damaged file is told here and not in a run."""
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(state))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exception on malformed files, and panics, which are no Exception
        raise ExportError(
            f"'{folder / 'tokenizer.json'}' cannot be read: {' '.join(str(error).split()):.200}; copy it again"
        ) from error


def _with_added(
    folder: Path, state: State, loaded: Any, settings: Mapping[str, Any], values: Mapping[str, str | list[str]]
) -> State:
    """The state with the tokens of the other files that tokenizer.json lacks or describes otherwise."""
    special = [text for value in values.values() for text in ([value] if isinstance(value, str) else value)]
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        named = {int(number): row for number, row in decoder.items() if number.isdecimal() and isinstance(row, dict)}
        named = {number: row for number, row in named.items() if _content(row)}
    else:
        older = _read(folder / "added_tokens.json")
        named = {
            number: {"content": text, "special": text in special}
            for text, number in older.items()
            if isinstance(number, int)
        }
        named |= {row["id"]: row for row in state["added_tokens"]}
    rows = [row | {"special": bool(row.get("special")) or row.get("content") in special} for row in named.values()]
    known = {_flags(row) for row in state["added_tokens"]}
    rows = [
        row for _, row in sorted(zip(named, rows, strict=True), key=lambda item: item[0]) if _flags(row) not in known
    ]
    present = {row["content"] for row in (*state["added_tokens"], *rows)}
    rows += [{"content": text, "special": True} for text in dict.fromkeys(special) if text not in present]
    prefix = settings.get("add_prefix_space", False)
    cut = state.get("pre_tokenizer")
    if isinstance(cut, dict) and cut.get("add_prefix_space", prefix) != prefix and isinstance(prefix, bool):
        state = state | {"pre_tokenizer": cut | {"add_prefix_space": prefix}}
    if not rows:
        return state
    for row in rows:
        content, single, left, right, normalized, is_special = _flags(row)
        token = tokenizers.AddedToken(
            content, single_word=single, lstrip=left, rstrip=right, normalized=normalized, special=is_special
        )
        loaded.add_tokens([token])
    whole: State = json.loads(loaded.to_str())
    return whole


def _flags(row: Mapping[str, Any]) -> tuple[str, bool, bool, bool, bool, bool]:
    special = bool(row.get("special", False))
    normalized = row.get("normalized")
    return (
        str(row.get("content")), bool(row.get("single_word", False)), bool(row.get("lstrip", False)),
        bool(row.get("rstrip", False)), not special if normalized is None else bool(normalized), special,
    )  # fmt: skip


def _ends_of_text(
    state: State, settings: Mapping[str, Any], values: Mapping[str, str | list[str]], *, first: bool
) -> State | None:
    """The post-processor that classes with `add_bos_token` make, whatever tokenizer.json says."""
    pairs: list[tuple[str | None, int | None]] = []
    for name, default in (("bos", first), ("eos", False)):
        text, add = values.get(f"{name}_token"), settings.get(f"add_{name}_token", default)
        pairs.append((text, _id_of(state, text)) if add and isinstance(text, str) else (None, None))
    return template_processing(pairs[0], pairs[1])


def _first_token(processor: Any) -> int | None:
    """The id that a post-processor of tokenizer.json puts before a text."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence":
        firsts = [_first_token(step) for step in processor.get("processors", [])]
        return next((first for first in firsts if first is not None), None)
    steps = processor.get("single") if processor.get("type") == "TemplateProcessing" else None
    if not steps or "SpecialToken" not in steps[0]:
        return None
    name = steps[0]["SpecialToken"].get("id")
    token = processor.get("special_tokens", {}).get(name)
    if not isinstance(token, dict) or not isinstance(token.get("ids"), list):
        raise ExportError(
            f"tokenizer.json: the post_processor begins texts with {name!r:.40}, which its special_tokens lack; "
            "copy it again"
        )
    return int(token["ids"][0]) if token["ids"] else None


def _converted(folder: Path) -> State:
    """A tokenizer.json that transformers makes of older files."""
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
            f"'{folder}' has no tokenizer.json, and transformers cannot make one of {', '.join(older)}: "
            f"{' '.join(str(error).split()) or type(error).__name__:.200}; add the tokenizer.json of this model"
        ) from error
    return state


def _id_of(state: State, text: str) -> int | None:
    for row in state["added_tokens"]:
        if row["content"] == text:
            return int(row["id"])
    number = state["model"]["vocab"].get(text)
    return None if number is None else int(number)


def _ids_in(value: Any) -> list[int | None]:
    """Ids of a config's `eos_token_id`, which is one, a list or null."""
    return [v for v in (value if isinstance(value, list) else [value]) if type(v) is int and v >= 0]


def _parts(merge: Any) -> tuple[str, ...]:
    """Both words of a merge, and what they make."""
    pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
    return (*pair, "".join(pair))


def _content(value: Any) -> str | None:
    """The text of a token, which configs give as text or with its flags."""
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
