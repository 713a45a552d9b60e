"""Encodes text to token ids, and decodes them."""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from edgecompose.engine.memory import release_freed_memory
from edgecompose.engine.tokenizer_file import encode_text, longest_token, open_tokenizer
from edgecompose.errors import BundleError, GenerationError, PromptTooLong
from edgecompose.generation.chat_template import ChatTemplate
from edgecompose.guard.native import native

Message = dict[str, str]
#: The private use area, whose characters no template changes, and how many of them make a mark that no text holds.
_PRIVATE, _MARK_LENGTH = range(0xE000, 0xF900), 8
#: Shorter texts are encoded without a look at how long tokens may be.
_FEWEST_CHARACTERS = 1 << 16


class Tokenizer:
    """A `tokenizer.json`, and the chat template beside it.

    There are four ways to encode: `encode_prompt` adds the first token to a raw prompt, `encode_chat` renders the chat
    template, `encode` adds nothing, and `encode_continuation` encodes text that follows a prompt. With `special_tokens`
    false, special tokens that are written in a text are text: they are cut in two, and the parts encoded on their own.
    """

    def __init__(
        self,
        path: Path,
        *,
        chat_template: str | None = None,
        vocabulary: int | None = None,
        context: int | None = None,
    ) -> None:
        """Open a tokenizer.

        Args:
            chat_template: Jinja; None where the base has none.
            vocabulary: number of tokens that the base has, beyond which an id is an error.
            context: tokens that the base reads at most; a text that certainly has more is refused before it is encoded.
        """
        self._tokenizer, self._vocabulary, self._context = open_tokenizer(path), vocabulary, context
        release_freed_memory()  # reading 262,144 tokens leaves 190 MB that nothing uses
        self._template = None if chat_template is None else ChatTemplate(chat_template)

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be called."""
        return self._template is not None

    @functools.cached_property
    def most_characters(self) -> int | None:
        """Characters that the context of the base holds at most, None where that is not known."""
        longest = None if self._context is None else longest_token(self._tokenizer)
        return None if longest is None or self._context is None else self._context * longest

    def cannot_fit(self, characters: int) -> bool:
        """Whether a text of so many characters certainly exceeds the context of the base."""
        if self._context is None or characters <= _FEWEST_CHARACTERS + 8 * self._context:
            return False  # most texts, without a look at the vocabulary
        return self.most_characters is not None and characters > 2 * self.most_characters  # the template adds some

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, none added.

        Raises:
            GenerationError: `text` is not valid Unicode.
        """
        mark = _new_mark()
        return self._encode_parts([text] if special_tokens else self._marked(text, mark).split(mark))

    def encode_prompt(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a raw prompt, those of transformers' `tokenizer(text)`: with a first token if the base has one.

        A text that begins with that token already keeps one.

        Raises:
            GenerationError: `text` is not valid Unicode.
        """
        first, last = self._added_tokens
        if not special_tokens:
            return [*first, *self.encode(text, special_tokens=False), *last]
        ids = self._encode(text, add_special_tokens=True)
        return ids[len(first) :] if first and ids[len(first) : 2 * len(first)] == first else ids

    def encode_chat(self, messages: Sequence[Message], *, special_tokens: bool = True) -> list[int]:
        """Token ids of a conversation in the chat template, which ends where the assistant's answer begins.

        Raises:
            GenerationError: the base has no chat template, the template refuses these messages, or one is not Unicode.
            BundleError: the template is not valid.
        """
        if special_tokens:
            return self.encode(self.chat(messages))
        mark = _new_mark()
        marked = [{**message, "content": self._marked(message["content"], mark)} for message in messages]
        return self._encode_parts(self.chat(marked).split(mark))

    def encode_continuation(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of text that continues other text, such as an answer; no special token is added.

        A tokenizer of SentencePiece puts a space before every text by itself; a space that `text` begins with is then
        this one.

        Raises:
            GenerationError: `text` is not valid Unicode.
        """
        text = text[1:] if self._prefixes_a_space and text.startswith(" ") else text
        return self.encode(text, special_tokens=special_tokens)

    @property
    def first_tokens(self) -> list[int]:
        """Ids that the tokenizer puts before a raw prompt: one or none in the bases we know."""
        return self._added_tokens[0]

    @functools.cached_property
    def _added_tokens(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and after a raw prompt."""
        encoded = encode_text(self._tokenizer, "a", GenerationError)
        added = [bool(flag) for flag in encoded.special_tokens_mask]
        if all(added):  # it has no token for that letter, so the ends cannot be told apart
            return list(encoded.ids), []
        first, last = added.index(False), len(added) - added[::-1].index(False)
        return list(encoded.ids[:first]), list(encoded.ids[last:])

    @functools.cached_property
    def _special(self) -> re.Pattern[str] | None:
        """Matches special tokens as they are written, the longest first; None where there is none."""
        tokens = self._tokenizer.get_added_tokens_decoder().values()
        texts = sorted({t.content for t in tokens if t.special and len(t.content) > 1}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    def _marked(self, text: str, mark: str) -> str:
        """A text with `mark` inside of every special token that is written in it."""
        while self._special is not None and self._special.search(text):
            text = self._special.sub(lambda match: match[0][0] + mark + match[0][1:], text)
        return text

    def _encode_parts(self, parts: Sequence[str]) -> list[int]:
        """Token ids of a text that is cut in parts, each encoded on its own."""
        ids = self._encode(parts[0], add_special_tokens=False)
        for part in parts[1:]:
            ids += self._encode_inside(part)
        return ids

    def _encode_inside(self, text: str) -> list[int]:
        """Token ids of a part that other text precedes: behind a special token, no space is put before it."""
        anchor = self._tokenizer.id_to_token(self.first_tokens[0]) if self.first_tokens else ""
        if not (anchor and self._prefixes_a_space):
            return self._encode(text, add_special_tokens=False)
        return self._encode(anchor + text, add_special_tokens=False)[1:]

    @functools.cached_property
    def _prefixes_a_space(self) -> bool:
        tokens = encode_text(self._tokenizer, "a", GenerationError, add_special_tokens=False).tokens
        return bool(tokens) and str(tokens[0]).startswith("\u2581")

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self.cannot_fit(len(text)):
            raise PromptTooLong(
                f"the text has {len(text)} characters, the {self._context} tokens of the base's context have "
                f"{self.most_characters} at most; shorten the prompt"
            )
        ids = list(encode_text(self._tokenizer, text, GenerationError, add_special_tokens=add_special_tokens).ids)
        if self._vocabulary is not None and max(ids, default=0) >= self._vocabulary:
            raise BundleError(
                f"the tokenizer of the bundle gives the token id {max(ids)}, the base has {self._vocabulary} tokens; "
                "export the bundle again"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        with native(BundleError, "the tokenizer of the bundle cannot decode this answer"):
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_id(self, token: str) -> int | None:
        """Id of one token by its exact spelling, None when there is no such token."""
        number = self._tokenizer.token_to_id(token)
        return None if number is None else int(number)

    def chat(self, messages: Sequence[Message]) -> str:
        """The conversation as one prompt that ends where the assistant's answer begins.

        Args:
            messages: dictionaries with `role` and `content`.

        Raises:
            GenerationError: the base has no chat template, or the template refuses these messages.
            BundleError: the template is not valid.
        """
        if self._template is None:
            raise GenerationError("this base has no chat template; use --raw to send the prompt as it is")
        return self._template.render(messages)

    def stream(self) -> TokenStream:
        """A fresh incremental decoder."""
        return TokenStream(self)


def _new_mark() -> str:
    return "".join(chr(secrets.choice(_PRIVATE)) for _ in range(_MARK_LENGTH))


class TokenStream:
    """Turns a growing list of token ids into text that never ends inside a character.

    A byte-level token can hold half of a UTF-8 character, which is held back until the next token completes it. Only
    the last few ids are decoded again: a token's text depends on the token before it, as a leading space does, and on
    no earlier one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last ones: those that were shown last, and those that are not shown yet
        self._shown = 0  # how many of these were shown

    def push(self, token: int) -> str:
        """Add one id; return the text that became certain (possibly empty)."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """The text that was still held back."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        fresh = text[len(self._tokenizer.decode(self._ids[: self._shown])) :]
        if fresh:
            self._ids = self._ids[self._shown :]
            self._shown = len(self._ids)
        return fresh
