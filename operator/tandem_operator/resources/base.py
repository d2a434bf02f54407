"""What all custom resources share: strings with units, references, conditions, object metadata.

Numbers that must not lose digits (dollars, shares, quality) are decimal strings and times are
strings with a unit, as the Kubernetes API conventions ask; the helpers here turn them into floats.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

GROUP = "tandem.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

# The resource that stands for a GPU where nothing else is said.
GPU_RESOURCE = "nvidia.com/gpu"

# A Kubernetes object as JSON gives it.
Object = dict[str, Any]

MOST_LEVELS = 64


def _is_flat(value: Object) -> Object:
    """What walks through a value that is nobody's schema calls itself."""
    level: list[Any] = [value]
    for _ in range(MOST_LEVELS):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [each for part in inner for each in part if isinstance(each, dict | list)]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MOST_LEVELS} levels; flatten it")


OpaqueObject = Annotated[Object, AfterValidator(_is_flat)]
"""Of any fields, lists and mappings at most so deep in one another."""

DURATION_PATTERN = r"^([0-9]{1,6}(\.[0-9]{1,3})?(ms|s|m|h)){1,4}$"
DECIMAL_PATTERN = r"^[0-9]{1,9}(\.[0-9]{1,6})?$"
FRACTION_PATTERN = r"^(0(\.[0-9]{1,6})?|1(\.0{1,6})?)$"
QUANTITY_PATTERN = r"^[0-9]{1,12}(\.[0-9]{1,3})?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
EXTENDED_RESOURCE_PATTERN = (
    r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
)
NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
NAME_TEXT = (
    "metadata.name may have lower-case letters, digits and inner dashes only, since Services are "
    "named after it; write qwen2-5 for qwen2.5"
)
# The Services of a Model or Router whose name begins with a digit get this prefix.
RESERVED_NAME_PATTERN = r"^tandem-[0-9]"
RESERVED_NAME_TEXT = (
    "metadata.name may not begin with tandem- and a digit, Services of names that begin with a "
    "digit are called so; choose another"
)

Duration = Annotated[str, StringConstraints(pattern=DURATION_PATTERN, max_length=32)]
Decimal = Annotated[str, StringConstraints(pattern=DECIMAL_PATTERN, max_length=17)]
Fraction = Annotated[str, StringConstraints(pattern=FRACTION_PATTERN, max_length=8)]
Quantity = Annotated[str, StringConstraints(pattern=QUANTITY_PATTERN, max_length=20)]
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, min_length=1, max_length=63)]
# Of a StorageClass, which may have dots.
ClassName = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", min_length=1, max_length=253),
]
ShortText = Annotated[str, StringConstraints(max_length=64)]
Text = Annotated[str, StringConstraints(max_length=1024)]
ProviderUrl = Annotated[
    str, StringConstraints(pattern=r"^https?://[^\s?#]{1,1000}$", min_length=8, max_length=1024)
]
# A model as others call it: an engine's served name, a provider's.
ModelName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$", min_length=1, max_length=253),
]
ExtendedResource = Annotated[
    str, StringConstraints(pattern=EXTENDED_RESOURCE_PATTERN, max_length=253)
]
LabelValue = Annotated[str, StringConstraints(max_length=253)]

