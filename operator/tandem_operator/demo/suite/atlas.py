"""Facts to remember: an invented atlas whose large places are asked about often, hamlets rarely."""

from __future__ import annotations

from random import Random

from .question import Draft
from .wording import phrase

_HEADS = (
    "Bren Cal Dor Eld Fal Gar Hol Ister Jun Kel Lor Mar Nor Ost Pel Quar Ros Sel Tam Ul Var Wen "
    "Yar Zel"
).split()
_TAILS = "dale ford mouth wick stead combe bury field gate holm ness port ridge shaw thorpe".split()
_VALUES = {
    "crop": (
        "barley wheat rye oats maize rice beans peas hops flax cotton tea coffee olives grapes "
        "lemons"
    ).split(),
    "metal": (
        "iron copper tin lead zinc silver gold nickel cobalt chrome platinum mercury tungsten "
        "uranium bronze steel"
    ).split(),
    "colour": (
        "red blue green yellow white black brown purple orange pink grey scarlet violet amber "
        "ivory crimson"
    ).split(),
}
_TEMPLATES = {
    "crop": (
        "What is the main crop of the {kind} of {name}?",
        "Which crop grows around the {kind} of {name}?",
        "What do farmers grow in the {kind} of {name}?",
        "Name the crop of the {kind} of {name}.",
        "The {kind} of {name} is known for which crop?",
        "In the {kind} of {name}, what do the fields bear?",
    ),
    "metal": (
        "Which metal is mined in the {kind} of {name}?",
        "What metal comes from the {kind} of {name}?",
        "Name the metal of the {kind} of {name}.",
        "The mine in the {kind} of {name} yields which metal?",
        "What do miners dig in the {kind} of {name}?",
        "In the {kind} of {name}, which metal is found?",
    ),
    "colour": (
        "What colour is the flag of the {kind} of {name}?",
        "Which colour flies over the {kind} of {name}?",
        "Name the flag colour of the {kind} of {name}.",
        "The flag of the {kind} of {name} has which colour?",
        "In the {kind} of {name}, what colour is the flag?",
        "What is the colour of the {kind} of {name}?",
    ),
}
KINDS = ("city", "town", "village", "hamlet")
_COUNTS = (8, 16, 60, 100)


def _build() -> dict[int, list[tuple[str, dict[str, str]]]]:
    rng = Random(20261121)
    names = [head + tail for head in _HEADS for tail in _TAILS]
    rng.shuffle(names)
    atlas: dict[int, list[tuple[str, dict[str, str]]]] = {}
    start = 0
    for level, count in enumerate(_COUNTS, 1):
        chosen = names[start : start + count]
        atlas[level] = [(n, {k: rng.choice(v) for k, v in _VALUES.items()}) for n in chosen]
        start += count
    return atlas


ATLAS = _build()
"""Level to places; each place has one value per attribute."""


def facts(rng: Random, level: int) -> Draft:
    """One attribute of one place: cities at level 1, hamlets at level 4."""
    name, values = rng.choice(ATLAS[level])
    attribute = rng.choice(tuple(_TEMPLATES))
    prompt, wording = phrase(rng, _TEMPLATES[attribute], kind=KINDS[level - 1], name=name)
    return Draft(f"{name}|{attribute}|{wording}", prompt, "", values[attribute])
