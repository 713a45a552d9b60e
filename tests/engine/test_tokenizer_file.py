"""Opening a tokenizer.json, and encoding the ends of long texts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from edgecompose.cancellation import Cancellation
from edgecompose.engine import tokenizer_file
from edgecompose.engine.tokenizer_file import encode_ends, encode_text, longest_token, open_tokenizer
from edgecompose.errors import BundleError, PromptTooLong, RetrievalError
from edgecompose.generation.encoding import ConversationEncoder
from edgecompose.generation.messages import Message
from edgecompose.generation.tokenizer import Tokenizer
from tests.factories import write_tokenizer

HELLO = [{"role": "user", "content": "hello {{ 1 + 1 }}"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages", "{% for m in messages %}", "{{ " + "(" * 3000 + " }}"])
def test_a_malformed_template_is_a_bundle_error(path: Path, template: str) -> None:
    with pytest.raises(BundleError, match="chat template"):
        Tokenizer(path, chat_template=template).chat(HELLO)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_malformed_tokenizer_is_a_bundle_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json' cannot be read"):
        Tokenizer(path)


def test_an_absent_tokenizer_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"absent\.json' cannot be read"):
        Tokenizer(tmp_path / "absent.json")


def _word_piece() -> tokenizers.Tokenizer:
    """As BERT's: words between blanks and punctuation, and one token for a word that is long or unknown."""
    pieces = [f"{start}{letter}" for start in ("", "##") for letter in "abcdefghé中"] + list("., !")
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "[CLS]", "[SEP]", *pieces])}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=10))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=names)
    return tokenizer


