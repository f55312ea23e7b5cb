"""The step `prepare`, and `convert`, which does a part of its work where many machines share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sonorant.config import ConvertConfig, Part, PrepareConfig
from sonorant.steps.step import Ins, Metrics, Out, Scratch, step

if TYPE_CHECKING:
    from sonorant.data.corpus import Row
    from sonorant.data.intake import Outcome
    from sonorant.data.shares import Placed


@step
def convert(config: ConvertConfig, *, share: Out, scratch: Scratch) -> Metrics:
    """Check and resample the speech of one part of all rows, for `prepare` to join."""
    from sonorant.data.corpus import Row
    from sonorant.data.shares import write_share
    from sonorant.data.sources import describe_source

    parts = read_parts("convert", config, config.part, scratch)
    rows = [entry for source in config.sources for _, entry in parts[source.name] if isinstance(entry, Row)]
    kinds = {source.name: describe_source(source) for source in config.sources}
    write_share(share, config, parts, taken("convert", rows, config, scratch), kinds)
    return {"rows": float(len(rows))}


@step
def prepare(config: PrepareConfig, *, corpus: Out, scratch: Scratch, shares: Ins | None = None) -> Metrics:
    """Check and resample the speech of all sources, and write a corpus in splits, speakers or images apart."""
    from sonorant.artifacts import read_record
    from sonorant.data.assembly import check_enough, name_apart, part_images, settle
    from sonorant.data.corpus import REFUSED, Refused, Row, Taken, write_corpus, write_refused
    from sonorant.data.shares import of_rows, read_shares
    from sonorant.data.sources import describe_source

    if shares:
        records = [read_record(folder, "share") for folder in shares]
        entries, found, kinds = read_shares(shares, records, config)
        named = name_apart(entries, config)
        outcomes = of_rows(named, found)
    else:
        parts = read_parts("prepare", config, Part(), scratch)
        kinds = {source.name: describe_source(source) for source in config.sources}
        named = name_apart([entry for source in config.sources for _, entry in parts[source.name]], config)
        outcomes = taken("prepare", [entry for entry in named if isinstance(entry, Row)], config, scratch)
    settled = part_images(list(settle(named, outcomes, config)), config)
    kept = [one for one in settled if isinstance(one, Taken)]
    refused = [one for one in settled if isinstance(one, Refused)]
    write_refused(scratch / REFUSED, refused)
    check_enough(kept, refused, config, scratch)
    stats = write_corpus(corpus, kept, refused, kinds)
    return {
        "hours": stats["hours"],
        "utterances": float(stats["utterances"]),
        "speakers": float(stats["speakers"]),
        "refused": float(stats["refused"]["rows"]),
        "refused_share": stats["refused"]["share"],
    }


def read_parts(step: str, config: PrepareConfig, part: Part, scratch: Path) -> dict[str, list[Placed]]:
    """A part of what every source offers."""
    from sonorant.data.progress import shown_progress
    from sonorant.data.shares import read_part

    parts = {}
    for source in config.sources:
        with shown_progress(f"{step}: making {source.name}", "utterances") as report:
            parts[source.name] = read_part(source, config, part, scratch / "sources" / source.name, report)
    return parts


def taken(step: str, rows: Sequence[Row], config: PrepareConfig, scratch: Path) -> Iterator[tuple[Outcome, Path]]:
    """What becomes of each row, and the folder of its files."""
    from sonorant.data.intake import Limits, take_rows
    from sonorant.data.progress import shown_progress

    limits = Limits(config.min_seconds, config.max_seconds, config.max_pixels)
    with shown_progress(f"{step}: checking", "rows") as report:
        for _, outcome, folder in take_rows(rows, limits, scratch / "shards", config.num_workers, report):
            yield outcome, folder
