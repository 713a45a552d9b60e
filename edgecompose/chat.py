"""Holds a conversation: its messages so far, and the answer to the next one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from edgecompose.cancellation import Cancellation
from edgecompose.composer import Composer
from edgecompose.generation.messages import Message
from edgecompose.request import Answer, Request


class Chat:
    """A conversation with a composer. Not for use by two threads at once.

    Adapters are chosen at each turn by the user's last message, or the first (`route_by`). Where the blend is the same,
    a turn reads only new tokens.

    Args:
        request: of every turn; a conversation that exceeds the context loses its oldest turns, unless it refuses.
        system: the system message, if any.
    """

    def __init__(self, composer: Composer, request: Request | None = None, *, system: str | None = None) -> None:
        self._composer = composer
        self._request = dataclasses.replace(request or Request(overflow="truncate"), prompt_cache=True)
        self._opening = () if system is None else (Message("system", system),)
        self.messages: tuple[Message, ...] = self._opening

    def say(
        self,
        text: str,
        *,
        on_text: Callable[[str], None] = lambda text: None,
        cancellation: Cancellation | None = None,
    ) -> Answer:
        """Answer the user's next message; both become part of the conversation.

        A cancellation, or an exception out of `on_text`, ends the answer where it is; what was written of it stays in
        the conversation.

        Args:
            on_text: called with each chunk of the answer as it becomes certain.
            cancellation: another thread, or the handler of a signal, ends the answer through it.

        Raises:
            Cancelled: it was ended through `cancellation`.
            EdgeComposeError: of the stage that failed; the conversation is as it was.
        """
        cancellation = cancellation or Cancellation()
        messages = (*self.messages, Message("user", text))
        chunks: list[str] = []
        with self._composer.generate(messages, self._request, cancellation=cancellation) as generation:
            try:
                for chunk in generation:
                    chunks.append(chunk)
                    on_text(chunk)
                    cancellation.check()
                return generation.answer
            finally:
                if chunks:
                    self.messages = (*messages, Message("assistant", "".join(chunks)))

    def read_ahead(self) -> bool:
        """Read a part of the last answer as the next turn will read it; False where all is read.

        Call it while the user types: the next answer then begins sooner, and is the same.
        """
        return self._composer.model.read_ahead()

    def reset(self) -> None:
        """Start again; the system message stays."""
        self.messages = self._opening
