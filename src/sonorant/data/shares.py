"""A corpus prepared in shares: parts of its rows checked and resampled apart, perhaps on other machines, then joined.

    share/
      entries.jsonl   a line for each row of the part: source, place among the source's rows, the row, what became of it
      sources.json    what each source is
      audio/…  images/…

Which part a row falls to depends on its place alone, so any number of parts makes the same corpus.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from sonorant.config import ConvertConfig, Part, PrepareConfig, Source, SyntheticSource
from sonorant.data.assembly import choose_splits, path_in_source, source_root
from sonorant.data.corpus import Refused, Row, place, to_line
from sonorant.data.intake import Outcome
from sonorant.data.progress import Report
from sonorant.data.sources import Entry, read_source
from sonorant.data.synthesis import SHARD_UTTERANCES as BLOCK

ENTRIES = "entries.jsonl"
SOURCES = "sources.json"
Placed = tuple[int, Entry]
"""An entry and its place among its source's."""


def read_part(source: Source, config: PrepareConfig, part: Part, folder: Path, report: Report) -> list[Placed]:
    """What falls to a part of the rows that a source offers and keeps, each with its speaker's split."""
    entries = choose_splits(read_source(source, folder, config.num_workers, report, part), source, config.seed)
    if isinstance(source, SyntheticSource):
        # It has made no others.
        blocks = count(part.index, part.count)
        return list(zip((block * BLOCK + i for block in blocks for i in range(BLOCK)), entries, strict=False))
    return [(i, entry) for i, entry in enumerate(entries) if i // BLOCK % part.count == part.index]


def write_share(
    folder: Path,
    config: PrepareConfig,
    parts: Mapping[str, Sequence[Placed]],
    outcomes: Iterable[tuple[Outcome, Path]],
    kinds: Mapping[str, Mapping[str, str]],
) -> None:
    """Write a part of every source into the empty `folder`; `outcomes` has an item for each entry that is a row."""
    found = iter(outcomes)
    with (folder / ENTRIES).open("w", encoding="utf-8") as file:
        for source in config.sources:
            for number, entry in parts[source.name]:
                line: dict[str, Any] = {"source": source.name, "place": number}
                if isinstance(entry, Refused):
                    line["refused"] = vars(entry)
                else:
                    outcome, files = next(found)
                    if not outcome.reason:
                        audio = place(files / outcome.audio, folder, "audio")
                        image = place(files / outcome.image, folder, "images") if outcome.image else None
                        outcome = replace(outcome, audio=audio, image=image)
                    path = path_in_source(entry.path, source)
                    line |= {"row": {**vars(entry), "path": path, "image": None}, "outcome": vars(outcome)}
                file.write(to_line(line))
    (folder / SOURCES).write_text(json.dumps(kinds, indent=1) + "\n")


def read_shares(
    folders: Sequence[Path], records: Sequence[Mapping[str, Any]], config: PrepareConfig
) -> tuple[list[Entry], list[tuple[Outcome, Path] | None], dict[str, dict[str, str]]]:
    """All sources' entries in their order, what became of each that is a row, and what each source is.

    Raises ValueError where the shares are not all parts of this section's rows.
    """
    check_shares(folders, records, config)
    kinds = [json.loads((folder / SOURCES).read_text()) for folder in folders]
    for folder, kind in zip(folders, kinds, strict=True):
        if kind != kinds[0]:
            raise ValueError(
                f"share {folder}: found the sources {kind}, wanted those of {folders[0]}, {kinds[0]}: "
                "convert both in one image"
            )
    lines: dict[str, list[tuple[int, Path, dict[str, Any]]]] = defaultdict(list)
    for folder in folders:
        for text in (folder / ENTRIES).read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            lines[line["source"]].append((line["place"], folder, line))
    entries: list[Entry] = []
    outcomes: list[tuple[Outcome, Path] | None] = []
    for source in config.sources:
        for _, folder, line in sorted(lines[source.name], key=lambda placed: placed[0]):
            is_row = "row" in line
            entries.append(to_row(line["row"], source) if is_row else Refused(**line["refused"]))
            outcomes.append((Outcome(**line["outcome"]), folder) if is_row else None)
    return entries, outcomes, kinds[0]


def check_shares(folders: Sequence[Path], records: Sequence[Mapping[str, Any]], config: PrepareConfig) -> None:
    """ValueError where the shares were made from another section, or are not each part once."""
    wanted = config.model_dump(mode="json")
    parts = []
    for folder, record in zip(folders, records, strict=True):
        found = dict(record["config"])
        parts.append(ConvertConfig.model_validate(found).part)
        del found["part"]
        if differing := sorted(key for key in wanted if found.get(key) != wanted[key]):
            raise ValueError(
                f"share {folder}: found {', '.join(differing)} of another section `prepare`, wanted the one given: "
                "convert again with the same parameters"
            )
    counts = {part.count for part in parts}
    if len(counts) > 1 or sorted(part.index for part in parts) != list(range(parts[0].count)):
        raise ValueError(
            f"shares: found the parts {', '.join(f'{part.index} of {part.count}' for part in parts)}, wanted each of "
            "one count once: convert those that are missing, leave out the others"
        )


def to_row(written: Mapping[str, Any], source: Source) -> Row:
    """A row as a share holds it. Its path leads to where the source's file was."""
    root = source_root(source)
    spans: dict[str, Any] = {
        kind: None if written[kind] is None else tuple((str(label), start, end) for label, start, end in written[kind])
        for kind in ("words", "phones")
    }
    path = root / written["path"] if root else Path(written["path"])
    return Row(**{**written, **spans, "path": path, "distractors": tuple(written["distractors"])})


def of_rows(
    entries: Iterable[Entry], outcomes: Iterable[tuple[Outcome, Path] | None]
) -> Iterator[tuple[Outcome, Path]]:
    """The outcomes of those entries that are rows still."""
    for entry, outcome in zip(entries, outcomes, strict=True):
        if isinstance(entry, Row):
            assert outcome is not None
            yield outcome
