"""API keys: who may use which models, how often, and for how much audio.

The file that SONORANT_SERVE_KEYS_FILE names has one JSON object a line; empty lines and those that begin with # are
skipped. Only name and sha256 are needed: a key may use every model without limit unless its line says otherwise.

    {"name": "alice", "sha256": "9f…", "models": ["base"], "requests_per_minute": 60, "audio_seconds_per_hour": 3600}

`python -m serving key alice` makes a token and such a line. The file holds the token's SHA-256 and never the token.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import logging
import math
import secrets
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers

from serving.errors import ApiError, describe_all, shorten
from serving.settings import MODEL_NAME

log = logging.getLogger("serving")
KEY_PROTOCOL = "sonorant.key."
"""How a WebSocket's subprotocol begins that carries a token: browsers cannot set its headers."""
ModelName = Annotated[str, Field(pattern=rf"^{MODEL_NAME.pattern}$")]


class Key(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="written to the log")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    models: Annotated[tuple[ModelName, ...] | None, Field(min_length=1)] = None
    requests_per_minute: Annotated[float | None, Field(ge=1, allow_inf_nan=False)] = None
    audio_seconds_per_hour: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None


class Bucket:
    """`size` units fill it in `period` seconds; it begins full, and what is over runs off."""

    def __init__(self, size: float, period: float, clock: Callable[[], float]) -> None:
        self.size, self.period, self.clock = size, period, clock
        self.level, self.at = size, clock()

    def take(self, amount: float) -> float:
        """Take so much and return 0; or, where it is not there, take nothing and return the seconds until it is."""
        now = self.clock()
        self.level = min(self.size, self.level + (now - self.at) * self.size / self.period)
        self.at = now
        missing = amount - self.level
        if missing > 1e-9 * self.size:  # whoever waits for as long as told gets it, rounding or not
            return missing * self.period / self.size
        self.level -= amount
        return 0.0

    def give_back(self, amount: float) -> None:
        """Undo a `take`."""
        self.level = min(self.size, self.level + amount)


class Account:
    """A key and what is left of its quotas."""

    def __init__(self, key: Key, clock: Callable[[], float]) -> None:
        self.key = key
        requests, audio = key.requests_per_minute, key.audio_seconds_per_hour
        self.requests = Bucket(requests, 60, clock) if requests else None
        self.audio = Bucket(audio, 3600, clock) if audio else None

    def may_use(self, model: str) -> bool:
        """Whether the key is one for that model."""
        return self.key.models is None or model in self.key.models

    def enter(self) -> None:
        """Count one request; ApiError 429 where there were too many."""
        if self.requests and (wait := self.requests.take(1)):
            quota = f"key {self.key.name}'s {self.requests.size:g} a minute"
            raise spent("rate_limited", f"requests: found more than {quota}", wait)

    def charge(self, seconds: float) -> None:
        """Count so much audio; ApiError 429 where the quota has not so much left, 413 where it never has."""
        if self.audio is None:
            return
        quota = f"key {self.key.name}'s {self.audio.size:g} s an hour"
        if seconds > self.audio.size:
            message = f"audio: found {seconds:.1f} s in one request, wanted at most {quota}: send it in parts"
            raise ApiError(413, "too_long", message)
        if wait := self.audio.take(seconds):
            raise spent("quota_exceeded", f"audio: found {seconds:.1f} s more than is left of {quota}", wait)

    def refund(self, seconds: float) -> None:
        """Take back a charge for what the server did not do."""
        if self.audio is not None:
            self.audio.give_back(seconds)


class Keys:
    """The accounts of the file; with no file everybody may do everything. ValueError where the file is broken."""

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.clock = path, clock
        self.accounts = [] if path is None else [Account(key, clock) for key in read(path)]

    def reload(self) -> bool:
        """Read the file again. Where it is broken the old keys stay; a key that stays as it was keeps its account."""
        if self.path is None:
            return True
        try:
            keys = read(self.path)
        except ValueError as error:
            log.error("reload: the old keys stay: %s", error)
            return False
        known = {account.key: account for account in self.accounts}
        self.accounts = [known.get(key) or Account(key, self.clock) for key in keys]
        log.info("reload: %d keys", len(keys))
        return True

    async def watch(self, seconds: float) -> None:
        """Reload whenever the file has changed, looking that often."""
        known = signature(self.path)
        while self.path is not None:
            await asyncio.sleep(seconds)
            found = signature(self.path)
            if found not in (known, None):
                known = found
                self.reload()

    def identify(self, tokens: Collection[str]) -> Account | None:
        """The account of the one token among `tokens`, or none where no keys are needed; ApiError 401."""
        if self.path is None:
            return None
        if len(tokens) != 1:
            wanted = "wanted one: send it as Authorization: Bearer TOKEN or X-API-Key: TOKEN"
            raise unauthorized(f"API key: found {'several' if tokens else 'none'}, {wanted}")
        [token] = tokens
        digest = hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
        found = None
        for account in self.accounts:  # all of them: how long it takes tells nothing
            if hmac.compare_digest(account.key.sha256, digest):
                found = account
        if found is None:
            raise unauthorized("API key: found an unknown one, wanted a key of this server: ask its operator for one")
        return found


