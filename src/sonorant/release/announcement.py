"""How a run ended, said where people look."""

from __future__ import annotations

import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

WEBHOOK = "SONORANT_WEBHOOK"
"""The variable with the address that is told, which is a secret: whoever knows it can write there."""
SECONDS = 10.0


class Status(Protocol):
    """What is needed of kfp's PipelineTaskFinalStatus."""

    state: str
    pipeline_task_name: str
    error_code: int | None
    error_message: str | None


def conclude(status: Status, pipeline: str, run: str) -> dict[str, Any]:
    """Print one JSON line that says how the run ended, and post it to $SONORANT_WEBHOOK where that is set.

    That nobody could be told is said on stderr and is no failure of the run.
    """
    line = {
        "pipeline": pipeline,
        "run": run,
        "state": status.state,
        "task": status.pipeline_task_name if status.state != "SUCCEEDED" else None,
        "error": status.error_message or None,
    }
    print(json.dumps(line), flush=True)
    url = os.environ.get(WEBHOOK, "").strip()
    # Chat systems show `text` and leave the rest.
    if url and (fault := post(url, json.dumps({"text": describe(line), **line}))):
        print(f"${WEBHOOK}: found {fault}, wanted 2xx: nobody was told how the run ended", file=sys.stderr, flush=True)
    return line


def describe(line: Mapping[str, Any]) -> str:
    """The line for people."""
    fault = f" in {line['task']}: {line['error'] or 'see its log'}" if line["task"] else ""
    return f"{line['pipeline']}, run {line['run']}: {line['state']}{fault}"


class Unmoved(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: what a hook is told goes nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        """None: the answer stays the error that it is."""


def post(url: str, text: str) -> str | None:
    """Post JSON within seconds; what went wrong, which does not tell the address."""
    if urlsplit(url).scheme not in ("http", "https"):
        return "no http:// or https:// address"
    request = urllib.request.Request(url, text.encode(), {"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.build_opener(Unmoved).open(request, timeout=SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except urllib.error.URLError as error:
        return " ".join(str(error.reason).split())
    except (OSError, ValueError, http.client.HTTPException) as error:
        return type(error).__name__
