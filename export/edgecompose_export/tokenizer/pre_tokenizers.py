"""The pre-tokenizers of GGUF files, by the names that llama.cpp gives them.

A GGUF file holds the name of a pre-tokenizer, but not its rules. The table maps each name to the pre-tokenizer of the
Hugging Face tokenizer for which llama.cpp's converter writes that name (llama.cpp, conversion/base.py and
src/llama-vocab.cpp; the regular expressions are those of the published tokenizer.json files). A name that is not in
the table is refused: with other rules the same vocabulary gives other ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgecompose.errors import ExportError
from edgecompose_export.tokenizer.gguf_vocabulary import KEY, Vocabulary
from edgecompose_export.tokenizer.post_processor import State

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED_CODER = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(end: str, digits: str) -> str:
    """Words split where a capital follows a small letter, each with an optional end (o200k and Tekken)."""
    word = r"[^\r\n\p{L}\p{N}]?"
    tail = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return f"{word}{_UPPER}*{_LOWER}+{end}|{word}{_UPPER}+{_LOWER}*{end}|{digits}|{tail}"


def _split(regex: str) -> State:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool) -> State:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _digits(*, individual: bool) -> State:
    return {"type": "Digits", "individual_digits": individual}


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split before merges. `first` is llama.cpp's default of add_bos_token."""

    steps: tuple[State, ...]
    nfc: bool = False
    ignore_merges: bool = False
    first: bool = False


def _regex(*patterns: str, nfc: bool = False, ignore_merges: bool = False, first: bool = False) -> PreTokenizer:
    steps = (*map(_split, patterns), _byte_level(use_regex=False))
    return PreTokenizer(steps, nfc=nfc, ignore_merges=ignore_merges, first=first)


_LLAMA3 = _regex(_CL100K, ignore_merges=True, first=True)
_GPT2 = PreTokenizer((_byte_level(use_regex=True),))
_DIGITS = PreTokenizer((_digits(individual=True), _byte_level(use_regex=True)))
_O200K = _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")
_DEEPSEEK_CODER = PreTokenizer(
    (
        *map(_split, (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+")),
        _digits(individual=True),
        _byte_level(use_regex=False),
    )
)
_FALCON = PreTokenizer(
    (
        {"type": "Punctuation", "behavior": "Contiguous"},
        _byte_level(use_regex=True),
        _digits(individual=False),
        _split("[0-9][0-9][0-9]"),
    )
)
#: Pre-tokenizers by `tokenizer.ggml.pre`; comments name models that have them.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,  # Llama 3, 3.1, 3.2, Hermes 3, R1 Distill Llama
    "falcon3": _LLAMA3,
    "falcon-h1": _LLAMA3,
    "pixtral": _LLAMA3,
    "midm-2.0": _LLAMA3,
    "lfm2": _LLAMA3,
    "smaug-bpe": _regex(_CL100K, ignore_merges=True),  # SmolLM3, Llama 3 that was saved without its first token
    "dbrx": _regex(_CL100K),  # Phi-4, OLMo 2, Granite 4
    "glm4": _regex(_CL100K, ignore_merges=True),
    "chatglm-bpe": _regex(_CL100K, ignore_merges=True),
    "qwen2": _regex(_QWEN2, nfc=True),
    "deepseek-r1-qwen": _regex(_QWEN2, nfc=True),  # Qwen 1.5 to 3
    "qwen35": _regex(_QWEN35, nfc=True),
    "stablelm2": _regex(_QWEN2),
    "seed-coder": _regex(_SEED_CODER),
    "smollm": _DIGITS,  # SmolLM, SmolLM2
    "starcoder": _DIGITS,
    "refact": _DIGITS,  # StarCoder, Granite 3
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "minerva-7b": _DIGITS,
    "command-r": PreTokenizer(_DIGITS.steps, nfc=True),
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": PreTokenizer(_GPT2.steps, nfc=True),
    "mpt": PreTokenizer(_GPT2.steps, nfc=True),
    "tekken": _regex(_cased("", r"\p{N}"), ignore_merges=True, first=True),  # Mistral Nemo, Mistral Small 3
    "gpt-4o": _regex(_O200K),  # Phi-4-mini
    "llama4": _regex(_O200K, ignore_merges=True),
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-v3": _regex(
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "falcon": _FALCON,
}
#: The only pre-tokenizer of an architecture's models, for files that name none or 'default'.
_BY_ARCHITECTURE = {
    "gpt2": "gpt-2",
    "phi2": "gpt-2",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2",
    "qwen3": "qwen2",
    "qwen3moe": "qwen2",
    "command-r": "command-r",
    "starcoder": "starcoder",
    "starcoder2": "starcoder",
    "olmo": "olmo",
    "olmo2": "dbrx",
}


def pre_tokenizer_of(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> PreTokenizer:
    """The pre-tokenizer of a GGUF model.

    Raises:
        ExportError: its name is unknown.
    """
    name = metadata.get(f"{KEY}pre")
    if name in (None, "", "default"):
        name = _guess(metadata, vocabulary)
    pre_tokenizer = PRE_TOKENIZERS.get(str(name))
    if pre_tokenizer is not None:
        return pre_tokenizer
    raise ExportError(
        f"the GGUF file names the pre-tokenizer {metadata.get(f'{KEY}pre')!r:.60} ({KEY}pre), expected one "
        f"of {', '.join(sorted(PRE_TOKENIZERS))}; give the model's Hugging Face folder, or convert it with a "
        "newer llama.cpp"
    )


def _guess(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> str | None:
    """The name for a file without one, where its architecture or its special tokens leave only one."""
    architecture = metadata.get("general.architecture")
    if architecture == "llama":
        tokens = vocabulary.tokens
        if len(tokens) > 128000 and tokens[128000] == "<|begin_of_text|>":
            return "llama-bpe"
        return "smollm" if tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] else None
    return _BY_ARCHITECTURE.get(str(architecture))
