"""What every section of params.yaml has in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Split = Literal["train", "dev", "test"]
Share = Annotated[float, Field(ge=0, le=1)]
Workers = Annotated[int, Field(ge=0, exclude=True, description="processes or threads; 0 means one per core")]


class Section(BaseModel):
    """A frozen set of choices that refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)
