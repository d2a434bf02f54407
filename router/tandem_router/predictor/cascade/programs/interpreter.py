"""Run a short Python program by walking its syntax tree, on plain values and a budget of work.

Nothing of Python's own evaluation is used: a name is a variable of the program, one of the listed
functions, or unknown; an attribute can only be called, and only where `values.py` lists it. What
is not known here (imports, classes, generators, files) ends the run with :class:`NotRun`, which
says nothing about the program. Meant for questions such as "what does f(3) return?".
"""

from __future__ import annotations

import ast
import re
from typing import Any

from tandem_router.predictor.cascade.programs.evaluator import Evaluator
from tandem_router.predictor.cascade.programs.values import Budget, NotRun, Plain, checked, listed

MAX_SOURCE = 4_000
MAX_NESTED = 40
#: Escapes and numbers that Python warns of.
_WARNED_OF = re.compile(
    r"(?<!\\)(?:\\\\)*\\[^\n\\'\"abfnrtv0-7xNuU]|\d(?:and|or|if|else|in|is|not)\b"
)
#: What a program may raise and catch.
ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (
        Exception, ValueError, TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError,
        LookupError, ArithmeticError, OverflowError, AssertionError,
    )
}  # fmt: skip


def run(source: str, question: str) -> Plain:
    """The value of the expression `question` after the statements of `source`.

    Raises:
        NotRun: it is too long, takes too much work, raises, or holds what is not known here.
    """
    budget = Budget()
    try:
        program, asked = _parsed(source, "exec"), _parsed(question, "eval")
        world = Frame(budget)
        world.run(program.body)
        value = world.value(asked.body)
        budget.pay(value)
    except NotRun:
        raise
    except Exception as error:
        # Whatever it raises is its own affair.
        raise NotRun(f"it ends with {type(error).__name__}") from None
    if not _is_plain(value):
        raise NotRun("it gives no plain value")
    result: Plain = value
    return result


def _parsed(source: str, mode: str) -> Any:
    if len(source) > MAX_SOURCE or source.count("\n") > MAX_SOURCE // 10:
        raise NotRun("it is too long")
    depth = most = 0
    for char in source:
        depth += (char in "([{") - (char in ")]}")
        most = max(most, depth)
    if most > MAX_NESTED or _longest_run(source) > MAX_NESTED:
        raise NotRun("it is nested too deeply")
    if _WARNED_OF.search(source):
        raise NotRun("it is no Python that all versions read alike")
    try:
        return ast.parse(source, mode=mode)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NotRun("it is no Python") from None


def _longest_run(source: str) -> int:
    """Of signs and words that nest without brackets: `- - - x`, `not not x`."""
    longest = 0
    for line in source.splitlines():
        nesting = sum(line.count(sign) for sign in "-+~.")
        nesting += sum(line.count(word) for word in ("not", "lambda", "else", "**", "await"))
        indent = (len(line) - len(line.lstrip())) // 2
        longest = max(longest, min(nesting, len(line)), indent)
    return longest


class _Jump(Exception):
    """A statement that leaves a loop or a function."""


class _Return(_Jump):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class _Break(_Jump):
    pass


class _Continue(_Jump):
    pass