def unauthorized(message: str) -> ApiError:
    """401: no key, or an unknown one."""
    return ApiError(401, "unauthorized", message, {"WWW-Authenticate": "Bearer"})


def spent(code: str, message: str, wait: float) -> ApiError:
    """429: the key's quota is used up for so many seconds."""
    seconds = max(1, math.ceil(wait))
    return ApiError(429, code, f"{message}, wanted no more: retry in {seconds} s", {"Retry-After": str(seconds)})


def tokens_of(headers: Headers, subprotocols: Collection[str] = ()) -> set[str]:
    """Every different token that a request carries."""
    credentials = (value.strip().partition(" ") for value in headers.getlist("authorization"))
    tokens = {token.strip() for scheme, _, token in credentials if scheme.lower() == "bearer"}
    tokens |= {value.strip() for value in headers.getlist("x-api-key")}
    return tokens | {name.removeprefix(KEY_PROTOCOL) for name in subprotocols if name.startswith(KEY_PROTOCOL)}


# ---------------------------------------------------------------------------------------------------------- the file


def read(path: Path) -> list[Key]:
    """The keys of a file; ValueError, which quotes no digest and no token, where it is broken."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise ValueError(f"keys file {path}: found {reason}, wanted one JSON object a line: check the path") from None
    keys: list[Key] = []
    for place, key in parse(lines, path):
        for other in keys:
            if key.name == other.name or key.sha256 == other.sha256:
                what = f"named {key.name}" if key.name == other.name else f"with the token of {other.name}"
                raise ValueError(f"{place}: found another key {what}, wanted one: remove or rename it")
        keys.append(key)
    if not keys:
        raise ValueError(f"keys file {path}: found no key, wanted one or more: run `python -m serving key NAME`")
    return keys


def signature(path: Path | None) -> tuple[int, ...] | None:
    """What tells a file from the one that lay there before; none where there is no file."""
    try:
        status = path.stat() if path is not None else None
    except OSError:
        return None
    return status and (status.st_ino, status.st_mtime_ns, status.st_size)


def parse(lines: Sequence[str], path: Path) -> Iterator[tuple[str, Key]]:
    """Each key, and where it is."""
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        place = f"keys file {path} line {number}"
        try:
            yield place, Key.model_validate_json(line)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            field = ".".join(map(str, fault["loc"]))
            if not field:
                raise ValueError(f"{place}: found no JSON object, wanted one: {shape_of_line()}") from None
            if fault["type"] == "extra_forbidden":
                raise ValueError(
                    f"{place}: found an unknown field {shorten(field)}, wanted some of {', '.join(Key.model_fields)}"
                ) from None
            if field == "sha256":  # may be the token itself
                raise ValueError(
                    f"{place}: found no digest in sha256, wanted 64 hexadecimal digits: {shape_of_line()}"
                ) from None
            raise ValueError(f"{place}: {describe_all([fault])}: {shape_of_line()}") from None


def shape_of_line() -> str:
    """The next move, for whoever wrote a line by hand."""
    return "run `python -m serving key NAME` for a line that is right"


def make_key(arguments: Sequence[str]) -> None:
    """`python -m serving key NAME`: a new token on stderr, its line of the file on stdout."""
    parser = argparse.ArgumentParser(
        "python -m serving key",
        description="Make an API key. Its token goes to stderr, once; its line, to be appended to the file that "
        "SONORANT_SERVE_KEYS_FILE names, to stdout.",
    )
    parser.add_argument("name", help="whose key it is; written to the log")
    parser.add_argument("--models", help="the models it may use: NAME,NAME… [all]")
    parser.add_argument("--requests-per-minute", help="[no limit]")
    parser.add_argument("--audio-seconds-per-hour", help="[no limit]")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    if "models" in given:
        given["models"] = given["models"].split(",")
    token = f"snr_{secrets.token_urlsafe(32)}"
    try:
        key = Key(**given, sha256=hashlib.sha256(token.encode()).hexdigest())
    except ValidationError as error:
        sys.exit(f"key: {describe_all(error.errors())}")
    print(f"token, shown this once: {token}", file=sys.stderr)
    print(key.model_dump_json(exclude_none=True))
