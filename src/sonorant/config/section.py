"""What every section of params.yaml has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Split = Literal["train", "dev", "test"]
Share = Annotated[float, Field(ge=0, le=1)]
Workers = Annotated[int, Field(ge=0, exclude=True, description="processes or threads; 0 means one per core")]


class Section(BaseModel):
    """A frozen set of choices that refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    def written(self) -> dict[str, Any]:
        """Every choice as a parameter file would hold it, those too that the dump leaves out."""
        return {name: as_written(getattr(self, name)) for name in type(self).model_fields}


def as_written(value: Any) -> Any:
    """A value of a section as YAML would hold it."""
    if isinstance(value, Section):
        return value.written()
    if isinstance(value, Mapping):
        return {key: as_written(inner) for key, inner in value.items()}
    return [as_written(inner) for inner in value] if isinstance(value, list | tuple) else value
