"""Every condition, reason and error code that the source can say, read from the source itself.

A reason is the argument of one of a few calls (`Blocker("Starting", ...)`, or
`conditions.add("Ready", False, "Missed", ...)`), a code the keyword `code=`. What is not a literal
there is followed to where its name gets its values in the same function; what cannot be followed is
an error, not a gap.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPERATOR = ROOT / "operator" / "tandem_operator"
SERVERS = {
    "router": ROOT / "router" / "tandem_router",
    "worker": ROOT / "worker" / "tandem_worker",
}

#: Calls that take a reason, and the place of it.
REASON_AT = {"Blocker": 0, "Problem": 1, "_refusal": 0, "add": 2, "condition": 3, "News": 1}
#: Calls that take a condition's type, and the place of it.
TYPE_AT = {"Problem": 0, "add": 0, "condition": 1}
#: Values of a field that is a reason by its own name.
BY_FIELD = {"kind": {"Length", "Fixed"}}

WORD = re.compile(r"^[A-Z][A-Za-z]{2,}$")


class UnreadableError(Exception):
    """The source says something that this reader cannot follow."""


@cache
def modules(folder: Path) -> tuple[tuple[Path, ast.Module], ...]:
    """Every module of a package as it stands, but for those of tests."""
    paths = [p for p in sorted(folder.rglob("*.py")) if "testing" not in p.parts]
    return tuple((path, ast.parse(path.read_text())) for path in paths)


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _words(node: ast.AST) -> set[str]:
    """Every word in capitals below a node."""
    return {
        n.value
        for n in ast.walk(node)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and WORD.match(n.value)
    }


def texts(node: ast.AST) -> set[str]:
    """Every text below a node."""
    return {
        n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }


def _bound(name: str, scope: ast.AST) -> list[ast.AST]:
    """The expressions that a name gets its value from in a function."""
    found: list[ast.AST] = []
    for node in ast.walk(scope):
        targets: list[ast.AST] = []
        value: ast.AST | None = None
        if isinstance(node, ast.Assign):
            targets, value = list(node.targets), node.value
        elif isinstance(node, ast.For | ast.comprehension):
            targets, value = [node.target], node.iter
        elif isinstance(node, ast.NamedExpr | ast.AnnAssign):
            targets, value = [node.target], node.value
        if value is None:
            continue
        for target in targets:
            rows = [v for v in getattr(value, "elts", []) if isinstance(v, ast.Tuple)]
            if isinstance(target, ast.Tuple) and isinstance(node, ast.For) and rows:
                pairs = [p for r in rows for p in zip(target.elts, r.elts, strict=False)]
            elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=False))
            elif isinstance(target, ast.Tuple) and isinstance(value, ast.IfExp):
                pairs = []
                for branch in (value.body, value.orelse):
                    if isinstance(branch, ast.Tuple):
                        pairs += list(zip(target.elts, branch.elts, strict=False))
            elif isinstance(target, ast.Tuple):
                pairs = [(t, value) for t in target.elts]
            else:
                pairs = [(target, value)]
            found += [v for t, v in pairs if isinstance(t, ast.Name) and t.id == name]
    return found


def _scope_of(tree: ast.Module, call: ast.Call) -> ast.AST:
    """The innermost function around a call; the module where there is none."""
    inner: ast.AST = tree
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.lineno <= call.lineno <= (node.end_lineno or 0)
            and (isinstance(inner, ast.Module) or node.lineno >= inner.lineno)  # type: ignore[attr-defined]
        ):
            inner = node
    return inner


def _parameters(scope: ast.AST) -> set[str]:
    if not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
        return set()
    return {a.arg for a in [*scope.args.args, *scope.args.kwonlyargs]}


def _default(name: str, scope: ast.AST) -> set[str]:
    """The default of a parameter, where it is a text."""
    if not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
        return set()
    args = scope.args
    pairs = [*zip(reversed(args.args), reversed(args.defaults), strict=False)]
    pairs += [(a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True) if d]
    values = [d.value for a, d in pairs if a.arg == name and isinstance(d, ast.Constant)]
    return {v for v in values if isinstance(v, str)}


def _reason(node: ast.AST, scope: ast.AST, tree: ast.Module, where: str) -> set[str]:
    if isinstance(node, ast.Constant):
        return {str(node.value)}
    if isinstance(node, ast.IfExp):
        return _reason(node.body, scope, tree, where) | _reason(node.orelse, scope, tree, where)
    if isinstance(node, ast.Attribute | ast.Starred):
        return set()  # handed on: found where it was made, or in _ORDER
    if isinstance(node, ast.Subscript):
        base = node.value
        if isinstance(base, ast.Name) and (bound := _bound(base.id, scope)):
            return {w for v in bound for w in _words(v)}
        return set()  # of a status that was written before
    if isinstance(node, ast.Call):
        name = _called(node)
        for other in ast.walk(tree):
            if isinstance(other, ast.FunctionDef) and other.name == name:
                return _words(other)
    if isinstance(node, ast.Name):
        if bound := _bound(node.id, scope):
            out: set[str] = set()
            for value in bound:
                if isinstance(value, ast.Attribute):
                    out |= BY_FIELD.get(node.id, set())
                elif isinstance(value, ast.Tuple):
                    out |= _words(value)
                else:
                    out |= _reason(value, scope, tree, where)
            return out
        if node.id in _parameters(scope):
            return set()  # handed on by the caller
    raise UnreadableError(f"{where}: {ast.unparse(node)} cannot be followed to its words")


@cache
def conditions() -> tuple[set[str], set[str]]:
    """(types, reasons) of conditions that the operator writes."""
    types: set[str] = set()
    reasons: set[str] = set()
    for path, tree in modules(OPERATOR):
        if path.relative_to(OPERATOR).parts[0] not in ("plan", "reconcile"):
            continue
        for order in _bound("_ORDER", tree):
            reasons |= _words(order)
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            name = _called(call)
            at = REASON_AT.get(name)
            if at is None or len(call.args) <= at or (name == "add" and len(call.args) < 3):
                continue
            where = f"{path.relative_to(ROOT)}:{call.lineno}"
            scope = _scope_of(tree, call)
            reasons |= _reason(call.args[at], scope, tree, where)
            if name in TYPE_AT:
                types |= _reason(call.args[TYPE_AT[name]], scope, tree, where)
    return types, {r for r in reasons if r}


@cache
def error_codes() -> dict[str, dict[str, set[int]]]:
    """Per code, who says it (router, worker) and with which HTTP statuses."""
    found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for server, folder in SERVERS.items():
        for path, tree in modules(folder):
            for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
                for keyword in call.keywords:
                    if keyword.arg != "code" or _called(call) not in STATUS:
                        continue
                    scope = _scope_of(tree, call)
                    where = f"{path.relative_to(ROOT)}:{call.lineno}"
                    statuses = _statuses(call, scope)
                    for code in _codes(keyword.value, scope, where):
                        found[code][server] |= statuses
    for reason in ("tenant", "budget", "max-cost", "unavailable", "slo"):
        found[reason]["router"] |= {"tenant": {403, 429}, "max-cost": {400}}.get(reason, {429})
    return {code: dict(by) for code, by in sorted(found.items())}


#: Calls that make an error object, with the status where none is named.
STATUS = {
    "ApiError": None,
    "bad_request": 400,
    "overloaded": 429,
    "RequestError": 400,
    "wrong": 400,
    "ErrorEvent": 500,
    "Failed": 500,
}


def _statuses(call: ast.Call, scope: ast.AST) -> set[int]:
    default = STATUS[_called(call)]
    given: ast.AST | None = next((k.value for k in call.keywords if k.arg == "status"), None)
    if _called(call) == "ApiError" and call.args:
        given = call.args[0]
    if given is None:
        return {default} if default is not None else set()
    if isinstance(given, ast.Name):
        values = _bound(given.id, scope)
        return {v.value for v in values if isinstance(v, ast.Constant) and type(v.value) is int}
    return {
        n.value for n in ast.walk(given) if isinstance(n, ast.Constant) and type(n.value) is int
    }


def _codes(node: ast.AST, scope: ast.AST, where: str) -> set[str]:
    if isinstance(node, ast.Constant):
        return {node.value} if isinstance(node.value, str) else set()
    if isinstance(node, ast.IfExp):
        return _codes(node.body, scope, where) | _codes(node.orelse, scope, where)
    if isinstance(node, ast.JoinedStr):
        out = {""}
        for part in node.values:
            inner = part.value if isinstance(part, ast.FormattedValue) else part
            ends = _codes(inner, scope, where)
            out = {a + b for a in out for b in ends}
        return out
    if isinstance(node, ast.Attribute):
        return set()  # an event's, found where it was made
    if isinstance(node, ast.Call):
        return set()  # str(decision.reason): a request's reason
    if isinstance(node, ast.Name):
        if bound := _bound(node.id, scope):
            return {c for value in bound for c in _codes(value, scope, where)}
        if node.id in _parameters(scope):
            return _default(node.id, scope)  # handed on by the caller
    raise UnreadableError(f"{where}: code={ast.unparse(node)} cannot be followed to its words")


def request_reasons() -> dict[str, str]:
    """The words of `x-tandem-reason`, with the comment that stands beside each."""
    path = SERVERS["router"] / "policy" / "terms.py"
    body = path.read_text().split("class Reason(StrEnum):", 1)[1].split("\nclass ", 1)[0]
    found = dict(re.findall(r'^    [A-Z_]+ = "([a-z-]+)"  # (.+)$', body, re.M))
    if len(found) != len(re.findall(r'^    [A-Z_]+ = "', body, re.M)):
        raise UnreadableError(f"{path}: each Reason needs its comment")
    return {**found, "cached": "the answer was in the cache"}