class Frame(Evaluator):
    """The statements of one call."""

    def call_body(self, body: list[ast.stmt]) -> Any:
        try:
            self.run(body)
        except _Return as left:
            return left.value
        return None

    def run(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self.budget.spend(1)
            step = getattr(self, f"_{type(statement).__name__}", None)
            if step is None:
                raise NotRun(f"{type(statement).__name__} is not known")
            step(statement)

    def _Expr(self, node: ast.Expr) -> None:
        self.value(node.value)

    def _Pass(self, node: ast.Pass) -> None:
        pass

    def _Return(self, node: ast.Return) -> None:
        raise _Return(None if node.value is None else self.value(node.value))

    def _Break(self, node: ast.Break) -> None:
        raise _Break

    def _Continue(self, node: ast.Continue) -> None:
        raise _Continue

    def _Assign(self, node: ast.Assign) -> None:
        value = self.value(node.value)
        for target in node.targets:
            self.assign(target, value)

    def _AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.assign(node.target, self.value(node.value))

    def _AugAssign(self, node: ast.AugAssign) -> None:
        target, right = node.target, self.value(node.value)
        if isinstance(target, ast.Name):
            self.store(target.id, self._added(self._name(target.id), node.op, right))
        elif isinstance(target, ast.Subscript):
            held, at = self.value(target.value), self.value(target.slice)
            held[at] = self._added(held[at], node.op, right)
        else:
            raise NotRun("such an assignment is not known")

    def _added(self, left: Any, op: ast.operator, right: Any) -> Any:
        if isinstance(left, list) and isinstance(op, ast.Add):
            left.extend(listed(self.budget, right))
            return checked(left)
        if isinstance(left, set | dict):
            raise NotRun("such an assignment is not known")
        return self._binary(left, op, right)

    def _Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name):
                del self.names[target.id]
            elif isinstance(target, ast.Subscript):
                held = self.value(target.value)
                self.budget.pay(held)
                del held[self.value(target.slice)]
            else:
                raise NotRun("such a deletion is not known")

    def _If(self, node: ast.If) -> None:
        self.run(node.body if self.value(node.test) else node.orelse)

    def _While(self, node: ast.While) -> None:
        while self.value(node.test):
            if not self._once(node.body):
                return
        self.run(node.orelse)

    def _For(self, node: ast.For) -> None:
        for value in self.elements(self.value(node.iter)):
            self.assign(node.target, value)
            if not self._once(node.body):
                return
        self.run(node.orelse)

    def _once(self, body: list[ast.stmt]) -> bool:
        """Whether the loop goes on."""
        try:
            self.run(body)
        except _Continue:
            return True
        except _Break:
            return False
        return True

    def _FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.decorator_list:
            raise NotRun("decorators are not known")
        if any(isinstance(part, ast.Yield | ast.YieldFrom) for part in ast.walk(node)):
            raise NotRun("generators are not known")
        self.store(node.name, self.function(node.args, node.body))

    def _Global(self, node: ast.Global) -> None:
        outermost: Evaluator = self
        while outermost.outer is not None:
            outermost = outermost.outer
        self.elsewhere |= dict.fromkeys(node.names, outermost)

    def _Nonlocal(self, node: ast.Nonlocal) -> None:
        for name in node.names:
            frame = self.outer
            while frame is not None and name not in frame.names:
                frame = frame.outer
            if frame is None:
                raise NotRun("such a variable is not known")
            self.elsewhere[name] = frame

    def _Raise(self, node: ast.Raise) -> None:
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        if not isinstance(raised, ast.Name) or raised.id not in ERRORS:
            raise NotRun("such an exception is not known")
        raise ERRORS[raised.id]

    def _Assert(self, node: ast.Assert) -> None:
        if not self.value(node.test):
            raise AssertionError

    def _Try(self, node: ast.Try) -> None:
        try:
            try:
                self.run(node.body)
            except tuple(ERRORS.values()) as error:
                if isinstance(error, _Jump | NotRun):
                    raise
                self._catch(node, error)
            else:
                self.run(node.orelse)
        finally:
            if self.budget.left > 0:
                self.run(node.finalbody)

    def _catch(self, node: ast.Try, error: Exception) -> None:
        for handler in node.handlers:
            wanted = handler.type
            names = wanted.elts if isinstance(wanted, ast.Tuple) else [wanted]
            for name in names:
                if name is not None and not (isinstance(name, ast.Name) and name.id in ERRORS):
                    raise NotRun("such an exception is not known")
                if name is None or isinstance(error, ERRORS[name.id]):
                    if handler.name:
                        raise NotRun("what exceptions say is not known")
                    self.run(handler.body)
                    return
        raise error


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(held) for key, held in value.items())
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | bytes)
