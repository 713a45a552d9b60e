"""Vocabularies of GGUF files, and texts that their tokenizers are compared on."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from hypothesis import strategies as st
from tokenizers import normalizers

from edgecompose_export.tokenizer.gguf import gguf_tokenizer

CORPUS = (
    "Hello world, it's 12345 tests. We'LL don't I'm THEY'VE he'd 's 't\n\n\n(b) a\n\nb 12345.\n\n(c) x=y+z;  return\n"
    "naïve café Über 日本語の文字 中文字符 한국어 привет мир العربية हिन्दी ไทย ½ ² Ⅷ … — “quotes” <b>bold</b> </s>"
    " \t\t tab\r\ndef f(x):\n    return x ** 2\n\n    # CamelCaseWord snake_case HTTPServer iPhone e\u0301 \u00a0 "
    "\u3000 😀 a/b ////\n"
)
PIECES = [
    "hello",
    " world",
    "it's",
    "DON'T",
    " 'LL",
    "we'Ve",
    "12345",
    "1",
    " 12",
    "٣٤",
    "½",
    "Ⅷ",
    "\n",
    "\n\n",
    ".\n\n",
    "(b",
    " \n",
    "\r\n",
    "\t",
    "  ",
    "   ",
    " ",
    "\u00a0",
    "\u3000",
    "\u2028",
    "naïve",
    "e\u0301",
    "日本語",
    "中文字符",
    "한국어",
    "привет",
    "العربية",
    "हिन्दी",
    "ไทย",
    "😀",
    "👩\u200d👧",
    "CamelCase",
    "HTTPServer",
    "a/b",
    "//",
    "...",
    "—",
    "$x+y",
    "`~^|",
    "ſ",
    "'ſ",
    "ǅ",
    "ʰ",
    "_",
    "<b>",
    "</s>",
    "\u200b",
    "\x00",
    "A",
    "z",
    "é",
    "'s",
    "T",
    "-",
]
SPECIAL, USER = ("<|one|>", "<|two|>"), ("<think>", "</think>")
TEXTS = st.lists(
    st.sampled_from([*PIECES, *SPECIAL, *USER])
    | st.integers(0, 0x2FFFF).filter(lambda n: not 0xD800 <= n < 0xE000).map(chr),
    max_size=10,
).map("".join)
NFC = normalizers.NFC()


def load(metadata: dict[str, Any]) -> Any:
    return tokenizers.Tokenizer.from_str(json.dumps(gguf_tokenizer(metadata)))
