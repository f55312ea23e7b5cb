"""`sonorant embed`: audio files to the embedding server, its answers to a table or a folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from sonorant.client.inputs import find_files
from sonorant.client.outputs import check_output, failures_of


def embed(
    files: Annotated[list[str], typer.Argument(help="audio files, folders of them, or @list of paths, one a line")],
    output: Annotated[
        Path, typer.Option("--output", help="a table if it ends in .parquet, else a folder of .safetensors")
    ],
    url: Annotated[str, typer.Option("--url", help="of the embedding server")] = "http://127.0.0.1:8000",
    units: Annotated[bool, typer.Option("--units", help="unit tokens instead of embeddings")] = False,
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate", help="with --units: a run of equal units once, with its duration")
    ] = False,
    layer: Annotated[str | None, typer.Option("--layer", help="an index, published, last or weighted")] = None,
    layer_weights: Annotated[
        str | None, typer.Option("--layer-weights", help="with --layer weighted: numbers with commas between")
    ] = None,
    pooling: Annotated[str | None, typer.Option("--pooling", help="none, mean or attentive")] = None,
    normalise: Annotated[str | None, typer.Option("--normalise", help="none, l2 or utterance")] = None,
    model: Annotated[str | None, typer.Option("--model", help="one of the server's; default: its first")] = None,
    start: Annotated[float | None, typer.Option("--start", help="seconds of each file from which to answer")] = None,
    end: Annotated[float | None, typer.Option("--end", help="seconds of each file up to which to answer")] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="requests at once")] = 4,
    retries: Annotated[int, typer.Option("--retries", help="of a request where the server is overloaded or lost")] = 8,
    timeout: Annotated[float, typer.Option("--timeout", help="seconds for one answer")] = 120,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="a file that holds the API key; default: $SONORANT_API_KEY")
    ] = None,
) -> None:
    """Send audio files to the embedding server and keep its answers; the same command goes on where it was ended.

    Exit status 1 where a file has no answer: it is listed, and the others are not held up.
    """
    from sonorant.client.run import Asked, embed_files, show_failures
    from sonorant.client.service import Client

    check_within("--jobs", jobs, 1, 256)
    check_within("--retries", retries, 0, 1000)
    check_within("--timeout", timeout, 0.001, 86_400)
    for name, second in (("--start", start), ("--end", end)):
        check_within(name, second or 0, 0, 1e9)
    common = {"model": model, "start": start, "end": end}
    shaping = {"layer": layer, "layer_weights": layer_weights, "pooling": pooling, "normalise": normalise}
    if units:
        for name, value in shaping.items():
            if value is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag}: found {value} beside --units, wanted one of them: leave one out")
        asked = Asked("units", {**common, "deduplicate": deduplicate or None})
    elif deduplicate:
        raise ValueError("--deduplicate: found it without --units, wanted both: add --units")
    else:
        asked = Asked("embeddings", {**common, **shaping})
    check_output(output)
    found = find_files(files)
    with Client(url, read_key(key_file), timeout=timeout, retries=retries) as client:
        failures = embed_files(client, asked, found, output, jobs)
    if failures:
        show_failures(failures, failures_of(output))
        raise SystemExit(1)


def read_key(path: Path | None) -> str | None:
    """The key that a file holds; None where no file is given."""
    if path is None:
        return None
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise ValueError(f"--key-file {path}: found it unreadable ({reason}), wanted a key in it: check it") from None
    if not key:
        raise ValueError(f"--key-file {path}: found it empty, wanted a key in it: write it there")
    return key


def check_within(flag: str, value: float, least: float, most: float) -> None:
    """ValueError where a number makes no sense."""
    if not (math.isfinite(value) and least <= value <= most):
        raise ValueError(f"{flag}: found {value:g}, wanted {least:g} to {most:g}: correct it")
