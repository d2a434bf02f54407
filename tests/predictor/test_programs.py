"""Short programs of a question give what Python gives, and cannot do or cost anything else."""

from __future__ import annotations

import ast
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_router.predictor.cascade.final_answer import final_text
from tandem_router.predictor.cascade.formulas import checked_formulas, value_of
from tandem_router.predictor.cascade.programs import NotRun, run
from tandem_router.predictor.cascade.recomputed import Agreement, agreement, program_of

DATA = Path(__file__).parents[3] / "shared/data/routing2/crux_qwen7b_72b_dev.jsonl.gz"

PROGRAMS = [
    ("def f(n):\n    return n * f(n - 1) if n else 1", "f(10)"),
    (
        "def f(s):\n    d = {}\n    for c in s:\n        d[c] = d.get(c, 0) + 1\n    return d",
        "f('abca')",
    ),
    (
        "def f(a):\n    for x in a:\n        if x < 5:\n            a.append(x + 3)\n    return a",
        "f([1])",
    ),
    ("def f(a, *b, c=3):\n    return a, b, c", "1"),
    ("def f(a, b=2, *c):\n    return [a, b, *c]", "f(1), f(1, 3, 4)"),
    ("def f(t):\n    a, *b = t\n    return b[::-1] + [a]", "f('xyz')"),
    (
        "def f(x):\n    try:\n        return x['k']\n    except (KeyError, TypeError):\n"
        "        return -1",
        "f({})",
    ),
    (
        "def f(n):\n    i = 0\n    while True:\n        i += 2\n        if i > n:\n"
        "            break\n    else:\n        i = 0\n    return i",
        "f(7)",
    ),
    (
        "def f(x):\n    def g(y):\n        nonlocal x\n        x += y\n        return x\n"
        "    return g(1) + g(2)",
        "f(10)",
    ),
    ("x = 1\ndef f():\n    global x\n    x = 5\nf()", "x"),
    ("f = lambda a, k: sorted(a, key=lambda v: -v)[:k]", "f([3, 9, 5], 2)"),
    ("def f(s):\n    return '%s-%d' % (s.upper(), len(s)) + f'{s!r}{s}'", "f('ab')"),
    (
        "def f(a):\n    del a[0]\n    a.sort(key=len, reverse=True)\n    return a",
        "f(['x', 'a', 'bb'])",
    ),
    ("", "[i * j for i in range(4) if i % 2 for j in range(i)]"),
    ("", "{k: v for k, v in zip('abc', range(3))}, {1, 2} | {3}"),
    ("", "max('b', 'a'), max([1, -9], key=abs), sum(map(int, '123')), list(filter(None, [0, 1]))"),
    ("", "'a-b-c'.rsplit('-', maxsplit=1), 'x'.center(5, '*'), '{}:{:>3}'.format(1, 2)"),
    (
        "",
        "'abc'.translate(str.maketrans('a', 'z')), dict.fromkeys('ab', 0), 7 // 2, -7 % 3, 2 ** 10",
    ),
    ("", "isinstance(True, int), type(3) == int, 1 < 2 < 3, not [], None is None, 'a' in 'cat'"),
]


@pytest.mark.parametrize(("source", "question"), PROGRAMS)
def test_a_program_gives_what_python_gives(source, question):
    world: dict[str, object] = {}
    try:
        exec(source, world)  # noqa: S102 - the programs are ours
        expected = eval(question, world)  # noqa: S307
    except SyntaxError:  # pragma: no cover
        raise AssertionError(source) from None
    if "c=3" in source:  # keyword-only arguments are beyond what is known
        with pytest.raises(NotRun):
            run(source, question)
    else:
        assert run(source, question) == expected


