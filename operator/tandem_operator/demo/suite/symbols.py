"""Questions about symbols: sorting, string edits, look-up, brackets, logic and code."""

from __future__ import annotations

from random import Random

from .question import Draft
from .wording import phrase

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _letters(rng: Random, n: int) -> str:
    return "".join(rng.sample(_LETTERS, n))


_SORT = (
    "Sort the letters {s}.",
    "Put {s} in alphabetical order.",
    "Order these letters: {s}.",
    "Write {s} from A to Z.",
    "Arrange {s} alphabetically.",
    "What is {s} when sorted?",
)


def sorting(rng: Random, level: int) -> Draft:
    """Distinct letters into alphabetical order: three, four, six, eight."""
    s = _letters(rng, (3, 4, 6, 8)[level - 1])
    prompt, _ = phrase(rng, _SORT, s=s)
    return Draft(s, prompt, "", "".join(sorted(s)))


_REVERSE = (
    "Write {s} backwards.",
    "Reverse {s}.",
    "Spell {s} from back to front.",
    "What is {s} in reverse?",
    "Turn {s} around.",
)
_REPLACE = (
    "Replace {x} by {y} in {s}.",
    "In {s}, change {x} to {y}.",
    "Swap out {x} for {y} in {s}.",
    "Take {s} and turn {x} into {y}.",
)
_DELETE = (
    "Delete {x} from {s}.",
    "Remove the {x} from {s}.",
    "Strike {x} out of {s}.",
    "Take {s} and leave out {x}.",
)
_BOTH = (
    "Replace {x} by {y} in {s}, then reverse it.",
    "In {s}, change {x} to {y}, then write it backwards.",
    "Take {s}, turn {x} into {y}, then turn it around.",
)
_DROP_BOTH = (
    "Delete {x} from {s}, then reverse it.",
    "Remove the {x} from {s}, then write it backwards.",
    "Take {s}, leave out {x}, then turn it around.",
)


def edits(rng: Random, level: int) -> Draft:
    """Reverse, replace, delete; the row is written down first, at level 4 after one edit too."""
    size = (3, 4, 5, 5)[level - 1] + rng.randint(0, 1)
    s = _letters(rng, size)
    x = rng.choice(s)
    y = rng.choice([c for c in _LETTERS if c not in s])
    kinds = (("reverse",), ("reverse", "replace", "delete"), ("replace", "delete", "reverse"))
    kind = rng.choice((*kinds, ("replace then reverse", "delete then reverse"))[level - 1])
    replaced = s.replace(x, y if "replace" in kind else "")
    if kind == "reverse":
        prompt, _ = phrase(rng, _REVERSE, s=s)
        return Draft(f"r{s}", prompt, "" if level == 1 else s, s[::-1])
    if level < 4:
        prompt, _ = phrase(rng, _REPLACE if kind == "replace" else _DELETE, s=s, x=x, y=y)
        return Draft(f"{kind}{s}{x}{y if kind == 'replace' else ''}", prompt, s, replaced)
    both = _BOTH if "replace" in kind else _DROP_BOTH
    prompt, _ = phrase(rng, both, s=s, x=x, y=y)
    key = f"{kind}{s}{x}{y if 'replace' in kind else ''}"
    return Draft(key, prompt, f"{s} {replaced}", replaced[::-1])


ITEMS = (
    "plum fig pear lime kiwi leek corn bean beet rice salt milk soup cake bread cheese butter "
    "honey ham egg tea juice jam pie"
).split()
_ONE = (
    "Prices: {rows}. What does the {x} cost?",
    "The shop lists {rows}. How much is the {x}?",
    "Price list: {rows}. Give the price of the {x}.",
    "Given {rows}, what is the price of the {x}?",
    "From the menu {rows}, what must I pay for the {x}?",
)
_TWO = (
    "Prices: {rows}. What do the {x} and the {y} cost together?",
    "The shop lists {rows}. How much are the {x} and the {y}?",
    "Price list: {rows}. Add up the {x} and the {y}.",
    "From the menu {rows}, what must I pay for the {x} and the {y}?",
)
_THREE = (
    "Prices: {rows}. What do the {x}, the {y} and the {z} cost together?",
    "The shop lists {rows}. How much are the {x}, the {y} and the {z}?",
    "Price list: {rows}. Add up the {x}, the {y} and the {z}.",
    "From the menu {rows}, what must I pay for the {x}, the {y} and the {z}?",
)


