"""Questions about numbers: sums, products, word problems, dates and units.

The worked steps do one column or one equation at a time, so that each step needs only what
stands close to it.
"""

from __future__ import annotations

from random import Random

from .question import Draft
from .wording import phrase


def add_columns(a: int, b: int) -> str:
    """Column addition from the right: digit + digit + carry = two digits, per column."""
    steps: list[str] = []
    carry = 0
    while a or b or not steps:
        total = a % 10 + b % 10 + carry
        steps.append(f"{a % 10}+{b % 10}+{carry}={total:02d}")
        a, b, carry = a // 10, b // 10, total // 10
    return " ".join(steps)


def subtract_columns(a: int, b: int) -> str:
    """Column subtraction from the right; a borrowed ten is written out as 1d."""
    steps, borrow = [], 0
    while a:
        top, low = a % 10, b % 10 + borrow
        shown = top + 10 if top < low else top
        steps.append(f"{shown}-{b % 10}-{borrow}={shown - low}")
        a, b, borrow = a // 10, b // 10, int(shown != top)
    return " ".join(steps)


def multiply_columns(a: int, b: int) -> str:
    """Product with one digit from the right: digit * digit + carry = two digits, per column."""
    steps, carry = [], 0
    while a:
        total = a % 10 * b + carry
        steps.append(f"{a % 10}*{b}+{carry}={total:02d}")
        a, carry = a // 10, total // 10
    return " ".join(steps)


_ADD = (
    "What is {a}+{b}?",
    "Add {a} and {b}.",
    "Compute {a}+{b}.",
    "How much is {a} plus {b}?",
    "Find the sum of {a} and {b}.",
    "Work out {a}+{b} for me.",
)
_SUBTRACT = (
    "What is {a}-{b}?",
    "How much is {a} minus {b}?",
    "Compute {a}-{b}.",
    "Find the difference of {a} and {b}.",
    "What is left of {a} after taking away {b}?",
    "Work out {a}-{b} for me.",
)


def sums(rng: Random, level: int) -> Draft:
    """Addition and subtraction: one digit on two, then two, three and four digits."""
    plus = rng.random() < 0.5
    if level == 1:
        a, b = rng.randint(10, 90), rng.randint(2, 9)
    else:
        low, high = 10 ** (level - 1), 10**level - 1
        a, b = rng.randint(low, high), rng.randint(low, high)
        a, b = (a, b) if plus else (max(a, b), min(a, b))
    work = add_columns(a, b) if plus else subtract_columns(a, b)
    prompt, _ = phrase(rng, _ADD if plus else _SUBTRACT, a=a, b=b)
    return Draft(f"{a}{'+' if plus else '-'}{b}", prompt, work, str(a + b if plus else a - b))


_TIMES = (
    "What is {a}*{b}?",
    "Multiply {a} by {b}.",
    "Compute {a} times {b}.",
    "How much is {a} times {b}?",
    "Find the product of {a} and {b}.",
    "Work out {a}*{b} for me.",
)


def products(rng: Random, level: int) -> Draft:
    """A number of one to four digits times one digit; level 1 is the table by heart."""
    a, b = rng.randint(max(2, 10 ** (level - 1)), 10**level - 1), rng.randint(2, 9)
    prompt, wording = phrase(rng, _TIMES, a=a, b=b)
    key = f"{a}*{b}|{wording}" if level == 1 else f"{a}*{b}"
    return Draft(key, prompt, "" if level == 1 else multiply_columns(a, b), str(a * b))


_PEOPLE = "Ann Bob Cid Dan Eve Fay Gus Hal Ida Joe Kim Leo Mia Ned Oda Pam".split()
_THINGS = "apples books coins eggs cards nuts pens shells stamps toys".split()
_GAINS = ("gets {n} more", "buys {n}", "finds {n}", "wins {n}", "is given {n}", "adds {n}")
_LOSSES = ("gives away {n}", "loses {n}", "sells {n}", "drops {n}", "lends out {n}", "breaks {n}")
_ASKS = (
    "How many {things} are there now?",
    "How many {things} does {who} have now?",
    "How many are left?",
    "What is the number of {things} at the end?",
    "How many {things} is that?",
)


def word_problems(rng: Random, level: int) -> Draft:
    """Somebody has things and gains or loses some, once per level."""
    who, things = rng.choice(_PEOPLE), rng.choice(_THINGS)
    count = rng.randint(5, 40)
    story = [rng.choice(("{who} has {n} {things}.", "{who} starts with {n} {things}."))]
    story[0] = story[0].format(who=who, n=count, things=things)
    key, steps = [f"{who}{things}{count}"], []
    for _ in range(level):
        n = rng.randint(2, 9)
        gain = count <= 9 or rng.random() < 0.5
        story.append(f"{who} {rng.choice(_GAINS if gain else _LOSSES).format(n=n)}.")
        after = count + n if gain else count - n
        steps.append(f"{count}{'+' if gain else '-'}{n}={after}")
        key.append(f"{'+' if gain else '-'}{n}")
        count = after
    ask = rng.choice(_ASKS).format(things=things, who=who)
    return Draft("".join(key), " ".join((*story, ask)), " ".join(steps), str(count))


