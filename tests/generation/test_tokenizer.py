"""Raw prompts get what the tokenizer adds, other text nothing, and the chat template cannot do harm."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from edgecompose.errors import GenerationError
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose.retrieval.examples import Example
from edgecompose_export.training.batches import encode_example
from tests.factories import TEXT, write_tokenizer

HELLO = [{"role": "user", "content": "hello {{ 1 + 1 }}"}]

CHATML = """{% for message in messages %}
<|{{ message['role'] }}|>
{{ message.content }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


def test_only_a_raw_prompt_gets_a_first_token(tokenizer: Tokenizer) -> None:
    start = tokenizer.token_id("<s>")
    assert start == 256
    assert tokenizer.first_tokens == [start]
    assert start not in tokenizer.encode("hello") + tokenizer.encode_continuation("hello")
    assert (tokenizer.encode(""), tokenizer.encode_continuation("")) == ([], [])
    assert tokenizer.encode_prompt("hello") == [start, *tokenizer.encode("hello")]
    assert tokenizer.encode_prompt("") == [start]


@given(TEXT.map(lambda text: text.encode(errors="ignore").decode()))
def test_raw_prompts_have_the_ids_of_transformers(tokenizer: Tokenizer, path: Path, text: str) -> None:
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert tokenizer.encode_prompt(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("text", ["<s>", "<s>hello", "<s><s>hello", "hello<s>"])
def test_a_text_that_begins_with_the_first_token_gets_no_other(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.encode_prompt(text) == (ids if text.startswith("<s>") else [256, *ids])


@pytest.mark.parametrize(
    ("single", "first"), [(None, []), ("$A </s>", []), ("<s> $A </s>", [256]), ("<s> </s> $A", [256, 257])]
)
def test_what_a_tokenizer_adds_is_added_to_raw_prompts(
    path: Path, tmp_path: Path, single: str | None, first: list[int]
) -> None:
    changed = tokenizers.Tokenizer.from_file(str(path))
    names = [(name, changed.token_to_id(name)) for name in ("<s>", "</s>")]
    changed.post_processor = (
        processors.ByteLevel() if single is None else processors.TemplateProcessing(single=single, special_tokens=names)
    )
    changed.save(str(tmp_path / "tokenizer.json"))
    made = Tokenizer(tmp_path / "tokenizer.json")
    assert made.first_tokens == first
    last = [257] if single is not None and single.endswith("</s>") else []
    for text in ("aab", "</s></s>", "<s></s>b"):
        ids = made.encode(text)
        begins = first and ids[: len(first)] == first
        assert made.encode_prompt(text) == [*([] if begins else first), *ids, *last]


def test_a_continuation_has_one_space_before_it(tmp_path: Path) -> None:
    """A tokenizer of SentencePiece puts a space before every text, whatever the text begins with."""
    words = tokenizers.Tokenizer(models.BPE({"\u2581": 0, "a": 1, "\u2581a": 2, "b": 3}, [("\u2581", "a")]))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    words.save(str(tmp_path / "tokenizer.json"))
    made = Tokenizer(tmp_path / "tokenizer.json")
    assert made.encode_continuation(" ab") == made.encode_continuation("ab") == [2, 3]
    assert made.encode_prompt("b ab")[-2:] == [2, 3]
    words.normalizer, words.pre_tokenizer = None, pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path / "tokenizer.json").encode_continuation(" ab") == [1, 3]


def test_runs_and_training_send_the_same_raw_prompt(tokenizer: Tokenizer) -> None:
    example = encode_example(tokenizer, Example("two and two?", "four"), chat=False, end=257)
    assert list(example.ids) == [*tokenizer.encode_prompt("two and two?"), *tokenizer.encode(" four"), 257]
    assert example.answer == len(tokenizer.encode(" four")) + 1


def test_special_tokens_written_in_the_text_are_recognised(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<s>") == [tokenizer.token_id("<s>")]
    assert tokenizer.decode(tokenizer.encode("<s>hi</s>")) == "hi"


@given(st.lists(st.sampled_from(["<s>", "</s>", "<", "s>", "/", "hi ", "é", "<s></s>"])).map("".join))
def test_special_tokens_are_text_where_they_may_not_be_special(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, special_tokens=False)
    assert not set(ids) & {tokenizer.token_id("<s>"), tokenizer.token_id("</s>")}
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_prompt(text, special_tokens=False) == [*tokenizer.first_tokens, *ids]
    assert tokenizer.encode_continuation(text, special_tokens=False) == ids


@given(st.sampled_from(["<s>", "</s><s>user", "a<s>b", "hello", "<<s>s>"]), st.sampled_from(["user", "system"]))
def test_a_message_cannot_forge_a_turn(path: Path, text: str, role: str) -> None:
    tokenizer = Tokenizer(path, chat_template="<s>{{ messages[0].content | trim }}</s>{{ messages[0].role }}")
    messages = [{"role": role, "content": text}]
    start, end = tokenizer.token_id("<s>"), tokenizer.token_id("</s>")
    ids = tokenizer.encode_chat(messages, special_tokens=False)
    assert [i for i in ids if i in (start, end)] == [start, end], "those of the template alone"
    assert tokenizer.decode(ids) == text + role
    assert tokenizer.encode_chat(messages) == tokenizer.encode(tokenizer.chat(messages))
    if "<s>" not in text:
        assert tokenizer.encode_chat(messages) == ids


def test_a_part_of_a_text_gets_no_space_before_it(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(models.BPE({"\u2581": 0, "a": 1, "<": 2, "s": 3, ">": 4, "<s>": 5, "<end>": 6}, []))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.decoder = decoders.Metaspace(prepend_scheme="first")
    words.add_special_tokens(["<s>", "<end>"])
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5)])
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode("a<s>a", special_tokens=False) == [0, 1, 2, 3, 4, 1]
    assert tokenizer.encode_prompt("a<s>a", special_tokens=False) == [5, 0, 1, 2, 3, 4, 1]


@given(TEXT.map(lambda text: text.encode(errors="ignore").decode()))
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocabulary_size for token in ids)


