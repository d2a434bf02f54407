"""Common rules of every section, and the types that several of them use."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[
    str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$")
]


Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


Usd = Annotated[float, Field(ge=0.0, le=1e9, allow_inf_nan=False)]


Positive = Annotated[float, Field(gt=0.0, le=1e9, allow_inf_nan=False)]


class Section(BaseModel):
    """Common rules: values never change after parsing, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
