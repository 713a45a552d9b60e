"""Text to token ids and back, and the chat template; knows nothing of graphs or adapters."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

from edgecompose.errors import BundleError, GenerationError

if TYPE_CHECKING:  # a raw prompt is answered without it
    import jinja2

Message = dict[str, str]


class Tokenizer:
    """A `tokenizer.json` without any token added at either end.

    The chat template writes its own special tokens, and a raw prompt gets none
    (`add_bos_token = false` in the bases we know), so nothing is ever prepended here.
    """

    def __init__(self, path: Path, *, chat_template: str | None = None) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception on any malformed file
            raise BundleError(f"tokenizer '{path.name}' cannot be read: {error}; export the bundle again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._chat_template = chat_template

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be called."""
        return self._chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens written in it being recognised, none added."""
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except TypeError as error:  # a lone surrogate, which is how Python spells bytes that are not UTF-8
            raise GenerationError(f"the text is not valid Unicode: {text!r:.80}; give UTF-8") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_id(self, token: str) -> int | None:
        """Id of one token by its exact spelling, None when there is no such token."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def chat(self, messages: Sequence[Message]) -> str:
        """The conversation as one prompt that ends where the assistant's answer begins.

        Args:
            messages: dictionaries with `role` and `content`.

        Raises:
            GenerationError: the base has no chat template, or the template refuses these messages.
            BundleError: the template is not valid.
        """
        if self._chat_template is None:
            raise GenerationError("this base has no chat template; use --raw to send the prompt as it is")
        template = self._template
        try:
            return template.render(messages=list(messages), add_generation_prompt=True)
        except Exception as error:  # a template is a program and may raise anything
            raise GenerationError(f"the chat template refused the messages: {error}") from error

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        return _compile(self._chat_template or "")

    def stream(self) -> TokenStream:
        """A fresh incremental decoder."""
        return TokenStream(self)


class TokenStream:
    """Turns a growing list of token ids into text that never ends inside a character.

    A byte-level token can hold half of a UTF-8 character; such a piece is held back until
    the next token completes it. Only the last few ids are decoded again: a token's text may
    depend on the one before it, as a leading space does, and on no earlier one.
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


def _compile(source: str) -> jinja2.Template:
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> str:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise BundleError(f"the chat template of the bundle is not valid Jinja: {error}") from error
