"""The tokenizer of a GGUF file as the `tokenizer.json` that the same model has on Hugging Face.

A GGUF file holds tokens, merges or scores, and the name of a pre-tokenizer; the rules behind that name are in the code
of whoever reads it. The table here gives, for each name, the pre-tokenizer of the Hugging Face tokenizer that
llama.cpp's converter gives the name to (llama.cpp, conversion/base.py and src/llama-vocab.cpp; the regular expressions
are those of the published tokenizer.json files). A name that is not in the table is refused: read with another rule,
the same vocabulary gives other ids.

Kinds of tokens (`tokenizer.ggml.token_type`): 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgecompose.errors import ExportError

#: tokenizer.json as parsed.
State = dict[str, Any]
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
#: Kinds that are matched in the text before anything else.
_MATCHED = frozenset({UNKNOWN, CONTROL, USER_DEFINED})
_KEY = "tokenizer.ggml."
_SPACE = "▁"  # how SentencePiece writes a space
#: Rows that only fill the embedding; no tokenizer has them.
_FILLER = re.compile(r"\[PAD\d+\]$")

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
    """Words split where a capital follows a small letter, each with what may end it (o200k and Tekken)."""
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
class _Rule:
    """How text is cut before merges. `first` is llama.cpp's default of add_bos_token."""

    steps: tuple[State, ...]
    nfc: bool = False
    ignore_merges: bool = False
    first: bool = False


def _regex(*patterns: str, nfc: bool = False, ignore_merges: bool = False, first: bool = False) -> _Rule:
    steps = (*map(_split, patterns), _byte_level(use_regex=False))
    return _Rule(steps, nfc, ignore_merges, first)


