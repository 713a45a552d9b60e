"""Random chat templates: every construct of Jinja, with numbers and repetitions that a template should not have."""

from __future__ import annotations

import random
import re


def words(text: str) -> list[str]:
    return text.split()


_NAMES = (
    "messages",
    "m",
    "m.content",
    "m.role",
    "ns.x",
    "ns",
    "x",
    "loop",
    "loop.index",
    "add_generation_prompt",
    "tools",
)
_NUMBERS = ("0", "1", "2", "-1", "3", "64", "1000", "100000", "1000000000", "3000000000", "10**18", "2.5", "1e308")
_TEXTS = ("'a'", "'ab'", "' '", "'%s'", "'%1000000000d'", "'{:999999999}'", "'{0}{0}'", "'<b>'", "'\\n'", "'é'", "''")
_OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", ">=", "in", "not in", "and", "or", "is not")
_FILTERS = words(
    "abs attr batch capitalize center count default dictsort e escape filesizeformat first float forceescape "
    "format groupby indent int items join last length list lower map max min pprint random reject rejectattr "
    "replace reverse round safe select selectattr slice sort string striptags sum title tojson trim truncate "
    "unique upper urlencode urlize wordcount wordwrap xmlattr"
)
_TESTS = words(
    "defined none string number mapping iterable sequence odd even callable lower upper sameas in equalto divisibleby"
)
_METHODS = words(
    "center ljust rjust zfill expandtabs replace join split rsplit splitlines strip upper title find rfind count "
    "startswith partition format format_map encode translate items keys values get copy index append pop update "
    "fromkeys to_bytes hex __class__ __mro__ __init__ __globals__ mro cycle changed"
)
_CALLS = (
    "range",
    "dict",
    "namespace",
    "cycler",
    "joiner",
    "lipsum",
    "raise_exception",
    "strftime_now",
    "f",
    "loop",
    "caller",
)
_GROWTH = ("ns.x ~ ns.x", "ns.x + ns.x", "[ns.x, ns.x]", "(ns.x, ns.x)", "{1: ns.x, 2: ns.x}", "ns.x * 9")
#: In forms, capitals stand for parts: E an expression, A arguments, B statements, and a word of each list above.
_EXPRESSIONS = (
    *("(E OPERATOR E)", "(E + E)", "(E ~ E)", "(E * E)", "(E % E)"),
    *("E|FILTER", "E|FILTER(A)", "(E)|map('FILTER', E)|list", "(E)|select('TEST', E)|list"),
    *(
        "(E ~ x).METHOD(A)",
        "(E ~ x).METHOD(NUMBER)",
        "(E).METHOD(A)",
        "(E).METHOD",
        "CALL(A)",
        "(E is TEST)",
        "(E is equalto(E))",
    ),
    *("[E, E]", "(E, E)", "{E: E}", "(E)[E]", "(E)[E:E]", "(E if E else E)"),
)
_PLAIN = ("text", "{{ E }}", "{{ E }}", "{% set x = E %}", "{% set ns.x = E %}")
_STATEMENTS = (
    *_PLAIN,
    *(
        "{% for m in I %}B{% endfor %}",
        "{% for m in I if E %}B{% endfor %}",
        "{% for m in I %}B{% else %}B{% endfor %}",
    ),
    "{% for m in I recursive %}B{{ loop(E) }}{% endfor %}",
    *("{% for m in range(40) %}{% set ns.x = GROWTH %}{% endfor %}{{ E }}", "{% set x %}B{% endset %}"),
    *("{% if E %}B{% else %}B{% endif %}", "{% call f(E) %}B{% endcall %}", "{% filter FILTER %}B{% endfilter %}"),
    *("{% with x = E %}B{% endwith %}", "{% block NAME %}B{% endblock %}", "{% generation %}B{% endgeneration %}"),
    *(
        "{% for m in I %}{% break %}B{% endfor %}",
        "{% for m in I %}{{ loop.length }}{{ loop.last }}{{ loop.changed(E) }}{% endfor %}",
        "{% macro f(a) %}B{{ f(E) }}{% endmacro %}",
    ),
)
_ITEMS = ("messages", "range(NUMBER)", "range(100000)", "range(60)", "E")
_WORDS = {"OPERATOR": _OPERATORS, "FILTER": _FILTERS, "TEST": _TESTS, "METHOD": _METHODS, "CALL": _CALLS}
_WORDS |= {"NUMBER": _NUMBERS, "GROWTH": _GROWTH}
_PART = re.compile(r"\b(?:E|A|B|I|NAME|OPERATOR|FILTER|TEST|METHOD|CALL|NUMBER|GROWTH)\b|(?<=%})B(?={%)|B(?={{)")


def random_template(rng: random.Random) -> str:
    """A template of a few statements, about half of which can be compiled and run."""
    opening = "{% set m = messages[0] %}{% set x = 'ab' %}{% set ns = namespace(x=1) %}{% set ns.x = E %}"
    opening += "{% macro f(a, b=1) %}B{% endmacro %}"
    text = _filled(rng, opening + " B" * rng.randint(1, 3), 3)
    if rng.random() < 0.1:
        place = rng.randrange(len(text) + 1)
        text = text[:place] + rng.choice(("{%", "%}", "{{", "}}", "'", "(", "#}", "{% endfor %}")) + text[place:]
    return text


def _filled(rng: random.Random, form: str, depth: int) -> str:
    """A form with its parts filled in, nested as deep as `depth`."""

    def part(match: re.Match[str]) -> str:
        name = match[0]
        if name in _WORDS:
            return rng.choice(_WORDS[name])
        if name == "NAME":
            return f"b{rng.randrange(999)}"
        if name == "A":
            return ", ".join(_filled(rng, "E", depth - 1) for _ in range(rng.choice((0, 1, 1, 2, 3))))
        if name == "I":
            return _filled(rng, rng.choice(_ITEMS), depth - 1)
        if name == "B":
            return "".join(_filled(rng, rng.choice(_STATEMENTS if depth > 1 else _PLAIN), depth - 1) for _ in range(2))
        if depth <= 0 or rng.random() < 0.3:
            return rng.choice(rng.choice((_NAMES, _NUMBERS, _TEXTS)))
        return _filled(rng, rng.choice(_EXPRESSIONS), depth - 1)

    return _PART.sub(part, form)
