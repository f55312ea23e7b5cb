"""Every choice the server's operator has: the environment variables SONORANT_SERVE_…, or the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """What is served, where, and the limits that keep memory and waiting time bounded."""

    model_config = SettingsConfigDict(env_prefix="SONORANT_SERVE_", frozen=True, extra="forbid")

    model: Annotated[Path, Field(description="a directory that `sonorant publish` wrote")] = Path("artifacts/model")
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535, description="0: any free port")] = 8000

    max_body_bytes: Annotated[Bytes, Field(description="of one request")] = 32 * 2**20
    max_buffered_bytes: Annotated[Bytes, Field(description="of all requests in hand")] = 256 * 2**20
    max_files: Annotated[int, Field(ge=1, description="in one multipart request")] = 64
    max_file_seconds: Annotated[Seconds, Field(description="audio of one file")] = 60
    max_batch_seconds: Annotated[Seconds, Field(description="audio the model takes at once")] = 60
    max_queue_seconds: Annotated[Seconds, Field(description="audio admitted and not yet answered")] = 600
    num_decoders: Annotated[int, Field(ge=1, description="files decoded at once")] = 2
    drain_seconds: Annotated[Seconds, Field(description="to finish admitted work before exit")] = 30

    @model_validator(mode="after")
    def _admits_what_it_accepts(self) -> Self:
        for small, large in (
            ("max_file_seconds", "max_queue_seconds"),
            ("max_body_bytes", "max_buffered_bytes"),
        ):
            if getattr(self, small) > getattr(self, large):
                raise ValueError(
                    f"found {small} {getattr(self, small):g} above {large} {getattr(self, large):g}, "
                    f"wanted at most that: raise {large}"
                )
        return self
