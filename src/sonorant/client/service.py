"""Requests to the embedding server: audio out, arrays back, every failure one line."""

from __future__ import annotations

import base64
import email.utils
import itertools
import json
import math
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import urlsplit

import httpx
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from sonorant import __version__

Array = NDArray[Any]
Audio = bytes | str | os.PathLike[str]
"""The bytes of an audio file, or where it lies."""
SAFETENSORS, JSON = "application/safetensors", "application/json"
KEY_VARIABLE = "SONORANT_API_KEY"
PASSING = {408, 429, 502, 503, 504}
"""Statuses that may be others a little later."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # s between two attempts, where the server does not say
LONGEST_ASKED_WAIT = 600.0  # s that the server may ask for
MAX_FAULT_BYTES = 1 << 16  # of an answer that is an error
MAX_CARD_BYTES = 1 << 24  # of the list of models
BLIND_RETRIES = 2  # where no answer ever came: the URL may be wrong


class ServiceError(ValueError):
    """An answer that is an error, or none (status 0): a code for programs, one line for people."""

    def __init__(
        self, status: int, code: str, message: str, request_id: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.request_id = status, code, message, request_id
        self.retry_after = retry_after

    @property
    def is_passing(self) -> bool:
        """Whether the same request may succeed a little later."""
        return self.status in PASSING or (self.status == 0 and self.code in ("unreachable", "timeout"))


@dataclass(frozen=True)
class Answer:
    """What the server made of one file.

    head: what holds for every answer of these options (model, layer, …); about: seconds, start_ms, num_frames;
    arrays: embedding (T, D) or (D,), or units (T,) and perhaps durations_ms (T,).
    """

    head: Mapping[str, Any]
    about: Mapping[str, Any]
    arrays: Mapping[str, Array]


@dataclass(frozen=True)
class FoundImage:
    """An image that the server found. rank: from 1; texts: what is said of it; thumbnail: a small JPEG, if any."""

    id: str
    rank: int
    score: float
    texts: tuple[str, ...]
    thumbnail: bytes | None


class Client:
    """The embedding server at `url`; threads may share it.

    key: the API key, by default $SONORANT_API_KEY; timeout: seconds for one answer; retries: of what passes (an
    overloaded server, a lost connection), with growing waits or those the server asks for.
    Every method raises ServiceError where it gets no answer, OSError where the audio cannot be read.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        timeout: float = 120,
        retries: int = 8,
        max_answer_bytes: int = 1 << 29,
    ) -> None:
        self.url, self.timeout, self.retries, self.max_answer_bytes = check_url(url), timeout, retries, max_answer_bytes
        # What is sent compressed could be any size once opened.
        headers = {"Accept-Encoding": "identity", "User-Agent": f"sonorant/{__version__}"}
        key = os.environ.get(KEY_VARIABLE) if key is None else key
        if key:
            headers["Authorization"] = f"Bearer {check_key(key)}"
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=timeout,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        self._closed = threading.Event()
        self._was_answered = False

    def embed(
        self,
        audio: Audio,
        *,
        layer: int | str | Sequence[float] = "published",
        pooling: str = "none",
        normalise: str = "none",
        model: str | None = None,
        start: float | None = None,
        end: float | None = None,
    ) -> NDArray[np.float32]:
        """The audio's frames (T, D), or with a pooling one vector (D,).

        layer: an index, published, last, or a weight for every layer; start, end: seconds of the audio.
        """
        options = {"pooling": pooling, "normalise": normalise, "model": model, "start": start, "end": end}
        if isinstance(layer, int | str):
            options["layer"] = str(layer)
        else:
            options |= {"layer": "weighted", "layer_weights": ",".join(repr(float(weight)) for weight in layer)}
        return self.ask("embeddings", audio, options).arrays["embedding"]

    def units(
        self,
        audio: Audio,
        *,
        deduplicate: bool = False,
        model: str | None = None,
        start: float | None = None,
        end: float | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """The audio's units (T,), and with `deduplicate` how many milliseconds each of them lasts (T,)."""
        options = {"deduplicate": deduplicate or None, "model": model, "start": start, "end": end}
        arrays = self.ask("units", audio, options).arrays
        return arrays["units"], arrays.get("durations_ms")

    def search(
        self, audio: Audio, *, top: int = 10, thumbnails: bool = False, model: str | None = None
    ) -> list[FoundImage]:
        """The `top` images that the audio speaks of, the best first, with `thumbnails` a small JPEG of each."""
        given = {"top": top, "thumbnails": thumbnails or None, "model": model}
        options = {name: text_of(value) for name, value in given.items() if value is not None}
        body = self._request("POST", "v1/images/search", JSON, self.max_answer_bytes, audio, options)
        try:
            [result] = json.loads(body)["results"]
            return [image_of(about) for about in result["images"]]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise self._strange("images with scores") from None

    def models(self) -> list[dict[str, Any]]:
        """What is loaded: a model's id, digest, layers, dimensions and so on."""
        body = self._request("GET", "v1/models", JSON, MAX_CARD_BYTES)
        try:
            models = json.loads(body)["models"]
            if not models or not all(isinstance(model[key], str) for model in models for key in ("id", "digest")):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._strange("a list of models") from None
        return list(models)

    def ask(self, kind: str, audio: Audio, options: Mapping[str, Any]) -> Answer:
        """The answer of /v1/embeddings or /v1/units to one file; options of None are left to the server."""
        given = {name: text_of(value) for name, value in options.items() if value is not None}
        body = self._request("POST", f"v1/{kind}", SAFETENSORS, self.max_answer_bytes, audio, given)
        answer = parse(kind, body)
        if answer is None:
            raise self._strange(f"{kind} as safetensors")
        return answer

    def close(self) -> None:
        """Let go of the connections; requests that wait for another attempt give up."""
        self._closed.set()
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    # ------------------------------------------------------------------------------------------------- requests

    def _request(
        self,
        method: str,
        route: str,
        media: str,
        max_bytes: int,
        audio: Audio | None = None,
        options: Mapping[str, str] | None = None,
    ) -> bytes:
        for attempt in itertools.count():
            try:
                return self._send(method, route, media, max_bytes, audio, options)
            except ServiceError as error:
                wait = wait_before(attempt, error.retry_after)
                blind = error.status == 0 and not self._was_answered
                retries = min(self.retries, BLIND_RETRIES) if blind else self.retries
                if not error.is_passing or attempt >= retries or wait > LONGEST_ASKED_WAIT or self._closed.wait(wait):
                    raise
        raise AssertionError("count() has no end")

    def _send(
        self,
        method: str,
        route: str,
        media: str,
        max_bytes: int,
        audio: Audio | None,
        options: Mapping[str, str] | None,
    ) -> bytes:
        deadline = time.monotonic() + self.timeout
        headers = {"Accept": media}
        if audio is not None:
            headers["Content-Type"] = "application/octet-stream"
        try:
            with (
                opened(audio) as content,
                self._http.stream(method, route, params=options, content=content, headers=headers) as response,
            ):
                self._was_answered = True
                good = response.status_code == 200
                body, whole = read(response, max_bytes if good else MAX_FAULT_BYTES, deadline)
        except (httpx.TimeoutException, TimeoutError):
            wanted = f"wanted it within {self.timeout:g} s: allow more time, or send less audio at once"
            raise ServiceError(0, "timeout", f"{self.url}: found no whole answer, {wanted}") from None
        except httpx.HTTPError as error:
            found = one_line(str(error)) or type(error).__name__
            wanted = "wanted a server that answers: start it, or correct the URL"
            raise ServiceError(0, "unreachable", f"{self.url}: found no answer ({found}), {wanted}") from None
        except RuntimeError:  # httpx's word for a client that was closed meanwhile
            if not self._closed.is_set():
                raise
            raise ServiceError(0, "closed", f"{self.url}: found the client closed, wanted it open") from None
        if not good:
            raise self._fault(response, body)
        if not whole:
            wanted = f"wanted at most {max_bytes} bytes: ask for less of it with start and end, or pool"
            raise ServiceError(200, "too_large", f"answer: found more, {wanted}")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise self._strange("an answer that is not compressed")
        return body

    def _strange(self, wanted: str) -> ServiceError:
        message = f"{self.url}: found an answer of something else, wanted {wanted}: give the embedding server's URL"
        return ServiceError(200, "bad_answer", message)

    def _fault(self, response: httpx.Response, body: bytes) -> ServiceError:
        """What an answer that is not 200 says; it need not come from the embedding server."""
        status, retry_after = response.status_code, seconds_of(response.headers.get("retry-after"))
        request_id = one_line(response.headers.get("x-request-id", ""))[:64]
        try:
            error = json.loads(body)["error"]
            code, message = one_line(str(error["code"]))[:64], one_line(str(error["message"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            code, found = "bad_answer", f"HTTP {status} {one_line(response.reason_phrase)}".strip()
            if 300 <= status < 400:
                found += f" to {one_line(response.headers.get('location', 'nowhere'))}"
            message = f"{self.url}: found {found}, wanted the embedding server's answer: correct the URL"
        return ServiceError(status, code, message, request_id, retry_after)


# ------------------------------------------------------------------------------------------------- what is sent


def check_url(url: str) -> str:
    """The URL without a slash at its end; ValueError where it cannot be that of a server."""
    wanted = "wanted one such as http://127.0.0.1:8000"
    try:
        httpx.URL(url)
        parsed = urlsplit(url)
        is_server = parsed.scheme in ("http", "https") and parsed.hostname and parsed.port != 0
    except (httpx.InvalidURL, ValueError):
        raise ValueError(f"--url: found {url!r}, {wanted}: correct it") from None
    if "@" in parsed.netloc:
        raise ValueError(f"--url: found a name or password in it, {wanted}: put the key into ${KEY_VARIABLE}")
    if not is_server or parsed.query or parsed.fragment:
        raise ValueError(f"--url: found {url!r}, {wanted}: correct it")
    return url.rstrip("/")


def check_key(key: str) -> str:
    """The key; ValueError, which does not tell it, where it cannot stand in a header."""
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError("API key: found blanks or characters other than ASCII's, wanted the key alone: correct it")
    return key


def opened(audio: Audio | None) -> AbstractContextManager[bytes | BinaryIO | None]:
    """The audio as a request's body; a file is read while it is sent."""
    return nullcontext(audio) if audio is None or isinstance(audio, bytes) else Path(audio).open("rb")


def text_of(value: object) -> str:
    """An option as a query has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def wait_before(attempt: int, asked: float | None) -> float:
    """Seconds until the next attempt: what the server asks for and a little more, or twice as long each time.

    Chance keeps clients that failed together from coming back together.
    """
    if asked is not None:
        return asked + random.uniform(0, min(1, FIRST_WAIT * (1 + attempt)))
    return random.uniform(0.5, 1) * min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(attempt, 20))


# ---------------------------------------------------------------------------------------------- what comes back


def read(response: httpx.Response, max_bytes: int, deadline: float) -> tuple[bytes, bool]:
    """The body as it was sent, and whether that is all of it; TimeoutError after the deadline."""
    body = bytearray()
    for piece in response.iter_raw():
        body += piece
        if len(body) > max_bytes:
            return bytes(body[:max_bytes]), False
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(body), True


def parse(kind: str, body: bytes) -> Answer | None:
    """The answer to one file, or None where it is not that."""
    try:
        size = int.from_bytes(body[:8], "little")
        said = json.loads(body[8 : 8 + size])["__metadata__"]
        head, [about] = json.loads(said["head"]), json.loads(said["files"])
        about = {
            "seconds": float(about["seconds"]),
            "start_ms": int(about["start_ms"]),
            "num_frames": int(about["num_frames"]),
        }
        # Copied, for what shares the answer's memory can be neither written to nor let go of.
        arrays = {n.removesuffix(".0"): np.array(a) for n, a in safetensors.numpy.load(body).items()}
        found = arrays["embedding" if kind == "embeddings" else "units"]
        if kind == "embeddings":
            fits = found.dtype == np.float32 and (found.ndim == 1 or found.shape[:-1] == (about["num_frames"],))
        else:
            fits = all(array.dtype.kind == "i" and array.shape == (len(found),) for array in arrays.values())
        if not fits or not isinstance(head["model"], str):
            return None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, SafetensorError):
        return None
    return Answer(head, about, arrays)


def image_of(about: Mapping[str, Any]) -> FoundImage:
    """An image as JSON has it; ValueError, KeyError, TypeError or AttributeError where it is none."""
    small = about["thumbnail"]
    if small is not None:
        small = base64.b64decode(small.removeprefix("data:image/jpeg;base64,"), validate=True)
    texts = tuple(map(str, about["texts"]))
    return FoundImage(str(about["id"]), int(about["rank"]), float(about["score"]), texts, small)


def seconds_of(text: str | None) -> float | None:
    """A Retry-After header, which holds seconds or a date."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def one_line(text: str, length: int = 500) -> str:
    """A stranger's text without line breaks and control characters, which a terminal might obey."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= length else f"{line[:length]}…"
