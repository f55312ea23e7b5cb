"""Every choice the server's operator has: the environment variables SONORANT_SERVE_…, or the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.-]+(:\d{1,5})?|[a-z][a-z0-9+.-]*://\[[0-9a-f:]+\](:\d{1,5})?")
Bytes = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """What is served, where, and the limits that keep memory and waiting time bounded."""

    model_config = SettingsConfigDict(env_prefix="SONORANT_SERVE_", frozen=True, extra="forbid")

    model: Annotated[
        dict[str, Path],
        NoDecode,
        Field(description="what `sonorant publish` wrote: PATH, or NAME=PATH,NAME=PATH…; the first is the default"),
    ] = {"model": Path("artifacts/model")}
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535, description="0: any free port")] = 8000

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:1")] = "cpu"
    precision: Annotated[str, Field(description="float32, or what sonorant.inference.load takes beside")] = "float32"
    num_workers: Annotated[
        int | None, Field(ge=1, description="processes that run the models; default: one a usable core, or one a GPU")
    ] = None
    watch_seconds: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="how often to look for a new model; 0: only on SIGHUP")
    ] = 0

    keys_file: Annotated[Path | None, Field(description="the API keys, see serving/edge/keys.py")] = None
    cors_origins: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(description="of the sites whose pages may use this server: https://a.org,https://b.org:8443"),
    ] = ()
    log_format: Annotated[
        Literal["json", "text"] | None, Field(description="default: text where stderr is a terminal, else json")
    ] = None

    max_head_bytes: Annotated[Bytes, Field(description="of one request's address and headers")] = 32 * 2**10
    max_body_bytes: Annotated[Bytes, Field(description="of one request")] = 32 * 2**20
    max_buffered_bytes: Annotated[Bytes, Field(description="of all requests in hand")] = 256 * 2**20
    max_files: Annotated[int, Field(ge=1, description="in one multipart request")] = 64
    max_file_seconds: Annotated[Seconds, Field(description="audio of one file")] = 600
    max_search_seconds: Annotated[Seconds, Field(description="audio of one file that images are searched by")] = 30
    max_batch_seconds: Annotated[Seconds, Field(description="audio the model takes at once")] = 60
    max_queue_seconds: Annotated[Seconds, Field(description="audio admitted and not yet answered")] = 1200
    num_decoders: Annotated[int, Field(ge=1, description="files decoded at once")] = 2
    request_seconds: Annotated[Seconds, Field(description="from a request's head to its result")] = 60
    head_seconds: Annotated[Seconds, Field(description="for a request's address and headers to arrive")] = 10
    body_seconds: Annotated[Seconds, Field(description="for a request's body to arrive")] = 30
    max_streams: Annotated[int, Field(ge=1, description="listened to at once")] = 64
    max_stream_seconds: Annotated[Seconds, Field(description="audio of one stream")] = 3600
    stream_idle_seconds: Annotated[Seconds, Field(description="that a stream's client may send nothing")] = 30
    send_seconds: Annotated[Seconds, Field(description="for a client to take a piece of its answer")] = 30
    tracing: Annotated[bool, Field(description="send OpenTelemetry traces, as OTEL_… variables say where")] = False
    drain_seconds: Annotated[Seconds, Field(description="to finish admitted work before exit")] = 30

    @field_validator("model", mode="before")
    @classmethod
    def _name_models(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            return given
        models: dict[str, Path] = {}
        for entry in str(given).split(","):
            name, found, path = entry.partition("=")
            folder = Path(path if found else name)
            name = name if found else folder.resolve().name
            if not MODEL_NAME.fullmatch(name):
                raise ValueError(f"found a model named {name!r}, wanted letters, digits, - _ and .: write NAME=PATH")
            if name in models:
                raise ValueError(f"found two models named {name}, wanted different names: write NAME=PATH")
            models[name] = folder
        return models

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _list_origins(cls, given: Any) -> Any:
        origins = given.split(",") if isinstance(given, str) else given
        origins = tuple(origin.strip() for origin in origins if origin.strip())
        for origin in origins:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(f"found the origin {origin!r}, wanted SCHEME://HOST or SCHEME://HOST:PORT: name each")
        return origins

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
