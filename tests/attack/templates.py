"""Random chat templates: every construct of Jinja, with numbers and repetitions that a template should not have."""

from __future__ import annotations

import random


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


def random_template(rng: random.Random) -> str:
    """A template of a few statements, about half of which can be compiled and run."""
    opening = (
        "{% set ns = namespace(x="
        + _expression(rng, 1)
        + ") %}{% macro f(a, b=1) %}"
        + _body(rng, 1)
        + "{% endmacro %}"
    )
    body = "".join(_statement(rng, 3) for _ in range(rng.randint(1, 4)))
    if rng.random() < 0.1:
        place = rng.randrange(len(body) + 1)
        body = body[:place] + rng.choice(("{%", "%}", "{{", "}}", "'", "(", "#}", "{% endfor %}")) + body[place:]
    return opening + body


def _body(rng: random.Random, depth: int) -> str:
    return "".join(_statement(rng, depth) for _ in range(rng.randint(1, 2)))


def _statement(rng: random.Random, depth: int) -> str:
    def inner() -> str:
        return _body(rng, depth - 1)

    value = _expression(rng, 2)
    plain = ("text", f"{{{{ {value} }}}}", f"{{% set x = {value} %}}", f"{{% set ns.x = {value} %}}")
    if depth <= 0:
        return rng.choice(plain)
    grow = rng.choice(
        ("ns.x ~ ns.x", "ns.x + ns.x", "[ns.x, ns.x]", "(ns.x, ns.x)", "{'k': ns.x, 'l': ns.x}", "ns.x * 9")
    )
    items = rng.choice(("messages", f"range({rng.choice(_NUMBERS)})", "range(100000)", "range(60)", value))
    loops = rng.choice(("", f" if {_expression(rng, 1)}", " recursive"))
    return rng.choice(
        (
            *plain,
            f"{{% for m in {items}{loops} %}}{inner()}{{% endfor %}}",
            f"{{% for m in {items} %}}{inner()}{{% else %}}{inner()}{{% endfor %}}",
            f"{{% for m in range({rng.choice((40, 99999))}) %}}{{% set ns.x = {grow} %}}{{% endfor %}}{{{{ ns.x }}}}",
            f"{{% if {value} %}}{inner()}{{% else %}}{inner()}{{% endif %}}",
            f"{{% set x %}}{inner()}{{% endset %}}",
            f"{{% call f({value}) %}}{inner()}{{% endcall %}}",
            f"{{% filter {rng.choice(_FILTERS)} %}}{inner()}{{% endfilter %}}",
            f"{{% with x = {value} %}}{inner()}{{% endwith %}}",
            f"{{% block b{rng.randrange(99)} %}}{inner()}{{% endblock %}}",
            f"{{% generation %}}{inner()}{{% endgeneration %}}",
            rng.choice(
                ("{% break %}", "{% continue %}", "{% include 'x' %}", "{% autoescape true %}{% endautoescape %}")
            ),
        )
    )


def _expression(rng: random.Random, depth: int) -> str:
    if depth <= 0 or rng.random() < 0.2:
        return rng.choice(rng.choice((_NAMES, _NUMBERS, _TEXTS)))

    def inner() -> str:
        return _expression(rng, depth - 1)

    arguments = ", ".join(inner() for _ in range(rng.choice((0, 1, 1, 2, 3))))
    return rng.choice(
        (
            f"({inner()} {rng.choice(_OPERATORS)} {inner()})",
            f"({inner()} {rng.choice(('+', '*', '~', '%'))} {inner()})",
            f"{inner()}|{rng.choice(_FILTERS)}",
            f"{inner()}|{rng.choice(_FILTERS)}({arguments})",
            f"({inner()})|{rng.choice(('map', 'select', 'reject'))}('{rng.choice(_FILTERS + _TESTS)}', {inner()})|list",
            f"({inner()}).{rng.choice(_METHODS)}({arguments})",
            f"({inner()}).{rng.choice(_METHODS)}",
            f"{rng.choice(_CALLS)}({arguments})",
            f"({inner()} is {rng.choice(_TESTS)})",
            f"[{inner()}, {inner()}]",
            f"({inner()}, {inner()})",
            f"{{{inner()}: {inner()}}}",
            f"({inner()})[{inner()}]",
            f"({inner()})[{inner()}:{inner()}]",
            f"({inner()} if {inner()} else {inner()})",
        )
    )
