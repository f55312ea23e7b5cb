"""The log: one line an event on stderr, as JSON for programs or as text for people.

A line holds no audio, no token, no file name and no query: of an exception it has the type and the place, for the
message may quote what a client sent.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from pathlib import Path

from serving.errors import one_line

ROOT = Path(__file__).resolve().parents[1]


class Line(logging.Formatter):
    """A record as one line. What a call gives as `extra={"fields": {…}}` stands beside the message."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "message": one_line(record.getMessage()),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1]:
            line["exception"] = describe_exception(record.exc_info[1])
        if self.form == "json":
            return json.dumps(line, default=str)
        return " ".join([*map(str, list(line.values())[:3]), *(f"{k}={v}" for k, v in list(line.items())[3:])])


def describe_exception(error: BaseException) -> str:
    """The types and places of an exception and of what caused it, without their messages."""
    told: list[str] = []
    seen: BaseException | None = error
    while seen is not None and len(told) < 5:
        frames = traceback.extract_tb(seen.__traceback__)[-12:]
        places = " < ".join(f"{shorten_path(f.filename)}:{f.lineno} {f.name}" for f in reversed(frames))
        told.append(f"{type(seen).__name__} at {places}")
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return " caused by ".join(told)


def shorten_path(name: str) -> str:
    """A source file's path, from the checkout or from its package on."""
    path = Path(name)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else "/".join(path.parts[-2:])


def without_queries(record: logging.LogRecord) -> bool:
    """Whether a record may be written: uvicorn's line for a WebSocket has the query; the gate writes a better one."""
    return not (record.name.startswith("uvicorn") and "WebSocket %s" in str(record.msg))


def start_log(form: str | None) -> None:
    """Send every logger's lines to stderr; `form` is json or text, or none: text where stderr is a terminal."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Line(form or ("text" if sys.stderr.isatty() else "json")))
    handler.addFilter(without_queries)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
