"""From what sources offer to what a corpus holds: no name twice, no audio twice, one split a speaker and an image."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from sonorant.config import PrepareConfig, Source, Split, SyntheticSource
from sonorant.config.prepare import ImagedSource
from sonorant.data.corpus import REFUSED, Refused, Row, Taken
from sonorant.data.intake import Outcome, RefusalError, fit_times
from sonorant.data.sources import Entry
from sonorant.data.splits import split_rows


def choose_splits(entries: Sequence[Entry], source: Source, seed: int) -> list[Entry]:
    """One source's entries, each row with its speaker's or image's split, without the splits it does not keep.

    Raises ValueError where a speaker (or the image, where the source splits by image) is in two splits or nothing is
    kept.
    """
    rows = [entry for entry in entries if isinstance(entry, Row)]
    by = source.split_by if isinstance(source, ImagedSource) else "speaker"
    names = [name_image(row, source) if by == "image" else row.speaker for row in rows]
    splits = split_rows(rows, by, names, source.dev_share, source.test_share, seed)
    split_of = iter(splits)
    kept: list[Entry] = []
    for entry in entries:
        if isinstance(entry, Refused):
            kept.append(entry)
        elif (split := next(split_of)) in source.splits:
            kept.append(replace(entry, split=split))
    if rows and not any(isinstance(entry, Row) for entry in kept):
        raise ValueError(
            f"source {source.name}: found rows of {sorted(set(splits))} only, wanted some of "
            f"{list(source.splits)}: change the source's splits or shares"
        )
    return kept


def name_image(row: Row, source: Source) -> str:
    """What a row's image is called, from its source on; a row without one is by itself."""
    root = source_root(source)
    assert root is not None
    return f"row {row.id}" if row.image is None else Path(os.path.relpath(row.image, root)).as_posix()


def name_apart(entries: Sequence[Entry], config: PrepareConfig) -> list[Entry]:
    """Entries of all sources; speakers, and ids that two sources use, become source/name."""
    sources_of: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if isinstance(entry, Row):
            sources_of[entry.id].add(entry.source)
    named: list[Entry] = []
    seen = set()
    for entry in entries:
        if isinstance(entry, Refused):
            named.append(entry)
            continue
        name = entry.id if len(sources_of[entry.id]) == 1 else f"{entry.source}/{entry.id}"
        if name in seen:
            named.append(refuse(entry, config, "duplicate id", "an earlier row has this id"))
            continue
        seen.add(name)
        named.append(replace(entry, id=name, speaker=f"{entry.source}/{entry.speaker}"))
    return named


def settle(
    entries: Iterable[Entry], outcomes: Iterable[tuple[Outcome, Path]], config: PrepareConfig
) -> Iterator[Taken | Refused]:
    """What becomes of each entry, in order; of rows with one audio the first is kept.

    `outcomes` has an item for each entry that is a row: what became of it, and the folder of its files.
    """
    found = iter(outcomes)
    first_with: dict[str, str] = {}
    for entry in entries:
        if isinstance(entry, Refused):
            yield entry
            continue
        outcome, folder = next(found)
        if outcome.reason:
            yield refuse(entry, config, outcome.reason, outcome.detail)
            continue
        try:
            taken = make_taken(entry, outcome, folder)
        except RefusalError as refusal:
            yield refuse(entry, config, refusal.reason, refusal.detail)
            continue
        if outcome.digest in first_with:
            yield refuse(entry, config, "duplicate audio", f"the same samples as {first_with[outcome.digest]}")
            continue
        first_with[outcome.digest] = entry.id
        yield taken


def part_images(settled: Sequence[Taken | Refused], config: PrepareConfig) -> list[Taken | Refused]:
    """The same, but each image in one split: of the rows of one image those of test are kept, else those of dev.

    Images are the same where their files' bytes are. What is measured on stays whole; training has the most to spare.
    """
    order = get_args(Split)
    split_of: dict[str, Split] = {}
    for one in settled:
        if isinstance(one, Taken) and one.image:
            split_of[one.image.stem] = max(split_of.get(one.image.stem, one.split), one.split, key=order.index)
    parted: list[Taken | Refused] = []
    for one in settled:
        if isinstance(one, Taken) and one.image and (split := split_of[one.image.stem]) != one.split:
            detail = f"its image is in {split}, the row in {one.split}"
            parted.append(refuse(one.row, config, "image of another split", detail))
        else:
            parted.append(one)
    return parted


def make_taken(row: Row, outcome: Outcome, folder: Path) -> Taken:
    """A row with its files; RefusalError where its times lie outside its samples."""
    assert row.split is not None
    seconds = outcome.seconds
    words, phones = fit_times(row.words, seconds, "word"), fit_times(row.phones, seconds, "phone")
    return Taken(
        row=replace(row, words=words, phones=phones),
        split=row.split,
        digest=outcome.digest,
        num_samples=outcome.num_samples,
        audio=folder / outcome.audio,
        image=folder / outcome.image if outcome.image else None,
    )


def refuse(row: Row, config: PrepareConfig, reason: str, detail: str) -> Refused:
    """A row as a refused one."""
    source = next(source for source in config.sources if source.name == row.source)
    return Refused(row.source, row.id, path_in_source(row.path, source), reason, detail)


def path_in_source(path: Path, source: Source) -> str:
    """A row's path from its source on: no machine's folders come into a corpus."""
    root = source_root(source)
    return path.relative_to(root).as_posix() if root and path.is_relative_to(root) else path.name


def source_root(source: Source) -> Path | None:
    """The folder that a source's files lie in; None where they are made."""
    if isinstance(source, SyntheticSource):
        return None
    return source.path if source.path.is_dir() else source.path.parent


def check_enough(taken: Sequence[Taken], refused: Sequence[Refused], config: PrepareConfig, folder: Path) -> None:
    """ValueError where more rows than allowed were refused or none is left; `folder` has the list of them."""
    total = len(taken) + len(refused)
    counts = ", ".join(f"{reason} {n}" for reason, n in Counter(one.reason for one in refused).most_common())
    if len(refused) > config.max_refused_share * total:
        raise ValueError(
            f"prepare: found {len(refused)} of {total} rows refused ({counts}), wanted at most "
            f"{config.max_refused_share:g} of them: read {folder / REFUSED}, then mend the rows "
            "or raise max_refused_share"
        )
    if not taken:
        raise ValueError(
            f"prepare: found an empty corpus, all {total} rows refused ({counts}), wanted one utterance "
            f"at least: read {folder / REFUSED} and mend the rows"
        )
