"""Templates of strangers end: by their limits, with one line, and without the memory that they ask for."""

from __future__ import annotations

import resource
import sys
import tracemalloc
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgecompose.errors import BundleError, GenerationError
from edgecompose.generation import chat_template
from edgecompose.generation.chat_template import ChatTemplate
from tests.guard.hostile_templates import ENDLESS, INVALID, REFUSED

HELLO = [{"role": "user", "content": "hello"}]
TALK = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"message {i}"} for i in range(9999)]


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fortieth of the steps, so that a slow machine sees the end of each soon."""
    monkeypatch.setattr(chat_template, "_STEPS", (50_000, 2000, 1))


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("case", ENDLESS)
def test_a_template_that_does_not_end_exceeds_a_limit(case: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(GenerationError, match=r"its limit of (time|memory|output) for 1 messages; use --raw"):
            ChatTemplate(ENDLESS[case]).render(HELLO)
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", ["loops", "macros", "nested"])
def test_the_limit_of_time_is_seconds(case: str) -> None:
    """CPU time, and ten times what it takes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with pytest.raises(GenerationError, match="limit of time"):
        ChatTemplate(ENDLESS[case]).render(HELLO)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 20


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_template_may_not_do_is_refused(case: str) -> None:
    with pytest.raises(GenerationError, match="chat template refused the messages: .") as caught:
        ChatTemplate(REFUSED[case]).render(HELLO)
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


@pytest.mark.parametrize("case", INVALID)
def test_what_is_no_template_is_a_bundle_error(case: str) -> None:
    with pytest.raises(BundleError, match="chat template of the bundle"):
        ChatTemplate(INVALID[case]).render(HELLO)


def test_limits_grow_with_the_messages() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content|trim }}"
        "{% if not loop.last and messages[loop.index0 + 1].role == m.role %}{{ raise_exception('twice') }}{% endif %}"
        "{% if loop.index0 > messages|length %}{{ m|tojson }}{% endif %}{% endfor %}"
    )
    assert template.render(TALK) == "".join(f"<{m['role']}>{m['content']}" for m in TALK)
    long = [{"role": "user", "content": "word " * 400_000}]
    assert template.render(long) == "<user>" + long[0]["content"].strip()


def test_a_limit_is_the_same_each_time_and_leaves_no_trace() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content.rjust(20000000) }}{% endfor %}{{ messages|length }}")
    for _ in range(3):
        with pytest.raises(GenerationError, match="limit of memory"):
            template.render(HELLO)
        assert template.render([]) == "0"


PIECES = st.sampled_from(
    [
        "{{ messages[0].content }}",
        "{% for m in messages %}{{ m.role ~ loop.index ~ m['content'][1:3] }}{% endfor %}",
        "{% for m in messages if m.role != 'user' %}{{ loop.length }}{{ m }}{% else %}none{% endfor %}",
        "{% set ns = namespace(a=0) %}{% for m in messages %}"
        "{% set ns.a = ns.a + m.content|length %}{% endfor %}{{ ns.a }}",
        "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join(', ') }}",
        "{{ messages|map('tojson')|list }}{{ messages|groupby('role')|length }}",
        "{{ (messages|last).content.split('e')[-1].strip()|upper }}",
        "{% macro m(a, b='x') %}{{ a }}{{ b }}{{ varargs }}{% endmacro %}{{ m(1) }}{{ m(1, 2, 3) }}",
        "{% macro c() %}<{{ caller(1) }}>{% endmacro %}{% call(n) c() %}{{ n }}{% endcall %}",
        "{{ messages[::-1]|length }}{{ 7 // 2 }}{{ 7 % 4 }}{{ '%s-%03d' % ('a', 7) }}{{ '{:>4}'.format(3) }}",
        "{{ {'a': 1, messages[0].role: 2} }}{{ dict(a=[1, (2, 3)])|tojson(indent=2) }}",
        "{{ 'a' in messages[0].content }}{{ messages[0] in messages }}{{ 1 < 2 < 3 }}{{ nothing is defined }}",
        "{% set x %}in {{ messages|length }}{% endset %}{{ x|title }}{{ x is string }}"
        "{{ 3 is odd }}{{ 4 is divisibleby 2 }}",
        "{% for a, b in messages[0].items() %}{{ a }}{{ b|indent(2) }}{{ loop.cycle('x', 'y') }}{% endfor %}",
        "{% for c in 'abc'|reverse %}{{ loop.previtem }}{{ loop.changed(c) }}{% endfor %}{{ [3, 1]|sort|first }}",
        "{% filter upper %}{{ messages[0].content }}{% endfilter %}{% with a = 1 %}{{ a }}{% endwith %}",
        "{% block b %}{{ messages|length }}{% endblock %}{{ self.b() }}{{ -1.55|round(1)|abs }}{{ '12'|int + 2.5 }}",
        "{{ ['a', 'b', 'a']|unique|list }}{{ range(3)|sum }}{{ range(5)|batch(2, 'x')|list }}{{ (1, 2)|max }}",
        "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
        "{{ '<a>'|e ~ '<'|safe + '>' }}{{ 'x'.ljust(3) }}{{ 'a.b'.replace('.', '-') }}{{ 'ab'.startswith('a') }}",
    ]
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=20)}),
    min_size=1,
    max_size=4,
)


@given(st.lists(PIECES, min_size=1, max_size=3), MESSAGES)
def test_a_template_within_limits_renders_as_without_them(pieces: list[str], messages: list[dict[str, str]]) -> None:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    try:
        source = "".join(pieces)
        expected = environment.from_string(source).render(messages=messages)
    except jinja2.TemplateError as error:  # such as two blocks of one name
        with pytest.raises((BundleError, GenerationError), match=str(error)[:20]):
            ChatTemplate("".join(pieces)).render(messages)
    else:
        assert ChatTemplate(source).render(messages) == expected


def _to_json(value: Any, indent: int | None = None) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=indent)


def test_jinja_is_imported_by_the_first_template_only() -> None:
    import subprocess

    code = "import sys, edgecompose.generation.chat_template; print('jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