@pytest.mark.parametrize(
    "question",
    [
        "__import__('os')",
        "open('/etc/passwd')",
        "eval('1')",
        "exec('1')",
        "globals()",
        "().__class__",
        "().__class__.__bases__",
        "''.format_map({})",
        "getattr(1, 'real')",
        "'{0.__class__}'.format(1)",
        "'{0[0]}'.format('a')",
        "(lambda: 0).__globals__",
        "len.__self__",
        "str.mro()",
        "type(1).mro()",
        "type('X', (), {})",
        "print.__self__",
        "[].__reduce__()",
        "'x'.encode('punycode')",
        "'x'.encode('zlib_codec')",
        "input()",
        "(x for x in [1]).gi_frame",
        "map(print, [1]).__next__()",
        "sorted([1], key=open)",
        "vars()",
        "dir()",
        "breakpoint()",
        "memoryview(b'')",
        "compile('1', '', 'eval')",
        "await x",
        "1j",
        "...",
        "super()",
        "object()",
        "type",
        "len",
    ],
)
def test_nothing_leads_out_of_a_program(question):
    with pytest.raises(NotRun):
        run("", question)


@pytest.mark.parametrize(
    "source",
    [
        "import os",
        "from os import path",
        "class A: pass",
        "async def f(): pass",
        "with open('x'): pass",
        "@staticmethod\ndef f(): pass",
        "def f():\n    yield 1",
        "x: int = open",
        "raise SystemExit",
        "del ().__class__",
        "(1).real = 2",
        "match 1:\n    case _: pass",
    ],
)
def test_statements_that_are_not_known_end_the_run(source):
    with pytest.raises(NotRun):
        run(source, "1")


@pytest.mark.parametrize(
    ("source", "question"),
    [
        ("while True: pass", "1"),
        ("def f(): return f()", "f()"),
        ("x = 'a'\nwhile True: x = x + x", "x"),
        ("x = [0]\nwhile True: x += x", "x"),
        ("x = [0]\nfor y in x: x.append(y)", "x"),
        ("x = []\nfor i in range(60): x = [x, x]", "str(x)"),
        ("x = []\ny = []\nfor i in range(60):\n    x = [x, x]\n    y = [y, y]", "x == y"),
        ("x = ()\nfor i in range(9000): x = (x,)", "hash(x)"),
        ("x = []\nx.append(x)", "x"),
        ("x = 2\nwhile True: x = x * x", "x"),
        ("", "'a' * 10 ** 12"),
        ("", "[0] * 10 ** 12"),
        ("", "10 ** 10 ** 10"),
        ("", "1 << 10 ** 10"),
        ("", "'a'.ljust(10 ** 12)"),
        ("", "'%1000000000d' % 1"),
        ("", "'%*d' % (10 ** 9, 1)"),
        ("", "'{:1000000000}'.format(1)"),
        ("", "('a' * 9999).join(['b'] * 9999)"),
        ("", "('a' * 9999).replace('a', 'b' * 9999)"),
        ("", "round(5, -10 ** 9)"),
        ("", "'{:{}}'.format('a', 10 ** 9)"),
        ("", "('a' * 9999).join('b' * 9999)"),
        ("", "'{:>{w}}'.format('a', w=10 ** 9)"),
        ("", "list(range(10 ** 12))"),
        ("", "sum([[1]] * 9999, [])"),
        ("", "'\\t'.expandtabs(10 ** 12)"),
        ("", "'a'.translate({97: 'b' * 9999}) * 9999"),
        ("", "{i * (2 ** 61 - 1) for i in range(9999)}"),
        ("d = {}\nfor i in range(9999): d[i * (2 ** 61 - 1)] = 0", "1"),
        ("", "sorted(range(9999), key=lambda v: [v] * 9999)"),
        ("", "[x for a in range(999) for b in range(999) for x in range(999)]"),
        ("", "-" * 3999 + "1"),
        ("", "(" * 1500 + ")" * 1500),
        ("", "[" * 1900),
        ("", "not " * 900 + "1"),
        ("x = 1\n" * 700, "x"),
        ("", "1 if 1 else " * 300 + "1"),
        ("", "lambda: " * 400 + "1"),
        ("", "a" + ".b" * 1900),
        ("", "a" + "[0]" * 1000),
    ],
)
def test_no_program_takes_more_than_its_work(source, question):
    """Unbounded, each of these takes minutes, all memory or the interpreter's stack."""
    with pytest.raises(NotRun):
        run(source, question)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="()[]{}'\"\\:,.=+-*%<> \nabfx01ifordelambnt", max_size=120))