def lookup(rng: Random, level: int) -> Draft:
    """One, two or three prices out of a list of three to five."""
    items = rng.sample(ITEMS, (3, 4, 4, 5)[level - 1])
    values = [rng.randint(2, 9) for _ in items]
    rows = ", ".join(f"{i} {v}" for i, v in zip(items, values, strict=True))
    price = dict(zip(items, values, strict=True))
    wanted = rng.sample(items, max(1, level - 1))
    names = dict(zip("xyz", wanted, strict=False))
    prompt, _ = phrase(rng, (_ONE, _ONE, _TWO, _THREE)[level - 1], rows=rows, **names)
    found = ",".join(f" {i} {price[i]}" for i in wanted)
    work, total = found, price[wanted[0]]
    for item in wanted[1:]:
        work += f", {total}+{price[item]}={total + price[item]}"
        total += price[item]
    return Draft(f"{rows}|{wanted}", prompt, work, str(total))


_COUNT = (
    "How many brackets are still open in {s} at the end?",
    "How many closing brackets does {s} lack?",
    "Count the brackets left open by {s}.",
    "In {s}, how many brackets stay open?",
    "How many must be closed after {s}?",
)
_CLOSE = (
    "Close the brackets {s}.",
    "What closes {s}?",
    "Write the closing brackets for {s}.",
    "Complete {s} with the closing brackets.",
)
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def brackets(rng: Random, level: int) -> Draft:
    """Close open brackets in order (levels 1 and 2) or count the open ones (all levels)."""
    if level <= 2 and rng.random() < 0.5:
        s = "".join(rng.choice("([{") for _ in range(rng.randint(2, 3) + level - 1))
        prompt, wording = phrase(rng, _CLOSE, s=s)
        return Draft(f"{s}|{wording}", prompt, s, "".join(_PAIRS[c] for c in reversed(s)))
    size, s, depth, work = (3, 5, 7, 9)[level - 1] + rng.randint(0, 1), "", 0, ""
    for _ in range(size):
        up = depth == 0 or rng.random() < 0.55
        depth += 1 if up else -1
        s += "(" if up else ")"
        work += f"{s[-1]}{depth}"
    prompt, wording = phrase(rng, _COUNT, s=s)
    return Draft(f"{s}|{wording}" if level <= 2 else s, prompt, work, str(depth))


_STEPS = ("one step", "two steps", "three steps", "four steps")
_CHAIN = (
    "If-then rules: {rules}. {x} holds. What follows after {steps}?",
    "Rules (if:then) {rules}. Given {x}, what holds after {steps}?",
    "We know {rules} as if:then. From {x}, where do we get in {steps}?",
    "Implications: {rules}. Start with {x} and take {steps}. What is true?",
    "Let {rules} be rules. Assume {x}. Conclude after {steps}.",
)


def logic(rng: Random, level: int) -> Draft:
    """Follow if-then rules from a premise, one step per level, past rules that do not matter."""
    letters = rng.sample(_LETTERS, level + 3)
    rules = [f"{a}:{b}" for a, b in zip(letters, letters[1:], strict=False)]
    rng.shuffle(rules)
    start = rng.randint(0, 2)
    path = letters[start : start + level + 1]
    listed = ", ".join(rules)
    prompt, _ = phrase(rng, _CHAIN, rules=listed, x=path[0], steps=_STEPS[level - 1])
    work = ", ".join(f"{a}:{b}" for a, b in zip(path, path[1:], strict=False))
    return Draft(f"{listed}|{path[0]}", prompt, work, path[-1])


_TRACE = (
    "What does `{code}` print?",
    "Run `{code}`. What is the output?",
    "Give the output of `{code}`.",
    "Trace `{code}`. What is printed?",
    "What number comes out of `{code}`?",
)


def code(rng: Random, level: int) -> Draft:
    """Trace a variable through one, two, three or five changes."""
    name = rng.choice("nxyz")
    value = rng.randint(5, 20)
    lines, steps = [f"{name}={value}"], []
    for _ in range((1, 2, 3, 5)[level - 1]):
        n = rng.randint(2, 9)
        up = value < 12 or rng.random() < 0.5
        lines.append(f"{name}{'+' if up else '-'}={n}")
        after = value + n if up else value - n
        steps.append(f"{value}{'+' if up else '-'}{n}={after}")
        value = after
    source = ";".join((*lines, f"print({name})"))
    prompt, _ = phrase(rng, _TRACE, code=source)
    return Draft(source, prompt, " ".join(steps), str(value))
