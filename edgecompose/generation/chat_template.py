"""Chat templates, rendered as transformers renders them (`transformers.utils.chat_template_utils`, 4.57)."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgecompose.errors import BundleError, EdgeComposeError, GenerationError
from edgecompose.guard.budget import Budget
from edgecompose.guard.native import said

if TYPE_CHECKING:  # a raw prompt is answered without it
    import jinja2

    from edgecompose.guard.sandbox import Sandbox

#: Characters of a template at most; the longest of published models have 40 thousand.
_LONGEST = 1 << 18
#: Steps, bytes and characters of output that any template may take, and more of them for each message and for each
#: character in messages. A template of a real model takes about 100 steps a message.
_STEPS, _BYTES, _OUTPUT = (2_000_000, 2000, 1), (1 << 26, 1 << 15, 64), (1 << 20, 1 << 12, 8)


class ChatTemplate:
    """A Jinja template that makes one prompt of a conversation.

    It sees `messages`, `add_generation_prompt`, and `tools` and `documents`, which are None. It may call
    `raise_exception` and `strftime_now` (local time), and use `{% break %}` and `{% continue %}`; `{% generation %}`
    tags mark text and change none. It runs in a sandbox, and within limits of time, memory and output that are counted
    in steps and bytes and grow with the messages.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._rendering = threading.Lock()  # one budget at a time

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text.

        Args:
            messages: dictionaries with `role` and `content`.
            add_generation_prompt: end where the assistant's answer begins.

        Raises:
            GenerationError: the template refuses these messages, fails on them, or exceeds its limits; what it said is
                in the message.
            BundleError: the template is not valid.
        """
        with self._rendering:
            sandbox, template = self._compiled
            sandbox.budget = _budget(messages)
            try:
                return template.render(
                    messages=[dict(message) for message in messages],
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                )
            except EdgeComposeError:
                raise
            except Exception as error:  # a template is a program and may raise anything
                raise GenerationError(f"the chat template refused the messages: {said(error)}") from error

    @functools.cached_property
    def _compiled(self) -> tuple[Sandbox, jinja2.Template]:
        from edgecompose.guard.sandbox import Sandbox

        if len(self._source) > _LONGEST:
            raise BundleError(
                f"the chat template of the bundle has {len(self._source):,} characters, expected at most {_LONGEST:,}; "
                "export the base with another template"
            )
        sandbox = Sandbox()
        sandbox.budget = _budget([])
        try:
            return sandbox, sandbox.template(self._source)
        except Exception as error:  # jinja2 raises classes of all kinds, Python others on very deep ones
            raise BundleError(f"the chat template of the bundle is not valid Jinja: {said(error)}") from error


def self_contained(template: str, values: Mapping[str, str | Sequence[str]]) -> str:
    """A template with the variables that it names set in its first line, so that it renders without them.

    Args:
        values: what transformers passes beside the conversation: `bos_token`, `eos_token` and the like. A variable
            that is not here stays undefined, as it does there.
    """
    named = {name: value for name, value in values.items() if name in template}
    if not named:
        return template
    # trim_blocks takes the line end away, and the template begins at the start of a line as it did
    lines = "".join(f"{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}" for name, value in named.items())
    return f"{lines}\n{template}"


def _budget(messages: Sequence[Mapping[str, str]]) -> Budget:
    """What a template may take for some messages."""
    count, characters = len(messages), sum(len(value) for message in messages for value in message.values())

    def exceeded(what: str) -> GenerationError:
        return GenerationError(
            f"the chat template of the bundle exceeds its limit of {what} for {count} messages; use --raw to do "
            "without it, or export the base with another template"
        )

    steps, size, output = (base + each * count + more * characters for base, each, more in (_STEPS, _BYTES, _OUTPUT))
    return Budget(steps=steps, size=size, output=output, exceeded=exceeded)
