"""One rule between fields: as CEL for the apiserver, and as Python for local mode.

Both read the object with defaults filled in. A CEL rule on an object that defaults to {} sees the
bare default, so optional fields are guarded with has().
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Obj = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """One rule on one object of the schema.

    path: where in the kind it hangs, such as ("spec", "tiers", "*"); "*" is any list item.
    field: the field to name in the error, relative to path; "" names the object itself.
    check: true when the rule holds; the second argument is the old object for transition rules.
    harmless: what breaks it runs all the same: refused where it is written, and told of where it
        was stored before there was the rule.
    """

    path: tuple[str, ...]
    cel: str
    message: str
    check: Callable[[Obj, Obj | None], bool]
    field: str = ""
    transition: bool = False
    harmless: bool = False