_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_AFTER = (
    "What day is {n} days after {day}?",
    "Today is {day}. Which day is it in {n} days?",
    "It is {day}. What day comes {n} days later?",
    "Which weekday follows {day} by {n} days?",
    "If today is {day}, what is it {n} days from now?",
)
_BEFORE = (
    "What day is {n} days before {day}?",
    "Today is {day}. Which day was it {n} days ago?",
    "It is {day}. What day was {n} days earlier?",
    "If today is {day}, what was it {n} days back?",
)
_CLOCK = (
    "It is {clock}. What time is it in {span}?",
    "A film starts at {clock} and lasts {span}. When does it end?",
    "What time is {span} after {clock}?",
    "A bus leaves at {clock} and drives {span}. When does it arrive?",
    "Add {span} to {clock}.",
)


def dates(rng: Random, level: int) -> Draft:
    """Weekdays some days on (levels 1 and 2), clock times some time on (levels 3 and 4)."""
    if level <= 2:
        day, later = rng.randrange(7), rng.random() < 0.5
        n = rng.randint(2, 4) if level == 1 else rng.randint(5, 7)
        prompt, wording = phrase(rng, _AFTER if later else _BEFORE, n=n, day=_DAYS[day])
        passed = [_DAYS[(day + (i if later else -i)) % 7] for i in range(1, n + 1)]
        answer = passed[-1]
        work = ",".join(f"{i} {d}" for i, d in enumerate(passed, 1))
        return Draft(f"{day}{later}{n}|{wording}", prompt, work, answer)
    hour, minute, more = rng.randint(0, 23), rng.randint(0, 59), rng.randint(5, 59)
    hours = rng.randint(2, 20) if level == 4 else 0
    span = f"{hours} hours {more} minutes" if hours else f"{more} minutes"
    prompt, _ = phrase(rng, _CLOCK, clock=f"{hour:02d}:{minute:02d}", span=span)
    steps, total, carry = [f"{minute}+{more}={minute + more}"], minute + more, 0
    if total >= 60:
        steps.append(f"{total}-60={total - 60}")
        total, carry = total - 60, 1
    at = hour + hours + carry
    steps.append(f"{hour}+{hours}+{carry}={at}")
    if at >= 24:
        steps.append(f"{at}-24={at - 24}")
        at -= 24
    return Draft(
        f"{hour}:{minute}+{hours}:{more}", prompt, " ".join(steps), f"{at:02d}:{total:02d}"
    )


_METRIC = (
    ("metres", "centimetres", 100),
    ("kilograms", "grams", 1000),
    ("kilometres", "metres", 1000),
    ("litres", "millilitres", 1000),
    ("centimetres", "millimetres", 10),
)
_OTHER = (
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("weeks", "days", 7),
    ("feet", "inches", 12),
    ("days", "hours", 24),
)
_CONVERT = (
    "How many {to} are {n} {unit}?",
    "Convert {n} {unit} to {to}.",
    "Express {n} {unit} in {to}.",
    "{n} {unit} is how many {to}?",
    "What is {n} {unit} in {to}?",
)
_COMPOUND = (
    "How many {to} are {n} {unit} and {m} {to}?",
    "Convert {n} {unit} and {m} {to} to {to}.",
    "Express {n} {unit} and {m} {to} in {to}.",
    "What is {n} {unit} and {m} {to} in {to}?",
)
_TOTAL = (
    "Add {a} m {b} cm and {c} m {d} cm. How many cm is that?",
    "One plank is {a} m {b} cm, another {c} m {d} cm. Total in cm?",
    "What is {a} m {b} cm plus {c} m {d} cm in cm?",
    "A rope of {a} m {b} cm joins one of {c} m {d} cm. Length in cm?",
)


def units(rng: Random, level: int) -> Draft:
    """Metric, other, compound units, and the total of two lengths."""
    if level == 1:
        unit, to, factor = rng.choice(_METRIC)
        n = rng.randint(2, 99)
        prompt, _ = phrase(rng, _CONVERT, n=n, unit=unit, to=to)
        return Draft(f"{n}{unit}", prompt, "", str(n * factor))
    if level == 2:
        unit, to, factor = rng.choice(_OTHER)
        n = rng.randint(2, 9)
        prompt, wording = phrase(rng, _CONVERT, n=n, unit=unit, to=to)
        return Draft(f"{n}{unit}|{wording}", prompt, f"{n}*{factor}={n * factor}", str(n * factor))
    if level == 3:
        unit, to, factor = rng.choice((*_OTHER[:2], *_METRIC[:1]))
        n, m = rng.randint(2, 9), rng.randint(11, min(factor, 100) - 1)
        prompt, _ = phrase(rng, _COMPOUND, n=n, m=m, unit=unit, to=to)
        base, total = n * factor, n * factor + m
        return Draft(f"{n}{unit}{m}", prompt, f"{n}*{factor}={base} {base}+{m}={total}", str(total))
    a, c = rng.randint(1, 9), rng.randint(1, 9)
    b, d = rng.randint(11, 99), rng.randint(11, 99)
    prompt, _ = phrase(rng, _TOTAL, a=a, b=b, c=c, d=d)
    first, second = 100 * a + b, 100 * c + d
    work = f"{first}+{second} {add_columns(first, second)}"
    return Draft(f"{first}+{second}", prompt, work, str(first + second))