# What to say about text that does not match: the first entry whose cue stands in the pattern.
_PATTERN_TEXTS = (
    ("ms|s|m|h", 'is not a duration; write a number with a unit, such as "500ms", "30s" or "5m"'),
    ("Ki|Mi|Gi", 'is not a quantity; write a number such as "2", "500m" or "4Gi"'),
    (r"^(0(\.", 'is not a fraction; write a decimal between "0" and "1", such as "0.95"'),
    (r"[0-9]{1,9}(\.", 'is not a decimal number; write something like "1.25"'),
    ("file|pvc|hf|s3", "is not a weights URI; use hf://, s3://, pvc://, image:/// or file://"),
    ("file|pvc|configmap", "is not a data URI; use configmap://, pvc://, image:/// or file://"),
    (r"[^\s?#]", "is not a base URL; use http:// or https://, without ? and #"),
    ("https?", "is not a URL; use http:// or https://"),
    ("hmac-sha256", "is not hmac-sha256:<64 hex digits>; make one with tandem_router.api.api_keys"),
    (
        "/[A-Za-z0-9](",
        "is not the name of a resource of nodes; write one such as nvidia.com/gpu, amd.com/gpu or "
        "nvidia.com/mig-1g.10gb",
    ),
    ("._:/@+-", "is not an image; write one such as registry.example/worker:1.2"),
    ("A-Za-z0-9._/:-", "is not a model's name; use letters, digits and, inside, . _ / : -"),
    (r"\[[0-9a-f:.]+\]", "is not a host; write its name or [IPv6 address], without port"),
    (r"^[a-z0-9]([-a-z0-9.]*", "is not a name; use lower-case letters, digits, dashes and dots"),
    ("-a-z0-9", "is not a name; use lower-case letters, digits and inner dashes, at most 63"),
)

_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SCALE = {
    "": 1.0,
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
}
_QUANTITY = re.compile(r"^([0-9]+(?:\.[0-9]+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")


def pattern_text(pattern: str) -> str | None:
    """What to say about text that does not match a pattern; None where nothing better is known."""
    return next((text for cue, text in _PATTERN_TEXTS if cue in pattern), None)


def seconds(duration: str) -> float:
    """The length of a duration such as "500ms" or "1m30s" in seconds."""
    return sum(float(n) * _SECONDS[unit] for n, unit in _DURATION_PART.findall(duration))


def quantity(text: str) -> float:
    """The value of a Kubernetes quantity such as "512Mi" or "250m".

    Raises ValueError for text that is not one.
    """
    match = _QUANTITY.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a quantity; write a number such as 2, 500m or 4Gi")
    return float(match[1]) * _SCALE[match[2] or ""]


def money(value: float) -> str:
    """US dollars as a decimal string without needless digits."""
    return f"{value:.4f}".rstrip("0").rstrip(".") or "0"


class Resource(BaseModel):
    """Base of all parts of a custom resource: frozen, camelCase in YAML, unknown fields refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True, strict=True
    )

    def to_wire(self) -> dict[str, Any]:
        """The part as the YAML would hold it, defaults included, absent fields left out."""
        return self.model_dump(by_alias=True, exclude_none=True, mode="json")


class Values(BaseModel):
    """A part of the chart's values, or of a file beside them: what an installation says."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True
    )


class ObjectRef(Resource):
    """Names an object of a known kind in the same namespace."""

    name: Name = Field(description="Name of the object, in the same namespace.")


class SecretKeyRef(Resource):
    """Names one key of a Secret in the same namespace."""

    name: Name = Field(description="Name of the Secret, in the same namespace.")
    key: Annotated[str, StringConstraints(min_length=1, max_length=253)] = Field(
        default="token", description="Key inside the Secret whose value is used."
    )


class Condition(Resource):
    """One observed fact about the object, as Kubernetes' metav1.Condition."""

    model_config = ConfigDict(extra="ignore")

    type: Annotated[str, StringConstraints(max_length=64)] = Field(
        description="Name of the fact, such as Ready."
    )
    status: Annotated[str, StringConstraints(pattern="^(True|False|Unknown)$", max_length=7)] = (
        Field(description="True, False or Unknown.")
    )
    reason: Annotated[str, StringConstraints(max_length=64)] = Field(
        default="", description="One word for machines: why the status is what it is."
    )
    message: Annotated[str, StringConstraints(max_length=1024)] = Field(
        default="", description="One sentence for people: what holds and what to do next."
    )
    last_transition_time: Annotated[str, StringConstraints(max_length=32)] | None = Field(
        default=None, description="When status last changed, RFC 3339, UTC."
    )
    observed_generation: int | None = Field(
        default=None, ge=0, description="metadata.generation this condition was computed from."
    )


class Metadata(BaseModel):
    """The part of object metadata that this package reads; the rest passes through."""

    model_config = ConfigDict(frozen=True, extra="allow", alias_generator=to_camel)

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 1
