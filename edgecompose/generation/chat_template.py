"""Chat templates, rendered as transformers renders them (`transformers.utils.chat_template_utils`, 4.57)."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgecompose.errors import BundleError, GenerationError

if TYPE_CHECKING:  # a raw prompt is answered without it
    import jinja2


class ChatTemplate:
    """A Jinja template that makes one prompt of a conversation.

    It sees `messages`, `add_generation_prompt`, and `tools` and `documents`, which are None. It may call
    `raise_exception` and `strftime_now` (local time), and use `{% break %}` and `{% continue %}`; `{% generation %}`
    tags mark text and change none. It runs in a sandbox.
    """

    def __init__(self, source: str) -> None:
        self._source = source

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text.

        Args:
            messages: dictionaries with `role` and `content`.
            add_generation_prompt: end where the assistant's answer begins.

        Raises:
            GenerationError: the template refuses these messages, or fails on them; what it said is in the message.
            BundleError: the template is not valid.
        """
        template = self._template
        try:
            return template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program and may raise anything
            raise GenerationError(f"the chat template refused the messages: {error}") from error

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        return _compile(self._source)


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


def _compile(source: str) -> jinja2.Template:
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """Reads `{% generation %}` and leaves what is inside, in a scope of its own."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> str:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise BundleError(f"the chat template of the bundle is not valid Jinja: {error}") from error