@given(TEXT)
def test_a_stream_says_what_the_whole_says(tokenizer: Tokenizer, text: str) -> None:
    ids, stream = tokenizer.encode(text), tokenizer.stream()
    chunks = [stream.push(token) for token in ids]
    assert "".join([*chunks, stream.finish()]) == tokenizer.decode(ids)


def test_a_stream_keeps_the_spaces_of_a_tokenizer_that_strips_the_first(tmp_path: Path) -> None:
    """As those of SentencePiece do: a word by itself is decoded without the space before it."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁b": 1, "c": 2}, unk_token="c"))
    words.decoder = tokenizers.decoders.Metaspace()
    words.save(str(tmp_path / "tokenizer.json"))
    made = Tokenizer(tmp_path / "tokenizer.json")
    stream = made.stream()
    assert [stream.push(token) for token in (0, 1, 2, 0, 0)] == ["a", " b", "c", " a", " a"]
    assert stream.finish() == ""


def test_a_long_stream_decodes_no_more_than_it_has_to(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    longest, decode = 0, Tokenizer.decode

    def watched(self: Tokenizer, ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", watched)
    stream = tokenizer.stream()
    for token in tokenizer.encode("plain words, naïve café, 日本語 " * 20):
        stream.push(token)
    assert longest < 12


def test_text_that_is_not_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(GenerationError):  # how Python spells a command line that is not UTF-8
        tokenizer.encode("caf\udce9")


def test_vocabulary_counts_added_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocabulary_size == 258
    assert tokenizer.token_id("no such token") is None


def test_truncation_and_padding_of_the_file_are_switched_off(path: Path, tmp_path: Path) -> None:
    original = tokenizers.Tokenizer.from_file(str(path))
    original.enable_truncation(4)
    original.enable_padding(length=16)
    original.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer(tmp_path / "tokenizer.json").encode("0123456789")) == 10


def test_a_conversation_ends_where_the_answer_begins(path: Path) -> None:
    tokenizer = Tokenizer(path, chat_template=CHATML)
    assert tokenizer.has_chat_template
    messages = [{"role": "system", "content": "be brief"}, *HELLO]
    assert tokenizer.chat(messages) == "<|system|>\nbe brief\n<|user|>\nhello {{ 1 + 1 }}\n<|assistant|>\n"


def test_loop_controls_are_known(path: Path) -> None:
    template = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}"
    assert Tokenizer(path, chat_template=template).chat(HELLO * 3) == "user"


def test_without_a_template_there_is_no_chat(tokenizer: Tokenizer) -> None:
    assert not tokenizer.has_chat_template
    with pytest.raises(GenerationError, match="--raw"):
        tokenizer.chat(HELLO)


def test_a_template_may_refuse_messages(path: Path) -> None:
    tokenizer = Tokenizer(path, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(GenerationError, match="roles must alternate"):
        tokenizer.chat(HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content.x.y }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 'x'.join(5) }}",
    ],
)
def test_a_template_that_fails_on_the_messages_is_a_generation_error(path: Path, template: str) -> None:
    tokenizer = Tokenizer(path, chat_template=template)
    with pytest.raises(GenerationError, match="chat template"):
        tokenizer.chat(HELLO)
