"""Chat templates that would take minutes, gigabytes, or more than a template may reach."""

from __future__ import annotations

_DOUBLING = "{% set ns = namespace(x=START) %}{% for _ in range(100) %}STEP{% endfor %}"


def _doubled(start: str, step: str, then: str = "") -> str:
    return _DOUBLING.replace("START", start).replace("STEP", step) + then


_NESTED = "{% set ns.x = [ns.x, ns.x] %}"
_NESTED_TUPLE = "{% set ns.x = (ns.x, ns.x) %}"
#: They exceed a limit.
ENDLESS = {
    "loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for x in range(9999) recursive %}{% if loop.depth < 3 %}{{ loop(range(9999)) }}{% endif %}"
    "{% endfor %}",
    "long body": "{% for a in range(100000) %}" + "{{ a }}" * 200 + "{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "call blocks": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 15
    + "{% for i in range(100000) %}x{% endfor %}"
    + "{% endcall %}" * 15,
    "arguments": "{% macro m() %}{% if varargs %}{% endif %}{% endmacro %}"
    "{% for i in range(100000) %}{{ m(*range(100000)) }}{% endfor %}",
    "repeated text": "{{ 'a' * 3000000000 }}",
    "repeated list": "{{ ([1] * 3000000000)|length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": _doubled("3", "{% set ns.x = ns.x * ns.x %}"),
    "center": "{{ 'a'.center(3000000000) }}",
    "filter center": "{{ 'a'|center(3000000000) }}",
    "zfill": "{{ 'a'.zfill(3000000000) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "expandtabs": "{{ 'a\tb'.expandtabs(2000000000) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "filter replace": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "join": "{{ ('a' * 1000000).join(['b'] * 100000) }}",
    "filter join": "{{ range(100000)|join('a' * 1000000) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "filter format": "{{ '%1000000000d'|format(1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "slice": "{{ [1]|slice(1000000000)|list }}",
    "indent": "{{ 'a\nb'|indent(1000000000) }}",
    "json indent": "{{ [1]|tojson(indent=1000000000) }}",
    "round": "{{ 1.5|round(1000000000, 'ceil') }}",
    "title": "{{ ('a ' * 10000000)|title }}",
    "urlencode": "{{ ('é' * 10000000)|urlencode }}",
    "sum of lists": "{% set x = [[1]] * 100000 %}{{ x|sum(start=[]) }}",
    "doubled by ~": _doubled("'ab'", "{% set ns.x = ns.x ~ ns.x %}"),
    "doubled by +": _doubled("'ab'", "{% set ns.x = ns.x + ns.x %}"),
    "doubled list": _doubled("['ab']", "{% set ns.x = ns.x + ns.x %}"),
    "doubled block": _doubled("'ab'", "{% set q %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = q %}"),
    "doubled markup": _doubled("'<'|safe", "{% set ns.x = ns.x + '<<<<<<<<' + ns.x %}"),
    "nested": _doubled("['ab']", _NESTED, "{{ ns.x }}"),
    "nested in text": _doubled("['ab']", _NESTED, "{{ 'a' ~ ns.x }}"),
    "nested, compared": _doubled("1", _NESTED + "{% set ns.y = [ns.y, ns.y] %}", "{{ ns.x == ns.y }}"),
    "nested, tested": _doubled("1", _NESTED, "{{ ns.x is equalto [ns.x, ns.x] }}"),
    "nested, hashed": _doubled("(1, 2)", _NESTED_TUPLE, "{{ {ns.x: 1} }}"),
    "nested, looked up": _doubled("(1, 2)", _NESTED_TUPLE, "{{ {}[ns.x] }}"),
    "nested, got": _doubled("(1, 2)", _NESTED_TUPLE, "{{ {}.get(ns.x) }}"),
    "nested, to JSON": _doubled("['ab']", _NESTED, "{{ ns.x|tojson }}"),
    "nested, formatted": _doubled("['ab']", _NESTED, "{{ '%s' % (ns.x,) }}"),
    "nested, refused": _doubled("['ab']", _NESTED, "{{ raise_exception(ns.x) }}"),
    "nested, changed": _doubled("['ab']", _NESTED, "{% for a in [1, 2] %}{{ loop.changed(ns.x) }}{% endfor %}"),
    "searched from the end": "{{ ('a' * 10000000).rfind('b' + 'a' * 5000000) }}",
    "searched list": "{% set x = range(100000)|list %}{% for i in range(100000) %}{{ -1 in x }}{% endfor %}",
    "searched range": "{% for i in range(100000) %}{{ 'a' in range(100000) }}{% endfor %}",
    "compared texts": "{% set x = 'a' * 1000000 %}{% set y = 'a' * 1000000 %}{% for i in range(100000) %}"
    "{% set z = x == y %}{% endfor %}",
    "slices": "{% set x = 'a' * 1000000 %}{% for i in range(100000) %}{% set y = x[1:] %}{% endfor %}",
    "mapped": "{% for i in range(100000) %}{% set x = range(100000)|map('string')|list %}{% endfor %}",
    "selected": "{% for i in range(100000) %}{{ range(100000)|select('equalto', -1)|first }}{% endfor %}",
    "counted": "{% for i in range(100000) %}{% for j in range(100000)|map('string') %}{{ loop.length }}{% break %}"
    "{% endfor %}{% endfor %}",
    "output": "{% for i in range(100000) %}" + "a" * 100 + "{% endfor %}",
}
#: They use what a chat template may not, or fail.
REFUSED = {
    "lipsum": "{{ lipsum(n=10**7) }}",
    "urlize": "{{ ('a.' * 1000)|urlize }}",
    "striptags": "{{ ('<!--' * 1000)|striptags }}",
    "markup": "{{ ('<!--' * 1000)|safe|attr('striptags')() }}",
    "wordwrap": "{{ ('a ' * 1000)|wordwrap }}",
    "pprint": "{{ messages|pprint }}",
    "bytes": "{{ (5).to_bytes(1000000000) }}",
    "encode": "{{ 'a'.encode('utf-16') }}",
    "fromkeys": "{{ dict.fromkeys(range(100000)) }}",
    "odd": "{{ '%1000000000d' is odd }}",
    "divisible": "{{ '%1000000000d' is divisibleby(3) }}",
    "rounded text": "{{ 'a'|round(9, 'ceil') }}",
    "large range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "endless block": "{% block a %}{{ self.a() }}{% endblock %}",
    "format of the time": "{{ strftime_now('%d' * 1000) }}",
    "include": "{% include 'x' %}",
    "extends": "{% extends 'x' %}",
    "import": "{% import 'x' as y %}",
    "generator": "{{ (messages|map('upper')).send(None) }}",
    "class": "{{ ''.__class__.__mro__() }}",
    "globals": "{{ cycler.__init__.__globals__['os'].system('true') }}",
    "self": "{{ namespace.__init__.__globals__ }}{{ self._TemplateReference__context.environment() }}",
    "format class": "{{ '{0.__class__.__mro__}'.format(1).x.y }}",
}
#: They are no templates.
INVALID = {
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "conditions": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "minus": "{{ " + "-" * 50000 + "1 }}",
    "lists": "{{ " + "[" * 50000 + "]" * 50000 + " }}",
    "long": "{{ a }}" * 80000,
    "autoescape": "{% autoescape true %}a{% endautoescape %}",
    "another filter": "{{ 1|nothing }}",
}
