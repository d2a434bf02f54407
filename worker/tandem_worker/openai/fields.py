"""How a JSON object from outside is declared and read, and what a refusal says.

Subclasses of :class:`Declared` are the one description of a message: types, bounds and defaults,
checked by pydantic. Null means absent, unknown fields pass, and every error names field, value and
rule.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.errors import RequestError

MAX_LOGPROBS = 20
UINT64 = (1 << 64) - 1
INT32 = 2**31 - 1
_LEAST_TEMPERATURE = 1e-5
"""Below this the highest logit always wins, and logits divided by it could overflow."""

TokenId = Annotated[int, Field(ge=0, le=INT32)]
TokenIds = list[TokenId]

_KINDS = {
    "float": "must be a number",
    "int": "must be an integer",
    "bool": "must be true or false",
    "string": "must be a string",
    "list": "must be a list",
    "dict": "must be an object",
    "model": "must be an object",
    "model_attributes": "must be an object",
    "finite_number": "must be a finite number",
}


class Declared(BaseModel):
    """A JSON object with declared fields."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self:
        """Check plain data.

        Raises:
            RequestError: the first field that breaks a rule, with its value and the rule.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise _refusal(first) from error


def read_object(raw: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        RequestError: not JSON, or not an object.
    """
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise RequestError(f"the body must be a JSON object, got {type(data).__name__}")
    return data


def wrong(name: str, value: Any, rule: str, *, code: str | None = "invalid_value") -> RequestError:
    """A refusal that names field, value and rule."""
    return RequestError(f"{name}={_shown(value)} {rule}", param=name, code=code)


def unsupported(name: str, instead: str) -> RequestError:
    """A refusal of something this worker does not do."""
    return RequestError(
        f"{name} is not supported by this worker; {instead}",
        param=name,
        code="unsupported_parameter",
    )


class SamplingFields(Declared):
    """How to draw; the same names and bounds in a client's body and in a prefill order."""

    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=INT32)
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=10)
    min_tokens: int = Field(default=0, ge=0, le=INT32)
    stop_token_ids: TokenIds = Field(default=[], max_length=1024)
    ignore_eos: bool = False

    def sampling(
        self, *, num_logprobs: int | None, logit_bias: tuple[tuple[int, float], ...]
    ) -> SamplingParams:
        """The engine's values; seed and limits of length come from elsewhere."""
        cold = self.temperature < _LEAST_TEMPERATURE
        return SamplingParams(
            temperature=0.0 if cold else self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            num_logprobs=num_logprobs,
            min_tokens=self.min_tokens,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logit_bias=logit_bias,
        )


def _refusal(error: Any) -> RequestError:
    """pydantic's description of a problem as this worker's sentence."""
    where = [part for part in error["loc"] if isinstance(part, int) or part.isidentifier()]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    name = name.removeprefix(".")
    kind, context = error["type"], error.get("ctx") or {}
    if kind == "missing":
        return RequestError(f"{name} is required", param=name, code="missing_required_parameter")
    base = kind.removesuffix("_type").removesuffix("_parsing").removesuffix("_from_float")
    bounds = {
        "greater_than_equal": ("ge", "must be at least"),
        "less_than_equal": ("le", "must be at most"),
        "greater_than": ("gt", "must be above"),
        "less_than": ("lt", "must be below"),
    }
    if kind in bounds:
        key, words = bounds[kind]
        rule = f"{words} {context[key]:g}"
    elif kind == "too_long":
        return wrong(
            name,
            f"{context['actual_length'] or 'too many'} entries",
            f"must have at most {context['max_length']}",
        )
    elif kind == "string_too_long":
        rule = f"must have at most {context['max_length']} characters"
    elif kind == "string_too_short":
        rule = f"must be a string of at least {context['min_length']} characters"
    elif kind == "too_short":
        rule = f"must have at least {context['min_length']}"
    elif kind == "literal_error":
        rule = f"must be {context['expected']}"
    elif base in _KINDS:
        rule = _KINDS[base]
    else:
        rule = str(error["msg"]).removeprefix("Input should ").removeprefix("Value error, ")
    return wrong(name, error["input"], rule)


def _shown(value: Any) -> str:
    if isinstance(value, list | dict | str) and len(value) > 100:
        value = value[:20] if isinstance(value, list) else str(value)[:100]
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
