"""Templates that cannot hurt: a part of Jinja in which every rendering ends soon, and small.

Versions come over the log, from anyone who may write there. Jinja's own sandbox keeps a template from reaching
Python's internals, not from looping for ever or making a string of a gigabyte. So what a template may be written with
is listed here, loops and whatever makes text pay from a budget of steps, and no value grows beyond a limit. All of it
is counted, none of it timed: a version that renders on one machine renders on every one.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from typing import Any, cast

from jinja2 import StrictUndefined, Template, TemplateError, Undefined, nodes
from jinja2.filters import FILTERS, do_round
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS

MAX_SOURCE = 32_768
"""Characters of one template: some 8,000 tokens, twice the smallest context that a real model is run with here."""

MAX_CHARS = 2_000_000
"""Characters of one rendering, and of any text made on the way: a record of the log has at most 1 MiB, and an honest
template may say all of it, once. What does not fit the model's context is dropped by priority, later."""

MAX_STEPS = 20_000
"""Steps of one rendering. A step is one part of a loop's body, run once, or 1,000 characters that go through a filter
or a method, or are searched (fewer where those are slow: `_PER_STEP`): the default takes some 500 for a window of
twenty classes and ten sections. The worst that was found to do with so many takes one second."""

MAX_DEPTH = 100
"""Levels of expressions and blocks in one another: `a + b + c` has two."""

_CHARS_PER_STEP = 1_000
# What makes an object of each word or item, or calls Python for it, takes up to a microsecond for each.
_PER_STEP = {"title": 100, "split": 100, "list": 100, "wordcount": 100} | dict.fromkeys(
    ("map", "max", "min", "reject", "rejectattr", "select", "selectattr", "sort", "sum", "unique"), 1
)
_MAX_STRIPPED = 100  # characters to strip off: each of the text is looked for among them
_MAX_BITS = 256
_MAX_PADDING = 999
_SCALARS = (str, int, float, type(None), Undefined)

