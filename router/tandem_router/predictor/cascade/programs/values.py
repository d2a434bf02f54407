"""Which values a short program may hold, what may be called on them, and what that may cost.

Numbers, texts, lists, tuples, sets and dictionaries of them: nothing that leads to the process, to
files or to other objects. Every call is paid for in advance by the size of what it reads and of
what it can make, so neither time nor memory can grow beyond the budget: a text times a billion, a
width of a billion and a list that holds itself a million times over cost more than there is.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, cast

#: What a program may hold; any nesting of these.
Plain = (
    bool
    | int
    | float
    | str
    | bytes
    | None
    | list[Any]
    | tuple[Any, ...]
    | set[Any]
    | dict[Any, Any]
)

MAX_BITS = 2048
MAX_LENGTH = 10_000
MAX_WORK = 40_000
_WIDTH = re.compile(r"\d{3,}|\*")
_FIELD = re.compile(r"\{([^{}]*)\}")
_SIMPLE_FIELD = re.compile(r"\w*(?:![rs])?(?::[^{}\d]{0,2}\d{0,2}(?:\.\d{1,2})?[a-zA-Z%,]?)?")


_CODECS = frozenset(("utf-8", "utf8", "UTF-8", "ascii", "latin-1"))


class NotRun(Exception):
    """A program that is not run: too long, too much work, or beyond what is known here."""


class Budget:
    """Work that is left, in elements looked at or made."""

    def __init__(self, work: int = MAX_WORK) -> None:
        self.left = work

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise NotRun("it takes too much work")

    def weigh(self, *values: object) -> int:
        """The number of elements and characters of values, nested ones as often as they occur."""
        total, waiting = 0, list(values)
        while waiting:
            value = waiting.pop()
            total += 1
            if isinstance(value, str | bytes):
                total += len(value) // 8
            elif isinstance(value, int):
                total += value.bit_length() // 64
            elif isinstance(value, dict):
                waiting.extend(value.keys())
                waiting.extend(value.values())
            elif isinstance(value, _MANY):
                assert isinstance(value, Collection)
                if len(value) > MAX_LENGTH:
                    raise NotRun("a value is too long")
                if not isinstance(value, range):
                    waiting.extend(value)
                else:
                    total += len(value)
            if total > self.left or len(waiting) > self.left:
                raise NotRun("it takes too much work")
        return total

    def pay(self, *values: object) -> None:
        """For reading values."""
        self.spend(self.weigh(*values))


_MANY: tuple[type, ...] = (
    list, tuple, set, range, type({}.keys()), type({}.values()), type({}.items())
)  # fmt: skip


def checked(value: Any) -> Any:
    """A value that may be kept; raises NotRun where it is too large."""
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise NotRun("a number is too long")
    if isinstance(value, str | bytes | list | tuple | set | dict) and len(value) > MAX_LENGTH:
        raise NotRun("a value is too long")
    return value


def multiplied(left: Any, right: Any) -> Any:
    """A product; of a sequence and a number only where it is short enough."""
    for many, times in ((left, right), (right, left)):
        repeated = isinstance(many, str | bytes | list | tuple) and isinstance(times, int)
        if repeated and len(many) * max(0, times) > MAX_LENGTH:
            raise NotRun("a value is too long")
    return left * right


def power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        if right < 0 and left == 0:
            raise ZeroDivisionError
        if right > 0 and left.bit_length() * right > MAX_BITS:
            raise NotRun("a number is too long")
    result = left**right
    if isinstance(result, complex):
        raise NotRun("complex numbers are not known")
    return result


def shifted(left: Any, right: Any) -> Any:
    if isinstance(right, int) and right > MAX_BITS:
        raise NotRun("a number is too long")
    return left << right


def remainder(left: Any, right: Any) -> Any:
    """Of numbers; of a text its formatting, where widths are short."""
    if isinstance(left, str):
        if _WIDTH.search(left) or "%(" in left:
            raise NotRun("such a format is not known")
    elif isinstance(left, bytes):
        raise NotRun("formatting bytes is not known")
    return left % right


BINARY: Mapping[str, Callable[[Any, Any], Any]] = MappingProxyType(
    {
        "Add": operator.add,
        "Sub": operator.sub,
        "Mult": multiplied,
        "Div": operator.truediv,
        "FloorDiv": operator.floordiv,
        "Mod": remainder,
        "Pow": power,
        "LShift": shifted,
        "RShift": operator.rshift,
        "BitOr": operator.or_,
        "BitAnd": operator.and_,
        "BitXor": operator.xor,
    }
)
COMPARE: Mapping[str, Callable[[Any, Any], Any]] = MappingProxyType(
    {
        "Eq": operator.eq,
        "NotEq": operator.ne,
        "Lt": operator.lt,
        "LtE": operator.le,
        "Gt": operator.gt,
        "GtE": operator.ge,
        "Is": operator.is_,
        "IsNot": operator.is_not,
        "In": lambda a, b: a in b,
        "NotIn": lambda a, b: a not in b,
    }
)

_METHODS: Mapping[type, frozenset[str]] = MappingProxyType(
    {
        str: frozenset(
            "capitalize casefold count encode endswith find index isalnum isalpha isascii "
            "isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle "
            "isupper lower lstrip partition removeprefix removesuffix rfind rindex "
            "rpartition rsplit rstrip split splitlines startswith strip swapcase title "
            "upper center ljust rjust zfill expandtabs join replace format translate".split()
        ),
        bytes: frozenset(("decode", "hex")),
        list: frozenset(
            "append clear copy count extend index insert pop remove reverse sort".split()
        ),
        tuple: frozenset(("count", "index")),
        dict: frozenset("clear copy get items keys pop popitem setdefault update values".split()),
        set: frozenset(
            "add clear copy difference discard intersection isdisjoint issubset issuperset pop "
            "remove symmetric_difference union update".split()
        ),
        int: frozenset(("bit_length", "bit_count")),
        float: frozenset(("is_integer",)),
    }
)
TYPES: Mapping[str, type] = MappingProxyType(
    {"str": str, "int": int, "float": float, "bool": bool, "list": list, "tuple": tuple,
     "dict": dict, "set": set}
)  # fmt: skip
#: Functions that take the values of an iterable, or one value.
FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "len": len, "abs": abs, "sum": sum, "ord": ord, "chr": chr, "bin": bin, "hex": hex,
        "oct": oct, "divmod": divmod, "round": round, "repr": repr, "any": any, "all": all,
        "min": min, "max": max, "sorted": sorted,
        "enumerate": lambda *a, **k: list(enumerate(*a, **k)),
        "zip": lambda *a: list(zip(*a, strict=False)),
        "reversed": lambda a: list(reversed(a)),
    }
)  # fmt: skip
MATHS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {name: getattr(math, name) for name in ("sqrt", "floor", "ceil", "gcd", "isqrt", "fabs")}
)


def method(value: Any, name: str) -> Callable[..., Any]:
    """What may be called on a value; NotRun for anything else, AttributeError as Python has it."""
    kind = bool if isinstance(value, bool) else type(value)
    known = _METHODS.get(int if kind is bool else kind, frozenset())
    if name not in known:
        if kind in _METHODS and not hasattr(kind, name):
            raise AttributeError(name)
        raise NotRun(f"{name} of {kind.__name__} is not known")
    found: Callable[..., Any] = getattr(value, name)
    return found


def pay_for_function(budget: Budget, function: Any, args: list[Any]) -> None:
    """What a listed function takes beyond reading its arguments once."""
    if function in (set, dict) and args and hasattr(args[0], "__len__"):
        budget.spend(len(args[0]) ** 2 // 64)  # keys may all have one hash
    if function is sum and (len(args) > 1 and not isinstance(args[1], int | float)):
        raise NotRun("such a sum is not known")
    if function is round and len(args) > 1 and isinstance(args[1], int) and abs(args[1]) > 20:
        raise NotRun("such a rounding is not known")


def pay_for_call(
    budget: Budget, value: Any, name: str, args: list[Any], named: dict[str, Any]
) -> None:
    """What a method reads and can make, before it is called."""
    budget.pay(value, *args, *named.values())
    if isinstance(value, set | dict):
        budget.spend(sum(len(arg) for arg in args if hasattr(arg, "__len__")) ** 2 // 64)
    if name in ("encode", "decode") and (named or any(arg not in _CODECS for arg in args)):
        raise NotRun("such an encoding is not known")
    if isinstance(value, str) and _most_made(value, name, args, named) > 10 * MAX_LENGTH:
        raise NotRun("a value is too long")


def _most_made(value: str, name: str, args: list[Any], named: dict[str, Any]) -> int:
    """Characters that a method of a text can make beyond what it reads."""
    made = 0
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        widths = [arg for arg in (*args, *named.values()) if isinstance(arg, int)]
        made = max([*widths, 0]) * (len(value) + 1 if name == "expandtabs" else 1)
    elif name == "join" and args and hasattr(args[0], "__len__"):
        made = len(value) * len(args[0])
    elif name == "replace" and len(args) > 1 and isinstance(args[1], str):
        made = (len(value) + 1) * len(args[1])
    elif name == "translate" and args and isinstance(args[0], dict):
        longest = max((len(to) for to in args[0].values() if isinstance(to, str)), default=0)
        made = len(value) * longest
    elif name == "format":
        fields = _FIELD.findall(value)
        nested = not value.count("{") == value.count("}") == len(fields)
        if nested or not all(map(_SIMPLE_FIELD.fullmatch, fields)):
            raise NotRun("such a format is not known")
        made = value.count("{") * sum(len(str(arg)) for arg in (*args, *named.values()))
    return made


def listed(budget: Budget, values: Any) -> list[Any]:
    """The elements of an iterable, paid for."""
    if isinstance(values, str | bytes | range) and len(values) > MAX_LENGTH:
        raise NotRun("a value is too long")
    if not isinstance(values, (str, bytes, dict, *_MANY)):
        raise TypeError("not iterable") if _is_plain(values) else NotRun("it is not known")
    found = [*cast("Iterable[Any]", values)]
    budget.spend(len(found) + 1)
    return found


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float)


_PLAIN: tuple[type, ...] = (bool, int, float, str, bytes, dict, type(None), *_MANY)


def only_plain(*values: Any) -> None:
    """Functions and types are called by us alone, never handed to Python's own."""
    if not all(isinstance(value, _PLAIN) for value in values):
        raise NotRun("such an argument is not known")