_LLAMA3 = _regex(_CL100K, ignore_merges=True, first=True)
_GPT2 = _Rule((_byte_level(use_regex=True),))
_DIGITS = _Rule((_digits(individual=True), _byte_level(use_regex=True)))
_O200K = _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")
_DEEPSEEK_CODER = _Rule(
    (
        *map(_split, (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+")),
        _digits(individual=True), _byte_level(use_regex=False),
    )
)  # fmt: skip
_FALCON = _Rule(
    (
        {"type": "Punctuation", "behavior": "Contiguous"}, _byte_level(use_regex=True), _digits(individual=False),
        _split("[0-9][0-9][0-9]"),
    )
)  # fmt: skip
#: Rules by `tokenizer.ggml.pre`, with models that have them.
PRE_TOKENIZERS: Mapping[str, _Rule] = {
    "llama3": _LLAMA3, "llama-v3": _LLAMA3, "llama-bpe": _LLAMA3,  # Llama 3, 3.1, 3.2, Hermes 3, R1 Distill Llama
    "falcon3": _LLAMA3, "falcon-h1": _LLAMA3, "pixtral": _LLAMA3, "midm-2.0": _LLAMA3, "lfm2": _LLAMA3,
    "smaug-bpe": _regex(_CL100K, ignore_merges=True),  # SmolLM3, Llama 3 that was saved without its first token
    "dbrx": _regex(_CL100K),  # Phi-4, OLMo 2, Granite 4
    "glm4": _regex(_CL100K, ignore_merges=True), "chatglm-bpe": _regex(_CL100K, ignore_merges=True),
    "qwen2": _regex(_QWEN2, nfc=True), "deepseek-r1-qwen": _regex(_QWEN2, nfc=True),  # Qwen 1.5 to 3
    "qwen35": _regex(_QWEN35, nfc=True),
    "stablelm2": _regex(_QWEN2),
    "seed-coder": _regex(_SEED_CODER),
    "smollm": _DIGITS,  # SmolLM, SmolLM2
    "starcoder": _DIGITS, "refact": _DIGITS,  # StarCoder, Granite 3
    "codeshell": _DIGITS, "exaone": _DIGITS, "minerva-7b": _DIGITS,
    "command-r": _Rule(_DIGITS.steps, nfc=True),
    "gpt-2": _GPT2, "phi-2": _GPT2,
    "olmo": _Rule(_GPT2.steps, nfc=True), "mpt": _Rule(_GPT2.steps, nfc=True),
    "tekken": _regex(_cased("", r"\p{N}"), ignore_merges=True, first=True),  # Mistral Nemo, Mistral Small 3
    "gpt-4o": _regex(_O200K),  # Phi-4-mini
    "llama4": _regex(_O200K, ignore_merges=True),
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-v3": _regex(
        r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "falcon": _FALCON,
}  # fmt: skip
#: The only rule that models of an architecture have, for files that name none or 'default'.
_BY_ARCHITECTURE = {
    "gpt2": "gpt-2", "phi2": "gpt-2", "qwen2": "qwen2", "qwen2moe": "qwen2", "qwen3": "qwen2", "qwen3moe": "qwen2",
    "command-r": "command-r", "starcoder": "starcoder", "starcoder2": "starcoder", "olmo": "olmo", "olmo2": "dbrx",
}  # fmt: skip


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
        ExportError: no tokens, lists of different lengths, an id that is no token, or a token that is not UTF-8.
    """
    tokens = metadata.get(f"{_KEY}tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ExportError(
            f"the GGUF file has no vocabulary ({_KEY}tokens is {_short(tokens)}); convert the model again, or give its "
            "Hugging Face folder"
        )
    for number, token in enumerate(tokens):
        if not token.isascii() and any("\ud800" <= character <= "\udfff" for character in token):
            raise ExportError(f"token {number} of the GGUF file is not UTF-8: {token!r:.60}; convert the model again")
    types = metadata.get(f"{_KEY}token_type")
    if types is None:
        types = [1] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens) or not all(isinstance(kind, int) for kind in types):
        raise ExportError(
            f"{_KEY}token_type of the GGUF file is {_short(types)}, expected {len(tokens)} numbers, one a token; "
            "convert the model again"
        )
    special = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        value = metadata.get(f"{_KEY}{name}_token_id")
        if value is None or value == 0xFFFFFFFF:  # how some converters write "none"
            continue
        if type(value) is not int or not 0 <= value < len(tokens):
            raise ExportError(
                f"{_KEY}{name}_token_id of the GGUF file is {value!r:.40}, expected an id below {len(tokens)}; "
                "convert the model again"
            )
        special[name] = value
    if metadata.get(f"{_KEY}model") == "llama" and len(tokens) > 2:  # llama.cpp's defaults
        for name, number in (("bos", 1), ("eos", 2)):
            if types[number] == CONTROL:
                special.setdefault(name, number)
    return Vocabulary(tokens, types, special)


def gguf_tokenizer(metadata: Mapping[str, Any]) -> State:
    """The `tokenizer.json` of a GGUF model, whose ids are those of the model's Hugging Face tokenizer.

    Control tokens and the unknown token are added tokens that are special, user-defined ones are added tokens that
    stay in decoded text; no id lies beyond the token list. `encode(text, add_special_tokens=True)` puts the first
    token before the text where `tokenizer.ggml.add_bos_token` says so (by default as llama.cpp does).

    Args:
        metadata: of `gguf_file.read_gguf`.

    Returns:
        A dictionary that `tokenizers.Tokenizer.from_str(json.dumps(...))` takes.

    Raises:
        ExportError: a kind of tokenizer or a pre-tokenizer that is not known, or a damaged vocabulary.
    """
    vocabulary = read_vocabulary(metadata)
    kind = metadata.get(f"{_KEY}model")
    if kind == "gpt2":
        state, first = _byte_level_bpe(metadata, vocabulary)
    elif kind == "llama":
        state, first = _sentencepiece(metadata, vocabulary)
    else:
        raise ExportError(
            f"the GGUF file has a tokenizer of the kind {kind!r:.40}; 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece) are known; give the model's Hugging Face folder"
        )
    ends = [vocabulary.special.get(name) for name in ("bos", "eos")]
    added = (metadata.get(f"{_KEY}add_bos_token", first), metadata.get(f"{_KEY}add_eos_token", False))
    names = [
        None if token is None or not add else vocabulary.tokens[token] for token, add in zip(ends, added, strict=True)
    ]
    return state | {"post_processor": template_processing(*zip(names, ends, strict=True))}


def template_processing(first: tuple[str | None, int | None], last: tuple[str | None, int | None]) -> State | None:
    """A post-processor that puts a token before and after each text; None where there is neither.

    Args:
        first: text and id of the token; no text means none.
        last: the same.
    """
    if first[0] is None and last[0] is None:
        return None

    def around(name: str, kind: int) -> list[State]:
        steps: list[State] = [{"Sequence": {"id": name, "type_id": kind}}]
        if first[0] is not None:
            steps.insert(0, {"SpecialToken": {"id": first[0], "type_id": kind}})
        if last[0] is not None:
            steps.append({"SpecialToken": {"id": last[0], "type_id": kind}})
        return steps

    tokens = {text: {"id": text, "ids": [token], "tokens": [text]} for text, token in (first, last) if text is not None}
    single = around("A", 0)
    return {
        "type": "TemplateProcessing", "single": single, "pair": [*single, *around("B", 1)], "special_tokens": tokens,
    }  # fmt: skip


def _byte_level_bpe(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[State, bool]:
    rule = _rule(metadata, vocabulary)
    ids = _ids(vocabulary, lambda token, kind: kind != UNUSED)
    merges = _merges(metadata)
    if merges is None:
        raise ExportError(f"the GGUF file has no {_KEY}merges, which 'gpt2' tokenizers need; convert the model again")
    lost = next((m for m in merges if m[0] not in ids or m[1] not in ids or m[0] + m[1] not in ids), None)
    if lost is not None:
        raise ExportError(
            f"{_KEY}merges of the GGUF file joins {lost[0]!r:.50} and {lost[1]!r:.50}, which are or make no token; "
            "convert the model again"
        )
    steps = list(rule.steps)
    return (
        {
            **_EMPTY, "added_tokens": _added(vocabulary, ids),
            "normalizer": {"type": "NFC"} if rule.nfc else None,
            "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": _bpe(ids, merges, ignore_merges=rule.ignore_merges),
        },
        rule.first,
    )  # fmt: skip


def _ids(vocabulary: Vocabulary, kept: Callable[[str, int], bool]) -> dict[str, int]:
    """Ids of the tokens that are kept. Of two with one text, the one that is matched in the text counts."""
    ids: dict[str, int] = {}
    for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kept(token, kind) and (
            token not in ids or (kind in _MATCHED and vocabulary.types[ids[token]] not in _MATCHED)
        ):
            ids[token] = number
    return ids


def _rule(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> _Rule:
    name = metadata.get(f"{_KEY}pre")
    if name in (None, "", "default"):
        name = _guess(metadata, vocabulary)
    rule = PRE_TOKENIZERS.get(str(name))
    if rule is not None:
        return rule
    raise ExportError(
        f"the GGUF file names the pre-tokenizer {metadata.get(f'{_KEY}pre')!r:.60} ({_KEY}pre), which is not known "
        f"here; known: {', '.join(sorted(PRE_TOKENIZERS))}; give the model's Hugging Face folder, or convert it with a "
        "newer llama.cpp"
    )


def _guess(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> str | None:
    """The rule of a file that names none, where its architecture or its special tokens leave only one."""
    architecture = metadata.get("general.architecture")
    if architecture == "llama":
        tokens = vocabulary.tokens
        if len(tokens) > 128000 and tokens[128000] == "<|begin_of_text|>":
            return "llama-bpe"
        return "smollm" if tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] else None
    return _BY_ARCHITECTURE.get(str(architecture))


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[State, bool]:
    """As `LlamaTokenizerFast` and `GemmaTokenizerFast` are: BPE over the whole text, unknown characters as bytes."""
    architecture = str(metadata.get("general.architecture", ""))
    gemma = architecture.startswith("gemma")
    prefix = bool(metadata.get(f"{_KEY}add_space_prefix", not gemma))
    # converters write the spaces of user-defined tokens as such; in the vocabulary they are SentencePiece's
    tokens = [
        _SPACE * len(token) if kind == USER_DEFINED and token.strip(" ") == "" else token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]
    spaced = Vocabulary(tokens, vocabulary.types, vocabulary.special)
    ids = _ids(spaced, lambda token, kind: kind != UNUSED or not _FILLER.match(token))
    if gemma and "\t" not in ids and "<0x09>" in ids:  # as transformers does for Gemma 1 and 2
        ids["\t"] = ids.pop("<0x09>")
    merges = _merges(metadata)
    if merges is None:
        merges = merges_of_scores(ids, _scores(metadata, vocabulary))
    else:
        merges = [pair for pair in merges if pair[0] in ids and pair[1] in ids and pair[0] + pair[1] in ids]
    unknown = vocabulary.special.get("unknown", 0)
    replace: State = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    normalizer, strip = replace, []
    if prefix:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, replace]}
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        *strip,
    ]  # fmt: skip
    return (
        {
            **_EMPTY, "added_tokens": _added(spaced, ids, strips=_strips_right(architecture)),
            "normalizer": normalizer, "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": _bpe(ids, merges, unknown=tokens[unknown], byte_fallback=True),
        },
        True,
    )  # fmt: skip


def merges_of_scores(ids: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Merges of a SentencePiece vocabulary: all ways to join two tokens to one, by the score of what they make.

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


def _scores(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> list[float]:
    """Scores by id. SentencePiece gives user-defined tokens 0; converters write what they like there."""
    scores = metadata.get(f"{_KEY}scores")
    numbers = isinstance(scores, list) and all(isinstance(score, (int, float)) for score in scores)
    if not isinstance(scores, list) or not numbers or len(scores) != len(vocabulary.tokens):
        raise ExportError(
            f"{_KEY}scores of the GGUF file is {_short(scores)}, expected {len(vocabulary.tokens)} numbers, one a "
            "token; convert the model again"
        )
    return [0.0 if kind == USER_DEFINED else float(score) for score, kind in zip(scores, vocabulary.types, strict=True)]


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    """The pairs that the file lists, None where it lists none."""
    listed = metadata.get(f"{_KEY}merges")
    if not listed:
        return None
    if not isinstance(listed, list):
        raise ExportError(f"{_KEY}merges of the GGUF file is {_short(listed)}, expected a list; convert it again")
    pairs = []
    for number, merge in enumerate(listed):
        cut = merge.find(" ", 1) if isinstance(merge, str) else -1
        if cut < 0:
            raise ExportError(
                f"{_KEY}merges[{number}] of the GGUF file is {merge!r:.60}, expected two tokens with a space between "
                "them; convert the model again"
            )
        pairs.append((merge[:cut], merge[cut + 1 :]))
    return pairs


def _added(vocabulary: Vocabulary, ids: Mapping[str, int], *, strips: bool = False) -> list[State]:
    """Tokens that are matched in the text before anything else."""
    rows = []
    for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in _MATCHED and token and ids.get(token) == number:
            right = strips and kind in (CONTROL, USER_DEFINED) and token not in _NEVER_STRIPS
            rows.append(
                {
                    "id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": right,
                    "normalized": False, "special": kind != USER_DEFINED,
                }
            )  # fmt: skip
    return rows


#: Tokens of Phi-3 that keep the white space behind them.
_NEVER_STRIPS = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def _strips_right(architecture: str) -> bool:
    """Whether special tokens take the white space behind them, as Phi-3's do; GGUF has no field for it."""
    return architecture == "phi3"


def _bpe(
    ids: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    unknown: str | None = None,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> State:
    return {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": byte_fallback, "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges, "vocab": dict(ids), "merges": [list(pair) for pair in merges],
    }  # fmt: skip


_EMPTY: State = {"version": "1.0", "truncation": None, "padding": None}


def _short(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else f"{value!r:.40}"
