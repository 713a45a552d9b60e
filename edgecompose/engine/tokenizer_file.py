"""Opens a `tokenizer.json`, and encodes text with it: of a long text, only the ends that are read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from edgecompose.errors import BundleError, EdgeComposeError
from edgecompose.guard.native import native

#: Characters at each end of a text that are tokenised first, for each token that is read there; and at most.
_FIRST_WINDOW, _LARGEST_WINDOW = 16, 1 << 18
#: Normalizers and pre-tokenizers that drop no character.
_KEEPING = frozenset(("Prepend", "ByteLevel", "Metaspace", "Digits", "Split", "Punctuation"))
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def open_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a file, which neither cuts nor pads.

    Raises:
        BundleError: the file cannot be read.
    """
    with native(BundleError, f"tokenizer '{path}' cannot be read"):
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def encode_text(
    tokenizer: tokenizers.Tokenizer, text: str, error: type[EdgeComposeError], *, add_special_tokens: bool = True
) -> tokenizers.Encoding:
    """A text as tokens.

    Raises:
        error: the text is not valid Unicode.
        BundleError: the tokenizer fails, as a damaged one does: it panics, or lacks its token for unknown words.
    """
    with native(BundleError, "the tokenizer of the bundle cannot encode this text"):
        try:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as reason:  # a lone surrogate, which is how Python spells bytes that are not UTF-8
            surrogate = _SURROGATE.search(text)
            start = max(0, surrogate.start() - 20) if surrogate else 0
            place = f"at character {surrogate.start()}, " if surrogate else ""
            raise error(f"the text is not valid Unicode: {place}{text[start : start + 40]!r}; give UTF-8") from reason


def longest_token(tokenizer: tokenizers.Tokenizer) -> int | None:
    """Characters that one token stands for at most.

    None where there is no such number: where a normalizer or a pre-tokenizer drops characters, an added token strips
    white space, or unknown characters become one token together.
    """
    model = tokenizer.model
    if not isinstance(model, tokenizers.models.BPE) or (model.fuse_unk and not model.byte_fallback):
        return None
    if any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values()):
        return None
    composed = 1
    for part in (tokenizer.normalizer, tokenizer.pre_tokenizer):
        for step in _steps({} if part is None else json.loads(part.__getstate__())):
            if step.get("type") == "NFC":
                composed = 4  # code points that it makes one, at most
            elif not _keeps_characters(step):
                return None
    return composed * max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)


def _steps(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    inner = [*state.get("normalizers", []), *state.get("pretokenizers", [])]
    if inner or state.get("type") == "Sequence":
        for step in inner:
            yield from _steps(step)
    elif state:
        yield state


def _keeps_characters(step: Mapping[str, Any]) -> bool:
    if step.get("type") == "Replace":
        pattern = step.get("pattern", {}).get("String")
        return isinstance(pattern, str) and len(step.get("content", "")) >= len(pattern)
    return step.get("type") in _KEEPING and step.get("behavior") != "Removed"


def encode_ends(tokenizer: tokenizers.Tokenizer, text: str, limit: int, error: type[EdgeComposeError]) -> list[int]:
    """Ids of a text, special ones included; of a long text those of its ends, as many as `limit` and more.

    The first `limit // 2` and the last `limit - limit // 2` are those of the whole text. Windows at both ends are
    joined and tokenised, and become wider until these ids lie two words or more from the joint. A word longer than
    262,144 characters is cut all the same.

    Raises:
        error: the text is not valid Unicode.
        BundleError: the tokenizer fails.
    """
    head, window = limit // 2, _FIRST_WINDOW * limit
    while 2 * window < len(text):
        encoding = encode_text(tokenizer, text[:window] + text[-window:], error)
        if window >= _LARGEST_WINDOW or _are_apart(encoding, window, head, tail=limit - head):
            return list(encoding.ids)
        window = min(4 * window, _LARGEST_WINDOW)
    return list(encode_text(tokenizer, text, error).ids)


def _are_apart(encoding: tokenizers.Encoding, joint: int, head: int, *, tail: int) -> bool:
    """Whether the first `head` tokens end two words before a place in a text, the last `tail` begin as far behind."""
    words, offsets = encoding.word_ids, encoding.offsets
    if len(words) <= head + tail:
        return False
    before = [word for word, (_, end) in zip(words, offsets, strict=True) if word is not None and end <= joint]
    behind = [word for word, (start, _) in zip(words, offsets, strict=True) if word is not None and start >= joint]
    first = [word for word in words[:head] if word is not None]
    last = [word for word in words[len(words) - tail :] if word is not None]
    return bool(before and behind and first and last) and max(first) <= max(before) - 2 and min(last) >= min(behind) + 2
