"""The value of an expression of a short program, and the calls that it makes.

A name is a variable of the program, one of the listed functions, or unknown; an attribute can only
be called, and only where `values.py` lists it.
"""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tandem_router.predictor.cascade.programs.values import (
    BINARY,
    COMPARE,
    FUNCTIONS,
    MATHS,
    TYPES,
    Budget,
    NotRun,
    checked,
    listed,
    method,
    only_plain,
    pay_for_call,
    pay_for_function,
)

MAX_CALLS = 40
MAX_RANGE = 40_000


@dataclass(frozen=True, eq=False)
class Function:
    """A function of the program. body: of a lambda its one expression."""

    names: list[str]
    defaults: list[Any]
    rest: str | None
    body: list[ast.stmt] | ast.expr
    outer: Evaluator


@dataclass(eq=False)
class Evaluator(ABC):
    """The variables of one call, and those around it."""

    budget: Budget
    outer: Evaluator | None = None
    depth: int = 0
    names: dict[str, Any] = field(default_factory=dict)
    elsewhere: dict[str, Evaluator] = field(default_factory=dict)

    @abstractmethod
    def call_body(self, body: list[ast.stmt]) -> Any:
        """What the statements of a function return."""

    # -- expressions ------------------------------------------------------------------------

    def value(self, node: ast.expr) -> Any:
        self.budget.spend(1)
        step = getattr(self, f"_{type(node).__name__}", None)
        if step is None:
            raise NotRun(f"{type(node).__name__} is not known")
        return checked(step(node))

    def _Constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, complex) or node.value is Ellipsis:
            raise NotRun("such a value is not known")
        return node.value

    def _Name(self, node: ast.Name) -> Any:
        return self._name(node.id)

    def _name(self, name: str) -> Any:
        frame: Evaluator | None = self
        while frame is not None:
            if name in frame.names:
                return frame.names[name]
            frame = frame.outer
        known = TYPES.get(name) or FUNCTIONS.get(name) or _LAZY.get(name)
        if known is None:
            raise NotRun(f"{name} is not known")
        return known

    def _List(self, node: ast.List) -> Any:
        return self._items(node.elts)

    def _Tuple(self, node: ast.Tuple) -> Any:
        return tuple(self._items(node.elts))

    def _Set(self, node: ast.Set) -> Any:
        values = self._items(node.elts)
        self.budget.pay(values)
        return set(values)

    def _items(self, nodes: list[ast.expr]) -> list[Any]:
        found: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                found += listed(self.budget, self.value(node.value))
            else:
                found.append(self.value(node))
        return found

    def _Dict(self, node: ast.Dict) -> Any:
        found: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                raise NotRun("such a dictionary is not known")
            at = self.value(key)
            self.budget.pay(at)
            found[at] = self.value(value)
        return found

    def _JoinedStr(self, node: ast.JoinedStr) -> Any:
        parts = []
        for part in node.values:
            if isinstance(part, ast.Constant):
                parts.append(str(part.value))
            elif isinstance(part, ast.FormattedValue) and part.format_spec is None:
                value = self.value(part.value)
                self.budget.pay(value)
                only_plain(value)
                parts.append(repr(value) if part.conversion == ord("r") else str(value))
            else:
                raise NotRun("such a format is not known")
        return "".join(parts)

    def _Subscript(self, node: ast.Subscript) -> Any:
        held, at = self.value(node.value), self.value(node.slice)
        if not isinstance(held, str | bytes | list | tuple | dict | range):
            raise TypeError
        self.budget.pay(held if isinstance(at, slice) else at)
        self.budget.spend(len(held) // 64)
        return held[at]

    def _Slice(self, node: ast.Slice) -> Any:
        ends = [node.lower, node.upper, node.step]
        return slice(*(None if end is None else self.value(end) for end in ends))

    def _BinOp(self, node: ast.BinOp) -> Any:
        return self._binary(self.value(node.left), node.op, self.value(node.right))

    def _binary(self, left: Any, op: ast.operator, right: Any) -> Any:
        do = BINARY.get(type(op).__name__)
        if do is None:
            raise NotRun("such an operation is not known")
        only_plain(left, right)
        self.budget.pay(left, right)
        made = checked(do(left, right))
        if isinstance(made, str | bytes | list | tuple):
            self.budget.spend(len(made) // (8 if isinstance(made, str | bytes) else 1))
        return made

    def _UnaryOp(self, node: ast.UnaryOp) -> Any:
        value = self.value(node.operand)
        if isinstance(node.op, ast.Not):
            return not value
        if not isinstance(value, int | float):
            raise TypeError
        if isinstance(node.op, ast.USub):
            return -value
        return +value if isinstance(node.op, ast.UAdd) else ~value  # type: ignore[operator]

    def _BoolOp(self, node: ast.BoolOp) -> Any:
        stop = isinstance(node.op, ast.Or)
        for part in node.values:
            value = self.value(part)
            if bool(value) is stop:
                return value
        return value

    def _Compare(self, node: ast.Compare) -> Any:
        left = self.value(node.left)
        for op, part in zip(node.ops, node.comparators, strict=True):
            right = self.value(part)
            self.budget.pay(left, right)
            if not COMPARE[type(op).__name__](left, right):
                return False
            left = right
        return True

    def _IfExp(self, node: ast.IfExp) -> Any:
        return self.value(node.body if self.value(node.test) else node.orelse)

    def _NamedExpr(self, node: ast.NamedExpr) -> Any:
        value = self.value(node.value)
        self.assign(node.target, value)
        return value

    def _Lambda(self, node: ast.Lambda) -> Any:
        return self.function(node.args, node.body)

    def _ListComp(self, node: ast.ListComp) -> Any:
        return [inner.value(node.elt) for inner in self._each(node.generators)]

    _GeneratorExp = _ListComp

    def _SetComp(self, node: ast.SetComp) -> Any:
        values = [self._hashable(inner.value(node.elt)) for inner in self._each(node.generators)]
        pay_for_function(self.budget, set, [values])
        return set(values)

    def _DictComp(self, node: ast.DictComp) -> Any:
        found: dict[Any, Any] = {}
        for inner in self._each(node.generators):
            self.budget.spend(len(found) // 64)
            found[self._hashable(inner.value(node.key))] = inner.value(node.value)
        return found

    def _hashable(self, value: Any) -> Any:
        self.budget.pay(value)
        return value

    def _each(self, generators: list[ast.comprehension]) -> Iterator[Evaluator]:
        inner = type(self)(self.budget, self, self.depth)
        yield from inner._nested(generators)

    def _nested(self, generators: list[ast.comprehension]) -> Iterator[Evaluator]:
        if not generators:
            yield self
            return
        first, *rest = generators
        for value in self.elements(self.value(first.iter)):
            self.assign(first.target, value)
            if all(self.value(test) for test in first.ifs):
                yield from self._nested(rest)

    def assign(self, target: ast.expr, value: Any) -> None:
        self.budget.spend(1)
        if isinstance(target, ast.Name):
            self.store(target.id, value)
        elif isinstance(target, ast.Subscript):
            held = self.value(target.value)
            if not isinstance(held, list | dict):
                raise TypeError
            if isinstance(target.slice, ast.Slice):
                value = listed(self.budget, value)
            at = self.value(target.slice)
            self.budget.pay(at)
            self.budget.spend(len(held) // 64)
            held[at] = value
            checked(held)
        elif isinstance(target, ast.Tuple | ast.List):
            values = listed(self.budget, value)
            starred = [i for i, part in enumerate(target.elts) if isinstance(part, ast.Starred)]
            if starred:
                (at,) = starred
                after = len(target.elts) - at - 1
                if len(values) < len(target.elts) - 1:
                    raise ValueError
                end = len(values) - after
                values = [*values[:at], values[at:end], *values[end:]]
            if len(values) != len(target.elts):
                raise ValueError
            for part, one in zip(target.elts, values, strict=True):
                self.assign(part.value if isinstance(part, ast.Starred) else part, one)
        else:
            raise NotRun("such an assignment is not known")

    def store(self, name: str, value: Any) -> None:
        self.elsewhere.get(name, self).names[name] = value

    def elements(self, values: Any) -> Iterator[Any]:
        """As Python does, a list that grows meanwhile is followed."""
        if not isinstance(values, list):
            if isinstance(values, dict | set):
                size = len(values)
                for value in listed(self.budget, values):
                    if len(values) != size:
                        raise NotRun("it changes what it walks along")
                    yield value
                return
            yield from listed(self.budget, values)
            return
        at = 0
        while at < len(values):
            self.budget.spend(1)
            yield values[at]
            at += 1

    def function(self, args: ast.arguments, body: list[ast.stmt] | ast.expr) -> Function:
        if args.kwonlyargs or args.kwarg:
            raise NotRun("such arguments are not known")
        return Function(
            [arg.arg for arg in (*args.posonlyargs, *args.args)],
            [self.value(default) for default in args.defaults],
            args.vararg.arg if args.vararg else None,
            body,
            self,
        )

    # -- calls ------------------------------------------------------------------------------

    def _Call(self, node: ast.Call) -> Any:
        args = self._items(node.args)
        named: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise NotRun("such a call is not known")
            named[keyword.arg] = self.value(keyword.value)
        if isinstance(node.func, ast.Attribute):
            return self._call_method(node.func, args, named)
        return self.call(self.value(node.func), args, named)

    def _call_method(self, node: ast.Attribute, args: list[Any], named: dict[str, Any]) -> Any:
        if isinstance(node.value, ast.Name) and node.value.id in ("math", "str", "dict"):
            made = self._call_static(node.value.id, node.attr, args)
            if made is not NotImplemented:
                return made
        value = self.value(node.value)
        found = method(value, node.attr)
        if node.attr == "sort" and (key := named.pop("key", None)) is not None:
            value[:] = self._sorted(list(value), key, bool(named.get("reverse")))
            return None
        only_plain(*args, *named.values())
        pay_for_call(self.budget, value, node.attr, args, named)
        result = found(*args, **named)
        checked(value)
        return result

    def _call_static(self, name: str, attribute: str, args: list[Any]) -> Any:
        self.budget.pay(*args)
        if name == "math" and attribute in MATHS:
            return MATHS[attribute](*args)
        if name == "dict" and attribute == "fromkeys":
            pay_for_function(self.budget, dict, args)
            return dict.fromkeys(*args)
        if name == "str" and attribute == "maketrans":
            return str.maketrans(*args)
        return NotImplemented

    def call(self, function: Any, args: list[Any], named: dict[str, Any]) -> Any:
        """Call a function of the program, or a listed one."""
        if isinstance(function, Function):
            return self._call_own(function, args, named)
        lazy = _LAZY_BY_ID.get(id(function))
        if lazy is not None:
            return lazy(self, args, named)
        key = named.pop("key", None) if function in (sorted, min, max) else None
        only_plain(*args, *named.values())
        self.budget.pay(*args, *named.values())
        if key is not None:
            if function is sorted:
                return self._sorted(listed(self.budget, args[0]), key, bool(named.get("reverse")))
            values = listed(self.budget, args[0]) if len(args) == 1 else args
            best: dict[int, Any] = {i: self.call(key, [v], {}) for i, v in enumerate(values)}
            return values[function(best, key=best.__getitem__)]
        if function not in TYPES.values() and function not in FUNCTIONS.values():
            raise TypeError
        pay_for_function(self.budget, function, args)
        return function(*args, **named)

    def _sorted(self, values: list[Any], key: Any, reverse: bool) -> list[Any]:
        keys = [self.call(key, [value], {}) for value in values]
        self.budget.pay(keys)
        order = sorted(range(len(values)), key=keys.__getitem__, reverse=reverse)
        return [values[i] for i in order]

    def _call_own(self, function: Function, args: list[Any], named: dict[str, Any]) -> Any:
        if self.depth >= MAX_CALLS:
            raise NotRun("it calls itself too deeply")
        inner = type(self)(self.budget, function.outer, self.depth + 1)
        names = function.names
        if len(args) > len(names) and function.rest is None:
            raise TypeError
        inner.names |= dict(zip(names, args, strict=False))
        if function.rest is not None:
            inner.names[function.rest] = tuple(args[len(names) :])
        if any(name in inner.names or name not in names for name in named):
            raise TypeError
        inner.names |= named
        defaulted = names[len(names) - len(function.defaults) :]
        for name, value in zip(defaulted, function.defaults, strict=True):
            inner.names.setdefault(name, value)
        if any(name not in inner.names for name in names):
            raise TypeError
        if isinstance(function.body, ast.expr):
            return inner.value(function.body)
        return inner.call_body(function.body)


def _range(frame: Evaluator, args: list[Any], named: dict[str, Any]) -> Any:
    return checked_range(range(*args))


def checked_range(values: range) -> range:
    if len(values) > MAX_RANGE:
        raise NotRun("a range is too long")
    return values


def _map(frame: Evaluator, args: list[Any], named: dict[str, Any]) -> Any:
    function, *many = args
    rows = zip(*(listed(frame.budget, values) for values in many), strict=False)
    return [frame.call(function, list(row), {}) for row in rows]


def _filter(frame: Evaluator, args: list[Any], named: dict[str, Any]) -> Any:
    function, values = args
    return [
        value
        for value in listed(frame.budget, values)
        if (value if function is None else frame.call(function, [value], {}))
    ]


def _isinstance(frame: Evaluator, args: list[Any], named: dict[str, Any]) -> Any:
    value, kinds = args
    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
    if not all(kind in TYPES.values() for kind in wanted):
        raise NotRun("such a type is not known")
    return isinstance(value, wanted)


def _type(frame: Evaluator, args: list[Any], named: dict[str, Any]) -> Any:
    (value,) = args
    if type(value) not in TYPES.values():
        raise NotRun("such a type is not known")
    return type(value)


def _print(frame: Evaluator, args: list[Any], named: dict[str, Any]) -> Any:
    return None


_LAZY: dict[str, Callable[[Evaluator, list[Any], dict[str, Any]], Any]] = {
    "range": _range,
    "map": _map,
    "filter": _filter,
    "isinstance": _isinstance,
    "type": _type,
    "print": _print,
}
_LAZY_BY_ID = {id(function): function for function in _LAZY.values()}