def _byte_level() -> tokenizers.Tokenizer:
    """As GPT-2's: a word takes the blank before it, and several blanks in a row lose their last one to it."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("a", "b"), ("Ġ", "ab"), ("ab", "ab"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("c", "d"), ("Ġ", "cd")]
    for one, other in merges:
        alphabet.setdefault(one + other, len(alphabet))
    tokenizer = tokenizers.Tokenizer(models.BPE(alphabet, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def _unigram() -> tokenizers.Tokenizer:
    """As that of XLM-R: a space before the text, and the most probable parts."""
    scores = [("<unk>", -9.0), ("▁", -3.0), ("▁ab", -2.0), ("ab", -2.5), ("abc", -2.7)]
    scores += [(letter, -4.0) for letter in "abcdefghé中.,!"]
    tokenizer = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


ENDS = {"WordPiece": _word_piece(), "byte-level BPE": _byte_level(), "Unigram": _unigram()}
_WORDS = st.text("abcdefghé中ABC.,!'0", min_size=1, max_size=14)
_BLANKS = st.sampled_from([" ", " ", " ", "  ", "   ", "\n", "\n\n", " \n ", "\t", ". ", "!\n", "\u3000", "\u0301 "])
LONG_TEXTS = st.lists(st.tuples(_WORDS, _BLANKS), min_size=40, max_size=150).map(
    lambda pairs: "".join(word + blank for word, blank in pairs)
)


@pytest.mark.parametrize("kind", ENDS)
@settings(max_examples=60)
@given(text=LONG_TEXTS, limit=st.integers(4, 12), first=st.integers(1, 8))
def test_the_ends_of_a_text_are_those_of_the_whole(kind: str, text: str, limit: int, first: int) -> None:
    tokenizer = ENDS[kind]
    whole = tokenizer.encode(text).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_file, "_FIRST_WINDOW", first)
        ends = encode_ends(tokenizer, text, limit, RetrievalError)
    assert ends[: limit // 2] == whole[: limit // 2]
    assert ends[-(limit - limit // 2) :] == whole[-(limit - limit // 2) :]
    assert len(ends) == len(whole) or len(ends) >= limit


@pytest.mark.parametrize("unit", ["one two three. ", "a", " ", "中文", "\n", "<s>", "a" * 90 + " "])
def test_a_text_of_many_megabytes_costs_what_its_ends_cost(unit: str) -> None:
    """Its tokens would take seconds and gigabytes."""
    text = "the first words " + unit * (20_000_000 // len(unit)) + " the last words"
    before = time.process_time()
    ids = encode_ends(ENDS["WordPiece"], text, 256, RetrievalError)
    assert time.process_time() - before < 10
    assert len(ids) < 1_100_000
    short = ENDS["WordPiece"].encode("the first words " + unit * (20_000 // len(unit)) + " the last words").ids
    assert (ids[:4], ids[-4:]) == (short[:4], short[-4:])


def test_half_a_surrogate_pair_is_named_with_its_place() -> None:
    with pytest.raises(RetrievalError, match=r"not valid Unicode: at character 25, '.*\\ud83d"):
        encode_text(ENDS["WordPiece"], "x" * 25 + "\ud83d" + "y" * 99, RetrievalError)


def _without_unknown(path: Path) -> None:
    state = json.loads(_word_piece().to_str())
    del state["model"]["vocab"]["[UNK]"]
    path.write_text(json.dumps(state), encoding="utf-8")


def _panicking(path: Path) -> None:
    """A table of a normalizer that points beyond its end."""
    state = json.loads(_word_piece().to_str())
    state["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AQAAAA=="}
    path.write_text(json.dumps(state), encoding="utf-8")


@pytest.mark.parametrize("damage", [_without_unknown, _panicking])
def test_a_tokenizer_that_fails_on_a_text_is_a_bundle_error(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "tokenizer.json"
    damage(path)
    with pytest.raises(BundleError, match="tokenizer") as caught:
        encode_text(open_tokenizer(path), "zebra", RetrievalError)
    assert "\n" not in str(caught.value)


def test_an_id_that_the_base_lacks_is_a_bundle_error(path: Path) -> None:
    assert Tokenizer(path, vocabulary=258).encode("<s>a") == Tokenizer(path).encode("<s>a")
    with pytest.raises(BundleError, match="gives the token id 256, the base has 200 tokens"):
        Tokenizer(path, vocabulary=200).encode("<s>a")


def test_the_longest_token_bounds_what_a_context_holds() -> None:
    tokenizer = _byte_level()
    assert longest_token(tokenizer) == 4
    tokenizer.normalizer = normalizers.NFC()
    assert longest_token(tokenizer) == 16
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    assert longest_token(tokenizer) == 4
    for normalizer in (normalizers.Strip(), normalizers.Replace("  ", " "), normalizers.StripAccents()):
        tokenizer.normalizer = normalizer
        assert longest_token(tokenizer) is None
    assert longest_token(_word_piece()) is longest_token(_unigram()) is None
    stripping = _byte_level()
    stripping.add_special_tokens([tokenizers.AddedToken("<end>", rstrip=True)])
    assert longest_token(stripping) is None


@settings(max_examples=60)
@given(text=LONG_TEXTS)
def test_a_text_has_as_many_tokens_as_the_longest_allows(text: str) -> None:
    tokenizer = _byte_level()
    tokenizer.normalizer = normalizers.NFC()
    longest = longest_token(tokenizer)
    assert longest is not None and len(tokenizer.encode(text).ids) * longest >= len(text)


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(path: Path) -> None:
    small = Tokenizer(path, context=64)
    text = "x" * 100_000_000
    before = time.process_time()
    with pytest.raises(PromptTooLong, match=r"the text has 100000000 characters, the 64 tokens of the base's context"):
        small.encode(text)
    encoder = ConversationEncoder(small, raw=True, special_tokens=True, cancellation=Cancellation())
    with pytest.raises(PromptTooLong):
        encoder.encode([Message("user", text)], 60, overflow="refuse")
    kept = encoder.encode([Message("user", text + "the end")], 60, overflow="truncate")
    assert time.process_time() - before < 20
    assert small.decode(kept.ids).endswith("xxthe end") and len(kept.ids) <= 60
    assert small.encode("y" * 60_000) == Tokenizer(path).encode("y" * 60_000)
