"""A GGUF file's tokenizer gives the ids of the Hugging Face tokenizer of the same model."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from edgecompose.errors import ExportError
from edgecompose_export.tokenizer.gguf import gguf_tokenizer
from edgecompose_export.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from tests.export.gguf_vocabularies import CORPUS, NFC, PIECES, SPECIAL, TEXTS, USER, load

pytestmark = pytest.mark.slow

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SEED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
BYTES, GPT2 = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=flag) for flag in (False, True))


def _isolated(*patterns: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


def _kept(pattern: str) -> list[Any]:
    """How conversions of tiktoken vocabularies write the same."""
    return [pre_tokenizers.Split(Regex(pattern), "removed", invert=True)]


DIGITS = [pre_tokenizers.Digits(individual_digits=True), GPT2]
_LLAMA3 = (None, [*_isolated(LLAMA3), BYTES], True)
#: Normalizer, pre-tokenizers, and whether whole words skip the merges.
THEIRS: dict[str, tuple[Any, list[Any], bool]] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), _LLAMA3),
    "lfm2": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "glm4": _LLAMA3,
    "chatglm-bpe": _LLAMA3,
    "dbrx": (None, [*_kept(LLAMA3), BYTES], False),
    "qwen2": (NFC, [*_isolated(QWEN2), BYTES], False),
    "deepseek-r1-qwen": (NFC, [*_isolated(QWEN2), BYTES], False),
    "qwen35": (NFC, [*_isolated(QWEN35), BYTES], False),
    "stablelm2": (None, [*_isolated(QWEN2), BYTES], False),
    "seed-coder": (None, [*_isolated(SEED), BYTES], False),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"), (None, DIGITS, False)),
    "command-r": (NFC, DIGITS, False),
    "gpt-2": (None, [GPT2], False),
    "phi-2": (None, [GPT2], False),
    "olmo": (NFC, [GPT2], False),
    "mpt": (NFC, [GPT2], False),
    "tekken": (None, [*_isolated(TEKKEN), BYTES], True),
    "gpt-4o": (None, [*_kept(O200K), BYTES], False),
    "llama4": (None, [*_isolated(O200K), BYTES], True),
    "deepseek-coder": (
        None,
        [
            *_isolated(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"),
            pre_tokenizers.Digits(individual_digits=True),
            BYTES,
        ],
        False,
    ),
    "deepseek-v3": (None, [*_isolated(r"\p{N}{1,3}", "[一-龥\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK3), BYTES], False),
    "falcon": (
        None,
        [
            pre_tokenizers.Punctuation("contiguous"),
            GPT2,
            pre_tokenizers.Digits(individual_digits=False),
            *_isolated("[0-9][0-9][0-9]"),
        ],
        False,
    ),
}


@functools.cache
def _words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary whose merges heed no boundary, so that another way of cutting gives other ids."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, max_token_length=12
    )
    chunks = (chunk + after for chunk in PIECES for after in ("", *PIECES))
    made.train_from_iterator([CORPUS, CORPUS[::-1], *chunks], trainer)
    model = json.loads(made.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    words += ["Ġunreachable", "hellohello"]  # no merge makes them
    return {word: i for i, word in enumerate(words)}, [(left, right) for left, right in model["merges"]]


def _metadata(pre: str | None, /, **changes: Any) -> dict[str, Any]:
    words, merges = _words()
    tokens = [*words, "[PAD0]", *SPECIAL, *USER]
    types = [1] * len(words) + [5, 3, 3, 4, 4]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": len(words) + 1,
        "tokenizer.ggml.eos_token_id": len(words) + 2,
    }
    changed = metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return {name: value for name, value in changed.items() if value is not None}


@functools.cache
def _pair(pre: str) -> tuple[Any, Any]:
    """Ours and transformers', for one pre-tokenizer."""
    words, merges = _words()
    normalizer, steps, ignore = THEIRS[pre]
    theirs = tokenizers.Tokenizer(models.BPE(words, merges, ignore_merges=ignore))
    if normalizer is not None:
        theirs.normalizer = normalizer
    theirs.pre_tokenizer = pre_tokenizers.Sequence(steps)
    theirs.decoder = decoders.ByteLevel()
    theirs.add_tokens([tokenizers.AddedToken("[PAD0]", normalized=False)])  # only to take its id
    theirs.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in SPECIAL])
    theirs.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in USER])
    return load(_metadata(pre, add_bos_token=False)), transformers.PreTrainedTokenizerFast(tokenizer_object=theirs)


def test_every_rule_is_compared() -> None:
    assert set(THEIRS) == set(PRE_TOKENIZERS)


@pytest.mark.parametrize("pre", sorted(THEIRS))
@given(text=TEXTS)
def test_ids_are_those_of_transformers(pre: str, text: str) -> None:
    ours, theirs = _pair(pre)
    ids = ours.encode(text, add_special_tokens=True).ids
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize("pre", sorted(THEIRS))
def test_a_whole_text_has_the_same_ids(pre: str) -> None:
    ours, theirs = _pair(pre)
    text = CORPUS + " unreachable" + "".join(PIECES)
    assert ours.encode(text).ids == theirs(text)["input_ids"]


