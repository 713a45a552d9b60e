"""The tokenizer of a GGUF file, as the `tokenizer.json` that the same model has on Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgecompose.errors import ExportError
from edgecompose.formats.architectures import ARCHITECTURES, gguf_architectures
from edgecompose_export.tokenizer.base_tokenizer import BaseTokenizer, assemble_tokenizer, default_template
from edgecompose_export.tokenizer.gguf_vocabulary import (
    CONTROL,
    KEY,
    MATCHED,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    read_merges,
    read_scores,
    read_vocabulary,
)
from edgecompose_export.tokenizer.post_processor import State, template_processing
from edgecompose_export.tokenizer.pre_tokenizers import pre_tokenizer_of

_SPACE = "▁"  # a space in SentencePiece
#: Rows that only fill the embedding; no tokenizer has them.
_FILLER = re.compile(r"\[PAD\d+\]$")
#: Tokens of Phi-3 that do not strip the white space after them.
_NEVER_STRIPS = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_EMPTY: State = {"version": "1.0", "truncation": None, "padding": None}


def tokenizer_of_gguf(metadata: Mapping[str, Any]) -> BaseTokenizer:
    """The tokenizer of a GGUF model.

    Args:
        metadata: of the (first) file, from `gguf_file.read_gguf`.

    Raises:
        ExportError: as `gguf_tokenizer`, or several chat templates without a default.
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
    template = default_template(metadata.get(prefix) or named, "the GGUF file")
    ends = [vocabulary.special.get(name) for name in ("eos", "eot", "eom", "bos")]
    return assemble_tokenizer(state, template=template, values=values, ends=ends)


def gguf_tokenizer(metadata: Mapping[str, Any]) -> State:
    """The `tokenizer.json` of a GGUF model. Its ids are those of the model's Hugging Face tokenizer.

    Control tokens and the unknown token are special added tokens; user-defined tokens are added tokens that stay in
    decoded text. No id lies beyond the token list. `encode(text, add_special_tokens=True)` puts the first
    token before the text where `tokenizer.ggml.add_bos_token` says so (by default as llama.cpp does).

    Args:
        metadata: of `gguf_file.read_gguf`.

    Returns:
        A dictionary for `tokenizers.Tokenizer.from_str(json.dumps(...))`.

    Raises:
        ExportError: an unknown kind of tokenizer or pre-tokenizer, or a damaged vocabulary.
    """
    vocabulary = read_vocabulary(metadata)
    kind = metadata.get(f"{KEY}model")
    if kind == "gpt2":
        state, first = _byte_level_bpe(metadata, vocabulary)
    elif kind == "llama":
        state, first = _sentencepiece(metadata, vocabulary)
    else:
        raise ExportError(
            f"the GGUF file has a tokenizer of the kind {kind!r:.40}, expected 'gpt2' (byte-level BPE) or 'llama' "
            "(SentencePiece); give the model's Hugging Face folder"
        )
    ends = [vocabulary.special.get(name) for name in ("bos", "eos")]
    added = (metadata.get(f"{KEY}add_bos_token", first), metadata.get(f"{KEY}add_eos_token", False))
    names = [
        None if token is None or not add else vocabulary.tokens[token] for token, add in zip(ends, added, strict=True)
    ]
    return state | {"post_processor": template_processing(*zip(names, ends, strict=True))}


