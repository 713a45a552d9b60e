"""The vocabulary of a GGUF file: tokens, their kinds, special ids, merges and scores.

Kinds of tokens (`tokenizer.ggml.token_type`): 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgecompose.errors import ExportError

KEY = "tokenizer.ggml."
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
#: Kinds of tokens that are matched in the text before anything else.
MATCHED = frozenset({UNKNOWN, CONTROL, USER_DEFINED})


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of a GGUF file by id, their kinds, and its special ids.

    `special` holds the ids under 'bos', 'eos', 'eot', 'eom', 'unknown' and 'padding'.
    """

    tokens: list[str]
    types: list[int]
    special: Mapping[str, int]


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary that the metadata of a GGUF file describes.

    Raises:
        ExportError: no tokens, lists of different lengths, an id without a token, or a token that is not UTF-8.
    """
    tokens = metadata.get(f"{KEY}tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ExportError(
            f"the GGUF file has no vocabulary ({KEY}tokens is {_short(tokens)}); convert the model again, or give its "
            "Hugging Face folder"
        )
    for number, token in enumerate(tokens):
        if not token.isascii() and any("\ud800" <= character <= "\udfff" for character in token):
            raise ExportError(f"token {number} of the GGUF file is not UTF-8: {token!r:.60}; convert the model again")
    types = metadata.get(f"{KEY}token_type")
    if types is None:
        types = [1] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens) or not all(isinstance(kind, int) for kind in types):
        raise ExportError(
            f"{KEY}token_type of the GGUF file is {_short(types)}, expected {len(tokens)} numbers, one a token; "
            "convert the model again"
        )
    special = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        value = metadata.get(f"{KEY}{name}_token_id")
        if value is None or value == 0xFFFFFFFF:  # some converters write "none" this way
            continue
        if type(value) is not int or not 0 <= value < len(tokens):
            raise ExportError(
                f"{KEY}{name}_token_id of the GGUF file is {value!r:.40}, expected an id below {len(tokens)}; "
                "convert the model again"
            )
        special[name] = value
    if metadata.get(f"{KEY}model") == "llama" and len(tokens) > 2:  # llama.cpp's defaults
        for name, number in (("bos", 1), ("eos", 2)):
            if types[number] == CONTROL:
                special.setdefault(name, number)
    return Vocabulary(tokens, types, special)


def read_scores(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> list[float]:
    """Scores by id. User-defined tokens get 0, as in SentencePiece; converters write different numbers for them."""
    scores = metadata.get(f"{KEY}scores")
    numbers = isinstance(scores, list) and all(isinstance(score, (int, float)) for score in scores)
    if not isinstance(scores, list) or not numbers or len(scores) != len(vocabulary.tokens):
        raise ExportError(
            f"{KEY}scores of the GGUF file is {_short(scores)}, expected {len(vocabulary.tokens)} numbers, one a "
            "token; convert the model again"
        )
    return [0.0 if kind == USER_DEFINED else float(score) for score, kind in zip(scores, vocabulary.types, strict=True)]


def read_merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    """The merges that the file lists, None where it lists none."""
    listed = metadata.get(f"{KEY}merges")
    if not listed:
        return None
    if not isinstance(listed, list):
        raise ExportError(f"{KEY}merges of the GGUF file is {_short(listed)}, expected a list; convert it again")
    pairs = []
    for number, merge in enumerate(listed):
        cut = merge.find(" ", 1) if isinstance(merge, str) else -1
        if cut < 0:
            raise ExportError(
                f"{KEY}merges[{number}] of the GGUF file is {merge!r:.60}, expected two tokens with a space between "
                "them; convert the model again"
            )
        pairs.append((merge[:cut], merge[cut + 1 :]))
    return pairs


def _short(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else f"{value!r:.40}"