def test_any_text_is_run_or_not_run(text):
    for call in (lambda: run(text, "x"), lambda: run("", text)):
        try:
            call()
        except NotRun:
            pass


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-99, 99) | st.text("ab'\"\n ", max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner)
        ),
        max_leaves=6,
    )
)
def test_every_literal_is_its_value(value):
    assert run("", repr(value)) == value


QUESTIONS = [
    "[PYTHON]\ndef f(x):\n    return x + 1\nassert f(2) == ??\n[/PYTHON]",
    "What does this print?\n```python\ndef f(x):\n    return x + 1\nprint(f(2))\n```",
    "```\ndef f(x):\n    return x + 1\n```\nWhat is the output of `f(2)`?",
    "Given\n\ndef f(x):\n    return x + 1\n\nwhat will f(2) return?",
    "```py\ny = 1\nx = 2 + y\nprint(x)\n```\nWhat is the result?",
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_a_question_asks_of_its_program_is_found_and_held_against_the_answer(question):
    assert agreement(question, "3") is Agreement.AGREES
    assert agreement(question, "4") is Agreement.DIFFERS
    assert agreement(question, "") is Agreement.UNKNOWN


@pytest.mark.parametrize(
    "question",
    [
        "Write a function f(x) that returns x + 1.",
        "```python\ndef f(x):\n    return x + 1\n```\nDescribe this function.",
        "```python\ndef f(x):\n    return x + 1\n```\nCompare the output of f(1) and f(2).",
        "```python\nimport os\nprint(os.getcwd())\n```\nWhat is the output?",
        "What is 3 + 4?",
    ],
)
def test_a_question_without_a_program_that_is_asked_for_says_nothing(question):
    assert agreement(question, "3") is Agreement.UNKNOWN


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ('```json\n{"reasoning": "the answer is 4",\n "answer": "-21"\n}\n```', "-21"),
        ('{"answer": [1, 2], "why": 1}', '[1, 2], "why": 1'),
        ('{"reasoning": "x", "answer": "[\'a\']"}', "['a']"),
        ("So it is.\n#### 540\n", "540"),
        ("Thus \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("The answer is $12$.", "12"),
        ("assert f(2) == 3", "3"),
        ("First this.\nThen `that`", "First this.\nThen `that`".splitlines()[-1].strip("`")),
        ("", ""),
    ],
)
def test_the_stated_result_is_found(answer, final):
    assert final_text(answer) == final


def test_formulas_are_computed_on_both_sides():
    assert value_of(r"\frac{12!}{2! \cdot 4!}") == pytest.approx(9979200.0)
    assert value_of(r"2\sqrt{9} + \binom{5}{2} - 3^2") == 7.0
    assert value_of("1,024") == 1024.0
    assert value_of("5²") is None
    assert value_of(r"\frac{x}{2}") is None
    assert value_of(r"\frac{1}{0}") is None
    assert checked_formulas(r"so \(3 \times 4 = 12\) and \[ 5! = 125 \]") == (2, 1)
    assert checked_formulas(r"\(x = 3\), \(2\pi \approx 6.28\)") == (1, 0)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="\\frac{}()[]^!+-*/0123456789 =sqtpibnom$&,", max_size=200))
def test_any_formula_is_read_within_bounds(text):
    value_of(text)
    checked_formulas(f"\\({text}\\)")


def test_programs_of_published_questions_give_what_their_graders_expected():
    """CRUXEval questions: answers that agree were graded right, others wrong."""
    if not DATA.exists():
        pytest.skip(f"{DATA} is not here")
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = [
        (agreement(row["prompt"], final_text(row["responses"][tier])), row["quality"][tier])
        for row in rows
        for tier in ("small", "large")
    ]
    known = [(said is Agreement.AGREES, good == 1.0) for said, good in found if said.value]

    assert len(known) > 0.9 * len(found)
    assert sum(said == good for said, good in known) > 0.97 * len(known)


def test_a_program_is_found_in_no_question_of_other_kinds():
    assert program_of("def f(x): what is this?") is None
    assert program_of("```python\n" + "x = 1\n" * 2000 + "```\nprint(x)?") is None
    assert ast.parse("1")  # the standard library's own reader is what is trusted with syntax