def test_rules_differ_where_they_should() -> None:
    """The comparison above would say nothing if the vocabulary hid the rules."""
    text = "a\n\nb 12345.\n\n(c) we'LL HTTPServer हिन्दी"
    ids = {
        tuple(_pair(pre)[0].encode(text).ids) for pre in ("llama-bpe", "qwen2", "smollm", "gpt-2", "tekken", "gpt-4o")
    }
    assert len(ids) == 6
    unreachable = _words()[0]["Ġunreachable"]
    assert _pair("llama-bpe")[0].encode(" unreachable").ids == [unreachable]
    assert unreachable not in _pair("dbrx")[0].encode(" unreachable").ids


def test_added_tokens_have_one_id_and_only_control_tokens_are_special() -> None:
    made, words = load(_metadata("qwen2")), len(_words()[0])
    ids = made.encode("<think>\n\n</think>\n\n<|two|>").ids
    assert (ids[0], ids[-1]) == (words + 3, words + 2)
    assert made.decode(ids) == "<think>\n\n</think>\n\n"
    assert max(made.get_vocab(with_added_tokens=True).values()) == words + 4


def test_rows_that_fill_the_embedding_are_no_tokens() -> None:
    made = load(_metadata("qwen2"))
    assert made.token_to_id("[PAD0]") is None
    assert len(made.encode("[PAD0]").ids) > 1


@pytest.mark.parametrize(
    ("pre", "changes", "ends"),
    [
        ("llama-bpe", {}, (True, False)),
        ("llama-bpe", {"add_bos_token": False}, (False, False)),
        ("qwen2", {}, (False, False)),
        ("qwen2", {"add_bos_token": True}, (True, False)),
        ("tekken", {"add_eos_token": True}, (True, True)),
        ("llama-bpe", {"bos_token_id": None}, (False, False)),
    ],
)
def test_the_first_token_is_as_the_file_or_llama_cpp_says(
    pre: str, changes: dict[str, Any], ends: tuple[bool, bool]
) -> None:
    made, words = load(_metadata(pre, **changes)), len(_words()[0])
    plain, whole = made.encode("hello", add_special_tokens=False).ids, made.encode("hello").ids
    assert whole == [words + 1] * ends[0] + plain + [words + 2] * ends[1]


@pytest.mark.parametrize(
    ("architecture", "pre", "same"),
    [("qwen2", None, "qwen2"), ("qwen3", "default", "qwen2"), ("gpt2", "", "gpt-2"), ("olmo2", "default", "dbrx")],
)
def test_a_file_that_names_no_rule_has_that_of_its_architecture(architecture: str, pre: str | None, same: str) -> None:
    made = gguf_tokenizer(_metadata(pre) | {"general.architecture": architecture})
    assert made["pre_tokenizer"] == gguf_tokenizer(_metadata(same))["pre_tokenizer"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pre": "nobody-knows"},
            r"pre-tokenizer 'nobody-knows'.*expected one of chatglm-bpe, .*llama-bpe.*Hugging Face folder",
        ),
        ({"pre": "default"}, "pre-tokenizer 'default'"),
        ({"pre": ["a"]}, "pre-tokenizer"),
        ({"model": "t5"}, r"kind 't5'.*'gpt2'.*'llama'"),
        ({"model": None}, "kind None"),
        ({"tokens": None}, "no vocabulary"),
        ({"tokens": []}, "no vocabulary"),
        ({"tokens": ["a", 1]}, "no vocabulary"),
        ({"tokens": ["caf\udce9"], "token_type": [1]}, "token 0 .* is not UTF-8"),
        ({"token_type": [1]}, "token_type .*a list of 1, expected"),
        ({"token_type": "x"}, "token_type"),
        ({"eos_token_id": 10**6}, "eos_token_id .* is 1000000, expected an id below"),
        ({"bos_token_id": "x"}, "bos_token_id"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["ab"]}, r"merges\[0\] .* is 'ab', expected two tokens"),
        ({"merges": ["Ġ nowhere"]}, "merges .*'Ġ' and 'nowhere'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        gguf_tokenizer(_metadata("llama-bpe", **changes))


_ODD = (
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.floats()
    | st.sampled_from(["", "a", "default", "gemma", "gpt2"])
)
_KEYS = (
    "model",
    "pre",
    "tokens",
    "token_type",
    "scores",
    "merges",
    "bos_token_id",
    "eos_token_id",
    "unknown_token_id",
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
)


@given(
    kind=st.sampled_from(["gpt2", "llama"]),
    tokens=st.lists(st.sampled_from(["<unk>", "<s>", "</s>", "a", "b", "ab", "", " ", "  ", "▁", "▁a", "é", "<0x09>"])),
    types=st.lists(st.integers(0, 7), min_size=13, max_size=13),
    merges=st.lists(st.sampled_from(["a b", "▁ a", "a  b", " a", "x y", "ab"]), max_size=3),
    changes=st.dictionaries(st.sampled_from(_KEYS), _ODD | st.lists(_ODD, max_size=3), max_size=2),
)
def test_whatever_a_header_says_there_is_a_tokenizer_or_a_refusal(
    kind: str, tokens: list[str], types: list[int], merges: list[str], changes: dict[str, Any]
) -> None:
    values = {
        "model": kind,
        "pre": "qwen2",
        "tokens": tokens,
        "token_type": (types * len(tokens))[: len(tokens)],
        "scores": [-1.0] * len(tokens),
        "merges": merges,
        **changes,
    }
    try:
        made = gguf_tokenizer({f"tokenizer.ggml.{name}": value for name, value in values.items()})
    except ExportError:
        return
    tokenizers.Tokenizer.from_str(json.dumps(made)).encode("a b ab\t")