_STATEMENTS = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign)
_EXPRESSIONS = (
    *(nodes.Name, nodes.Const, nodes.List, nodes.Tuple, nodes.Getattr, nodes.Getitem, nodes.Filter, nodes.Test),
    *(nodes.Call, nodes.Keyword, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.CondExpr),
    *(nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow, nodes.Neg, nodes.Pos),
    nodes.Concat,
)
_METHODS = frozenset(
    {"upper", "lower", "title", "capitalize", "strip", "startswith", "endswith", "split", "get", "cycle", "changed"}
)
_AS_THEY_ARE = (
    *("abs", "capitalize", "count", "d", "default", "first", "float", "int", "last", "length", "list", "lower", "map"),
    *("max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "sum", "title"),
    *("truncate", "unique", "upper", "wordcount"),
)

_left: ContextVar[int] = ContextVar("steps left in this rendering")


class LimitError(TemplateError):
    """This template is written with what is not taken here, or its rendering would grow too large; says which."""


def compiled(source: str) -> Template:
    """The template.

    Raises:
        TemplateError: it does not parse, or uses what is not taken.
    """
    if len(source) > MAX_SOURCE:
        raise LimitError(f"the template has {len(source)} characters; at most {MAX_SOURCE} are taken")
    try:
        tree = _ENVIRONMENT.parse(source)
        _check(tree)
        for loop in [node for node in _all(tree) if isinstance(node, nodes.For)]:
            body = [inside for part in (*loop.body, *loop.else_) for inside in _all(part)]
            loop.iter = _by_filter("_counted", loop.iter, nodes.Const(1 + len(body)))
        code = _ENVIRONMENT.compile(_joined(tree))
    except (RecursionError, MemoryError, SyntaxError) as error:  # of Python's own compiler: nested too deeply
        raise LimitError(f"the template is nested too deeply: {error}") from error
    return Template.from_code(_ENVIRONMENT, code, _ENVIRONMENT.make_globals(None))


def render(template: Template, variables: Mapping[str, Any]) -> str:
    """The text.

    Raises:
        Exception: whatever a template can raise; `LimitError` where it would not end soon or grow too large.
    """
    _left.set(MAX_STEPS)
    parts: list[str] = []
    size = 0
    for part in template.generate(variables):
        size += len(part)
        if size > MAX_CHARS:
            raise LimitError(f"the rendering has more than {MAX_CHARS} characters")
        parts.append(part)
    return "".join(parts)


def _all(node: nodes.Node) -> Iterator[nodes.Node]:
    """The node and all below it, in no order. Jinja's own walk, and its compiler, are slow on what is nested deeply."""
    todo = [(node, 0)]
    while todo:
        node, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise LimitError(f"line {node.lineno}: nested too deeply: more than {MAX_DEPTH} levels")
        yield node
        todo.extend((child, depth + 1) for child in node.iter_child_nodes())


def _check(tree: nodes.Template) -> None:
    """Refuse what is not on the list."""
    for node in _all(tree):
        what = type(node).__name__.lower()
        if isinstance(node, nodes.Slice) or not isinstance(node, _STATEMENTS + _EXPRESSIONS):
            raise LimitError(f"line {node.lineno}: {what} is not taken in prompts")
        if isinstance(node, nodes.For) and node.recursive:
            raise LimitError(f"line {node.lineno}: a recursive loop is not taken in prompts")
        if isinstance(node, nodes.List | nodes.Tuple) and not _plain(node):
            raise LimitError(f"line {node.lineno}: a {what} may hold constants only")
        if isinstance(node, nodes.Call) and not (
            isinstance(node.node, nodes.Getattr) and node.node.attr in _METHODS and node.dyn_args is None
        ):
            raise LimitError(
                f"line {node.lineno}: this call is not taken in prompts; there are the methods "
                f"{', '.join(sorted(_METHODS))}, and filters"
            )


def _plain(node: nodes.List | nodes.Tuple) -> bool:
    """Whether it is the target of an assignment, or holds constants alone: [x, x], again and again, doubles."""
    if isinstance(node, nodes.Tuple) and node.ctx != "load":
        return True
    return all(isinstance(item, nodes.Const) for item in node.items)


def _by_filter(name: str, value: Any, *others: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(others), [], None, None, lineno=value.lineno, environment=_ENVIRONMENT)


def _joined(node: Any) -> Any:
    """The tree with each `~` as a filter that pays for what it makes, and each `in` paid by what is searched."""
    for name, value in list(node.iter_fields()):
        if isinstance(value, list):
            setattr(node, name, [_joined(item) if isinstance(item, nodes.Node) else item for item in value])
        elif isinstance(value, nodes.Node):
            setattr(node, name, _joined(value))
    if isinstance(node, nodes.Operand) and node.op in {"in", "notin"}:
        node.expr = _by_filter("_searched", node.expr)
    return _by_filter("_joined", *node.nodes) if isinstance(node, nodes.Concat) else node


def _pay(steps: int) -> None:
    left = _left.get() - steps
    _left.set(left)
    if left < 0:
        raise LimitError(
            f"the rendering takes more than {MAX_STEPS} steps: a loop too long, or too many in one another"
        )


def _made(size: float, per_step: int = _CHARS_PER_STEP) -> None:
    """Pay for text (or a list) about to be made."""
    if size > MAX_CHARS:
        raise LimitError(f"a value of more than {MAX_CHARS} characters")
    _pay(1 + int(size) // per_step)


def _read(name: str, *values: Any) -> None:
    """Pay for texts and lists about to be gone through by the filter or method of that name."""
    sized = (value for value in values if isinstance(value, Sized) and not isinstance(value, Undefined | Context))
    _made(sum(map(len, sized)), _PER_STEP.get(name, _CHARS_PER_STEP))


def _text(value: Any) -> str:
    if not isinstance(value, _SCALARS):
        raise LimitError(f"a {type(value).__name__} is no text: loop over it, or join it")
    return str(value)


def _shown(value: Any) -> Any:
    return value if isinstance(value, str) else _text(value)


def _counted(values: Iterable[Any], steps: int) -> Iterator[Any]:
    for value in values:
        _pay(steps)
        yield value


def _join(values: Iterable[Any], d: Any = "", attribute: str | None = None) -> str:
    texts = [_text(value if attribute is None else value[attribute]) for value in values]
    _made(sum(map(len, texts)) + len(_text(d)) * len(texts))
    return _text(d).join(texts)


def _concat(*values: Any) -> str:
    return _join(values)


def _replace(value: Any, old: Any, new: Any) -> str:
    text, old, new = _text(value), _text(old), _text(new)
    _made(len(text) + text.count(old) * len(new))
    return text.replace(old, new)


def _format(value: Any, *args: Any, **named: Any) -> str:
    text, given = _text(value), [*map(_text, args), *map(_text, named.values())]
    if "*" in text or any(int(digits) > _MAX_PADDING for digits in re.findall(r"\d+", text)):
        raise LimitError(f"a format pads to at most {_MAX_PADDING} characters")
    _made(len(text) + text.count("%") * (_MAX_PADDING + max(map(len, given), default=0)))
    return text % (named or args)


def _searched(value: Any) -> Any:
    _read("in", value)
    return value


def _few(chars: Any) -> None:
    if isinstance(chars, str) and len(chars) > _MAX_STRIPPED:
        raise LimitError(f"at most {_MAX_STRIPPED} characters can be stripped off")


def _trim(value: Any, chars: Any = None) -> str:
    text = _text(value)
    _read("trim", text)
    _few(chars)
    return text.strip(chars)


def _round(value: Any, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > 15:
        raise LimitError("round takes at most 15 digits: a float has no more")
    return do_round(value, precision, method)


def _paid(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    """Jinja's own filter or test, paid by the size of what goes in."""

    @functools.wraps(own)
    def filtered(*args: Any, **named: Any) -> Any:
        _read(name, *args)
        return own(*args, **named)

    return filtered


class _Environment(ImmutableSandboxedEnvironment):
    """With all arithmetic, and methods of texts, looked at before it is done."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse what would grow too large."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "%" and isinstance(left, str):
            return _format(left, *(right if isinstance(right, tuple) else (right,)))
        if operator in {"*", "**"} and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise LimitError(f"a number of more than {_MAX_BITS} bits")
        elif operator == "*" and not numbers:
            size, times = (len(left), right) if isinstance(left, Sized) else (len(right), left)
            _made(size * times)
        elif operator == "+" and not numbers:
            _made(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, method: Any, /, *args: Any, **named: Any) -> Any:
        """Have a text's method paid by the size of what goes in, as filters are."""
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            _read(method.__name__, text, *args)
            if method.__name__ == "strip":
                _few(args[0] if args else None)
        return super().call(context, method, *args, **named)


# Not HTML: no escaping. `optimized=False`: nothing is computed while a template is read, where nobody counts.
_ENVIRONMENT = _Environment(undefined=StrictUndefined, autoescape=False, optimized=False, finalize=_shown)
_ENVIRONMENT.globals.clear()
_ENVIRONMENT.filters = {name: _paid(name, FILTERS[name]) for name in _AS_THEY_ARE} | {
    "format": _format,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "string": _text,
    "trim": _trim,
    "_counted": _counted,
    "_searched": _searched,
    "_joined": _concat,
}
_ENVIRONMENT.tests = {name: _paid(name, cast("Callable[..., Any]", own)) for name, own in TESTS.items()}