def _byte_level_bpe(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[State, bool]:
    pre_tokenizer = pre_tokenizer_of(metadata, vocabulary)
    ids = _ids(vocabulary, lambda token, kind: kind != UNUSED)
    merges = read_merges(metadata)
    if merges is None:
        raise ExportError(f"the GGUF file has no {KEY}merges, which 'gpt2' tokenizers need; convert the model again")
    bad = next((m for m in merges if m[0] not in ids or m[1] not in ids or m[0] + m[1] not in ids), None)
    if bad is not None:
        raise ExportError(
            f"{KEY}merges of the GGUF file joins {bad[0]!r:.50} and {bad[1]!r:.50}, expected two tokens whose join is "
            "a token; convert the model again"
        )
    steps = list(pre_tokenizer.steps)
    return (
        {
            **_EMPTY,
            "added_tokens": _added(vocabulary, ids),
            "normalizer": {"type": "NFC"} if pre_tokenizer.nfc else None,
            "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": _bpe(ids, merges, ignore_merges=pre_tokenizer.ignore_merges),
        },
        pre_tokenizer.first,
    )


def _ids(vocabulary: Vocabulary, accept: Callable[[str, int], bool]) -> dict[str, int]:
    """Ids of the accepted tokens. Of two with the same text, the one of a kind in MATCHED counts."""
    ids: dict[str, int] = {}
    for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if accept(token, kind) and (
            token not in ids or (kind in MATCHED and vocabulary.types[ids[token]] not in MATCHED)
        ):
            ids[token] = number
    return ids


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[State, bool]:
    """As `LlamaTokenizerFast` and `GemmaTokenizerFast`: BPE over the whole text, unknown characters as bytes."""
    row = gguf_architectures().get(str(metadata.get("general.architecture")), ARCHITECTURES["llama"])
    prefix = bool(metadata.get(f"{KEY}add_space_prefix", row.space_prefix))
    # converters write plain spaces in user-defined tokens; in the vocabulary they are those of SentencePiece
    tokens = [
        _SPACE * len(token) if kind == USER_DEFINED and token.strip(" ") == "" else token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]
    spaced = Vocabulary(tokens, vocabulary.types, vocabulary.special)
    ids = _ids(spaced, lambda token, kind: kind != UNUSED or not _FILLER.match(token))
    if row.tab_is_byte and "\t" not in ids and "<0x09>" in ids:  # as transformers does for Gemma 1 and 2
        ids["\t"] = ids.pop("<0x09>")
    merges = read_merges(metadata)
    if merges is None:
        merges = merges_of_scores(ids, read_scores(metadata, vocabulary))
    else:
        merges = [pair for pair in merges if pair[0] in ids and pair[1] in ids and pair[0] + pair[1] in ids]
    unknown = vocabulary.special.get("unknown", 0)
    replace: State = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    normalizer, strip = replace, []
    if prefix:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, replace]}
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *strip,
    ]
    return (
        {
            **_EMPTY,
            "added_tokens": _added(spaced, ids, strips=row.strips_right),
            "normalizer": normalizer,
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": _bpe(ids, merges, unknown=tokens[unknown], byte_fallback=True),
        },
        True,
    )


def merges_of_scores(ids: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Merges of a SentencePiece vocabulary: all pairs of tokens that join to a token, by the score of the result.

    Order as in transformers' conversion (`convert_slow_tokenizer.generate_merges`): the highest score first, then the
    longer left part, then the longer right part, then the order of `ids`.

    Args:
        ids: tokens, each with its id.
        scores: by id.
    """
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, number in ids.items():
        length = len(token)
        if length < 2:
            continue
        score = -scores[number]
        for cut in range(length - 1, 0, -1):
            left = token[:cut]
            if left in ids:
                right = token[cut:]
                if right in ids:
                    ranked.append((score, -cut, cut - length, left, right))
    ranked.sort(key=lambda entry: entry[:3])
    return [(left, right) for _, _, _, left, right in ranked]


def _added(vocabulary: Vocabulary, ids: Mapping[str, int], *, strips: bool = False) -> list[State]:
    """Tokens that are matched in the text before anything else."""
    rows = []
    for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in MATCHED and token and ids.get(token) == number:
            right = strips and kind in (CONTROL, USER_DEFINED) and token not in _NEVER_STRIPS
            rows.append(
                {
                    "id": number,
                    "content": token,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": right,
                    "normalized": False,
                    "special": kind != USER_DEFINED,
                }
            )
    return rows


def _bpe(
    ids: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    unknown: str | None = None,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> State:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": dict(ids),
        "merges": [list(pair) for pair in merges],
    }
