"""A GGUF file's tokenizer gives the ids of the Hugging Face tokenizer of the same model."""

from __future__ import annotations

import functools
import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import generate_merges
from transformers.models.gemma import GemmaTokenizer
from transformers.models.llama import LlamaTokenizer

from edgecompose.errors import ExportError
from edgecompose.formats.gguf_file import read_gguf
from edgecompose_export.tokenizer.gguf import gguf_tokenizer, merges_of_scores
from edgecompose_export.tokenizer.pre_tokenizers import PRE_TOKENIZERS

REAL = sorted((Path(__file__).parents[2] / "build" / "models").glob("**/*.gguf"))
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

# Byte-level BPE: what the tokenizer.json of each model has, in its own words.

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
NFC = normalizers.NFC()


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
    pieces = (piece + after for piece in PIECES for after in ("", *PIECES))
    made.train_from_iterator([CORPUS, CORPUS[::-1], *pieces], trainer)
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


def _load(metadata: dict[str, Any]) -> Any:
    return tokenizers.Tokenizer.from_str(json.dumps(gguf_tokenizer(metadata)))


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
    return _load(_metadata(pre, add_bos_token=False)), transformers.PreTrainedTokenizerFast(tokenizer_object=theirs)


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
    made, words = _load(_metadata("qwen2")), len(_words()[0])
    ids = made.encode("<think>\n\n</think>\n\n<|two|>").ids
    assert (ids[0], ids[-1]) == (words + 3, words + 2)
    assert made.decode(ids) == "<think>\n\n</think>\n\n"
    assert max(made.get_vocab(with_added_tokens=True).values()) == words + 4


def test_rows_that_fill_the_embedding_are_no_tokens() -> None:
    made = _load(_metadata("qwen2"))
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
    made, words = _load(_metadata(pre, **changes)), len(_words()[0])
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


# SentencePiece


@functools.cache
def _sentencepiece(*, gemma: bool) -> tuple[bytes, dict[str, Any]]:
    """A small model as Llama's or Gemma's is trained, and the same as a GGUF file would describe it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    out, ids = io.BytesIO(), (3, 2, 1, 0) if gemma else (0, 1, 2, -1)
    spaces = ["▁" * count for count in range(2, 9)]
    user = ["<mask>", *("\n" * n for n in range(1, 5)), *spaces, "<h1>"] if gemma else ["<mask>"]
    lines = [line for line in (CORPUS + "".join(PIECES)).replace("\r", "").split("\n") if line] * 3
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.98,
        unk_id=ids[0],
        bos_id=ids[1],
        eos_id=ids[2],
        pad_id=ids[3],
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=not gemma,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=user,
        control_symbols=["<start_of_turn>"],
        hard_vocab_limit=False,
        minloglevel=2,
        **({"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"} if gemma else {}),
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    count = model.get_piece_size()
    pieces = [model.id_to_piece(i) for i in range(count)]
    kinds = [
        2 if model.is_unknown(i) else 6 if model.is_byte(i) else 3 if model.is_control(i) else 4 if p in user else 1
        for i, p in enumerate(pieces)
    ]
    metadata = {
        "general.architecture": "gemma3" if gemma else "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.token_type": kinds,
        # as llama.cpp's converter writes user-defined ones
        "tokenizer.ggml.tokens": [p.replace("▁", " ") if k == 4 else p for p, k in zip(pieces, kinds, strict=True)],
        "tokenizer.ggml.scores": [-1000.0 if k == 4 else model.get_score(i) for i, k in enumerate(kinds)],
        "tokenizer.ggml.unknown_token_id": ids[0],
        "tokenizer.ggml.bos_token_id": ids[1],
        "tokenizer.ggml.eos_token_id": ids[2],
        "tokenizer.ggml.add_space_prefix": not gemma,
    }
    return out.getvalue(), metadata


@functools.cache
def _sentencepiece_pair(folder: Path, *, gemma: bool) -> tuple[Any, Any]:
    content, metadata = _sentencepiece(gemma=gemma)
    path = folder / f"{'gemma' if gemma else 'llama'}.model"
    path.write_bytes(content)
    if gemma:
        theirs: Any = transformers.GemmaTokenizerFast.from_pretrained(_as_folder(path, GemmaTokenizer(str(path))))
    else:
        theirs = transformers.LlamaTokenizerFast.from_pretrained(
            _as_folder(path, LlamaTokenizer(str(path), legacy=True, add_bos_token=True))
        )
    return _load(metadata), theirs


def _as_folder(path: Path, slow: Any) -> Path:
    folder = path.with_suffix("")
    slow.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentencepieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sentencepiece")


@pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])
@given(text=TEXTS)
def test_ids_of_scores_are_those_of_transformers(sentencepieces: Path, gemma: bool, text: str) -> None:
    ours, theirs = _sentencepiece_pair(sentencepieces, gemma=gemma)
    text = text.replace("\x00", "")  # SentencePiece reads up to it
    ids = ours.encode(text).ids
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize(
    "text",
    [
        CORPUS,
        "".join(PIECES),
        "a   b",
        "    x",
        "x" + " " * 20 + "y",
        "\n\n\n\n\n\n",
        "",
        " ",
        "<start_of_turn>user\nhi",
        "<s>a<mask> b",
        "<h1>x</h1>",
        "a\t\tb",
        "▁▁a ▁b",
        "½漢字😀",
    ],
)
def test_these_texts_have_the_same_ids(sentencepieces: Path, gemma: bool, text: str) -> None:
    ours, theirs = _sentencepiece_pair(sentencepieces, gemma=gemma)
    assert ours.encode(text).ids == theirs(text)["input_ids"]


def test_scores_give_the_same_merges_as_transformers() -> None:
    _, metadata = _sentencepiece(gemma=False)
    ids = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    theirs = generate_merges(ids, [(token, scores[number]) for token, number in ids.items()])
    assert merges_of_scores(ids, scores) == theirs


def test_scores_that_are_no_scores_are_refused() -> None:
    _, metadata = _sentencepiece(gemma=False)
    with pytest.raises(ExportError, match=r"scores .* is a list of 1, expected"):
        gguf_tokenizer(metadata | {"tokenizer.ggml.scores": [0.0]})


def test_special_tokens_of_phi3_take_the_space_behind_them() -> None:
    _, metadata = _sentencepiece(gemma=False)
    made = _load(metadata | {"general.architecture": "phi3"})
    assert made.encode("<start_of_turn>  \n a").ids == made.encode("<start_of_turn>a").ids


# Real files


@pytest.mark.parametrize("path", REAL or [None], ids=[p.name for p in REAL] or ["none"])
def test_real_files_have_the_ids_of_llama_cpp(path: Path | None) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    if path is None:
        pytest.skip("no GGUF model under build/models")
    ours = _load(dict(read_gguf(path).metadata))
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    texts = [first + then + last for first in PIECES for then in PIECES[::5] for last in PIECES[::9]]
    for text in texts:
        text = unicodedata.normalize("NFC", text).replace("\x00", "").replace("</s>", "")
        if text:  # llama.cpp takes </s> for a special token wherever it is in the vocabulary
            assert ours.encode(text).ids == theirs.tokenize(text.encode(), add_bos=True, special=True), text
