"""A Jinja sandbox whose templates end: work, memory and output are counted, and refused beyond a budget.

A template is a program of a stranger. Every loop, call, filter and operator takes steps before it runs, and bytes for
what it makes. What has no known cost (a few filters, methods that no chat template needs) is refused by name.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes, runtime
from jinja2.utils import Cycler, Joiner, Namespace, pass_context
from jinja2.visitor import NodeTransformer

from edgecompose.guard.budget import (
    Budget,
    bytes_of,
    has_method,
    length_of,
    take_format,
    take_method,
    take_operator,
    take_round,
    width_of,
    words,
)

_LONGEST_FORMAT = 100
_SEQUENCES = (str, list, tuple)
#: Filters that look at no more than the type, or one item; and those that pass on item after item when asked for one.
_FREE_FILTERS = words("abs attr count length d default first last items")
_LAZY_FILTERS = words("map select reject selectattr rejectattr")
#: Filters of texts -> bytes of the result for each byte of the value, at most.
_TEXT_FILTERS = {
    **dict.fromkeys(words("capitalize lower upper trim string safe truncate center indent replace join format"), 4),
    **dict.fromkeys(words("e escape forceescape int float round"), 8),
    **dict.fromkeys(words("tojson urlencode"), 16),
    **dict.fromkeys(words("title wordcount"), 64),
}
#: Filters that make lists; and those of them that compare the items, or add them.
_LIST_FILTERS = words("list reverse batch slice sort dictsort groupby min max sum unique")
_COMPARING_FILTERS = words("sort dictsort groupby min max sum unique")
_PLAIN_TESTS = words(
    "defined undefined none boolean false true integer float string mapping number sequence iterable callable sameas "
    "escaped filter test odd even divisibleby"
)
_ARITHMETIC_TESTS = frozenset(("odd", "even", "divisibleby"))


class _Fields(Namespace):
    """Jinja's namespace. It may hold itself, so that its text does not show what is in it."""

    def __repr__(self) -> str:
        return "<Namespace>"


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with a budget that whoever renders sets."""

    intercepted_binops = frozenset(("+", "*", "**", "%", "-", "/", "//"))
    budget: Budget

    def __init__(self) -> None:
        extensions = (_Generation, "jinja2.ext.loopcontrols")
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self._shown)
        self.filters["tojson"] = _to_json
        self.filters = {name: self._filter(name, function) for name, function in self.filters.items()}
        self.filters |= {name: self._operation(function) for name, function in _OPERATIONS.items()}
        self.tests = {name: self._test(name, function) for name, function in self.tests.items()}
        self.globals |= {"namespace": _Fields, "raise_exception": self._raise, "strftime_now": _strftime_now}
        del self.globals["lipsum"]

    def template(self, source: str) -> jinja2.Template:
        """A template whose loops, macros and operators count.

        Raises:
            jinja2.TemplateError: the source is no template; Python may raise other errors on very deep ones.
        """
        tree = _Counting().visit(self.parse(source))
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def concat(self, parts: Iterable[str]) -> str:
        """Texts as one: a macro's result, a block, or the prompt itself."""
        if not isinstance(parts, list):
            return "".join(self.budget.write(parts))
        self.budget.grow(sum(map(bytes_of, parts)))
        return "".join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator, once what it makes has been taken from the budget."""
        self.budget.spend(10)
        if _escaping(left, right) > 1:
            self.budget.grow(12 * (self.budget.measure(left) + self.budget.measure(right)))
        take_operator(self.budget, operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        """`str.format` of a text, as a function that takes its result from the budget first."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def limited(*args: Any, **kwargs: Any) -> str:
            take_format(self.budget, value.__self__, (args, kwargs) * _escaping(value.__self__))
            return str(wrapped(*args, **kwargs))

        limited.takes_budget = True  # type: ignore[attr-defined]
        return limited

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template may call."""
        budget = __self.budget
        budget.spend(8 + len(args) + len(kwargs))
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, (BuiltinMethodType, MethodType)) and has_method(owner, __obj.__name__):
            take_method(budget, owner, __obj.__name__, args * _escaping(owner))
        elif isinstance(__obj, MethodType) and isinstance(owner, _LOOPS):
            budget.measure(args)
        elif __obj in (dict, _Fields):
            budget.grow(8 * budget.measure((args, kwargs)))
        elif not isinstance(__obj, _CALLABLE) and __obj not in _FUNCTIONS and not hasattr(__obj, "takes_budget"):
            raise _refused(f"calling {getattr(__obj, '__name__', type(__obj).__name__)}")
        return super().call(__context, __obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute; to see that it is a safe one takes longer than to get it."""
        self.budget.spend(10)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item; a key that is neither text nor number is measured first, because hashing takes time."""
        if not isinstance(argument, (str, int)):
            self.budget.measure(argument)
        return super().getitem(obj, argument)

    def _shown(self, value: Any) -> Any:
        """What an expression of the template writes."""
        if type(value) is not str:
            self.budget.grow(10 * self.budget.measure(value))
        return value

    def _raise(self, message: Any = "") -> str:
        self.budget.measure(message)
        raise jinja2.TemplateError(str(message))

    _raise.takes_budget = True  # type: ignore[attr-defined]

    def _filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that takes its cost from the budget first."""
        first = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

        def limited(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            self.budget.spend(8)
            value = self._count_filter(name, value, (*args, *kwargs.values()))
            leading = {"context": context, "eval_context": context.eval_ctx, "environment": self}
            return function(*([leading[first]] if first else []), value, *args, **kwargs)

        return pass_context(limited)

    def _count_filter(self, name: str, value: Any, args: tuple[Any, ...]) -> Any:
        """The value for a filter, once its cost has been taken."""
        budget = self.budget
        if name in _FREE_FILTERS or isinstance(value, jinja2.Undefined):
            return value
        if name in _LAZY_FILTERS:
            budget.measure(args)
            return budget.counted(value)
        if hasattr(value, "__next__"):
            value = list(budget.counted(value))
        if name in _LIST_FILTERS:
            count = length_of(value)
            budget.grow(64 * (count + (width_of(args) if name in ("batch", "slice") else 0)))
            if name in _COMPARING_FILTERS:
                size = budget.measure(value) + budget.measure(args)
                budget.spend(size * (count if name == "sum" else 20) >> 4)
            return value
        if name not in _TEXT_FILTERS:
            raise _refused(f"the filter '{name}'")
        size = budget.measure(value) + budget.measure(args)
        if name == "format":
            take_format(budget, str(value), args)
        elif name == "round":
            take_round(budget, value, args)
        elif name == "tojson":
            size *= 1 + width_of(args) + sum(width_of(item) for item in args if isinstance(item, (list, tuple)))
        elif name == "indent":
            size += width_of(args[:1] or (4,)) * (1 + str(value).count("\n"))
        elif name == "replace" and args:
            size += str(value).count(str(args[0])) * width_of(args[1:2])
        elif name in ("join", "center"):
            size += (length_of(value) if name == "join" else 1) * width_of(args[:1])
        budget.grow(_TEXT_FILTERS[name] * size)
        return value

    def _test(self, name: str, function: Any) -> Callable[..., Any]:
        """A test that takes its cost from the budget first."""
        first = getattr(function, "jinja_pass_arg", None) is not None

        def limited(context: Any, value: Any, *args: Any) -> Any:
            self.budget.spend(4)
            if name in _ARITHMETIC_TESTS and not isinstance(value, (int, float)):
                raise TypeError(f"'is {name}' expects a number, got {type(value).__name__}")
            if name not in _PLAIN_TESTS:
                self.budget.spend(self.budget.measure(value) + self.budget.measure(args) >> 5)
            return function(*([self] if first else []), value, *args)

        return pass_context(limited)

    def _operation(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return pass_context(lambda context, *args: function(self, *args))


class _Counting(NodeTransformer):
    """Puts the steps of a body at its beginning, and makes filters of operators that no method of Jinja overrides.

    Their names begin with a space, so that no template can use them.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._count(node)
        if node.test is not None:
            node.test = _call(_OPERAND, node.test)
        return node

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> nodes.Node:
        raise jinja2.TemplateSyntaxError("autoescape is not supported in a chat template", node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call(_JOIN, nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides: list[Any] = [node, *node.ops]
        for side in sides:
            side.expr = side.expr if isinstance(side.expr, nodes.Const) else _call(_OPERAND, side.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (part or nodes.Const(None) for part in (node.arg.start, node.arg.stop, node.arg.step))
        return _call(_SLICE, node.node, *bounds)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        if all(isinstance(pair.key, nodes.Const) for pair in node.items):
            return node
        pairs: list[nodes.Expr] = [nodes.Tuple([p.key, p.value], "load", lineno=p.lineno) for p in node.items]
        return _call(_DICT, nodes.List(pairs, lineno=node.lineno))

    def _count(self, node: Any) -> nodes.Node:
        """A node whose body begins with its steps: its nodes, so that a long body costs more."""
        weight = nodes.Const(1 + sum(1 for _ in node.find_all(nodes.Node)) // 4, lineno=node.lineno)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call(_STEP, weight), lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = visit_Block = _count


class _Generation(jinja2.ext.Extension):
    """Reads `{% generation %}` and leaves what is inside, in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    if len(form) > _LONGEST_FORMAT:
        raise _refused(f"a format of {len(form)} characters for the time")
    return datetime.datetime.now().strftime(form)


def _operand(sandbox: Sandbox, value: Any) -> Any:
    """A side of a comparison, or the condition of a loop."""
    sandbox.budget.spend(4 if value is None or isinstance(value, int) else 4 + (sandbox.budget.measure(value) >> 5))
    return value


def _slice(sandbox: Sandbox, value: Any, *bounds: Any) -> Any:
    part = slice(*bounds)
    if isinstance(value, _SEQUENCES):
        count = len(range(*part.indices(len(value))))
        sandbox.budget.grow(count * (4 if isinstance(value, str) else 8))
    return value[part]


def _join(sandbox: Sandbox, values: tuple[Any, ...]) -> str:
    for value in values:
        sandbox.budget.grow(bytes_of(value) if type(value) is str else 10 * sandbox.budget.measure(value))
    return "".join(map(str, values))


def _dict(sandbox: Sandbox, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    for key, _ in pairs:
        sandbox.budget.measure(key)
    return dict(pairs)


_STEP, _OPERAND, _SLICE, _JOIN, _DICT = " step", " operand", " slice", " join", " dict"
_OPERATIONS: Mapping[str, Callable[..., Any]] = {
    _STEP: lambda sandbox, steps: sandbox.budget.spend(steps),
    _OPERAND: _operand,
    _SLICE: _slice,
    _JOIN: _join,
    _DICT: _dict,
}
_LOOPS = (runtime.LoopContext, Cycler)
_CALLABLE = (runtime.Macro, runtime.LoopContext, runtime.BlockReference, runtime.Undefined, Joiner)
_FUNCTIONS = (jinja2.sandbox.safe_range, Cycler, Joiner, _strftime_now)


def _call(name: str, node: Any, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


def _refused(what: str) -> jinja2.exceptions.SecurityError:
    return jinja2.exceptions.SecurityError(f"{what} is not allowed in a chat template")


def _escaping(*values: Any) -> int:
    """How much longer texts may become that one of these escapes."""
    return 6 if any(hasattr(value, "__html__") for value in values) else 1
