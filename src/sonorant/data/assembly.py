"""From what sources offer to what a corpus holds: no name twice, no audio twice, one split a speaker."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sonorant.config import PrepareConfig, Source, SyntheticSource
from sonorant.data.corpus import REFUSED, Refused, Row, Taken
from sonorant.data.intake import Outcome, RefusalError, fit_times, take_rows
from sonorant.data.progress import Report
from sonorant.data.sources import Entry
from sonorant.data.splits import split_speakers


def choose_splits(entries: Sequence[Entry], source: Source, seed: int) -> list[Entry]:
    """One source's entries, each row with its speaker's split, without the splits it does not keep.

    Raises ValueError where a speaker is in two splits or nothing is kept.
    """
    rows = [entry for entry in entries if isinstance(entry, Row)]
    splits = split_speakers(rows, source.dev_share, source.test_share, seed)
    kept: list[Entry] = []
    for entry in entries:
        if isinstance(entry, Refused):
            kept.append(entry)
        elif splits[entry.speaker] in source.splits:
            kept.append(replace(entry, split=splits[entry.speaker]))
    if rows and not any(isinstance(entry, Row) for entry in kept):
        raise ValueError(
            f"source {source.name}: found rows of {sorted(set(splits.values()))} only, wanted some of "
            f"{list(source.splits)}: change the source's splits or shares"
        )
    return kept


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


def settle(entries: Sequence[Entry], config: PrepareConfig, folder: Path, report: Report) -> Iterator[Taken | Refused]:
    """What becomes of each entry, in order, files in `folder`; of rows with one audio the first is kept."""
    rows = [entry for entry in entries if isinstance(entry, Row)]
    outcomes = take_rows(rows, config.min_seconds, config.max_seconds, folder, config.num_workers, report)
    first_with: dict[str, str] = {}
    for entry in entries:
        if isinstance(entry, Refused):
            yield entry
            continue
        row, outcome, shard = next(outcomes)
        if outcome.reason:
            yield refuse(row, config, outcome.reason, outcome.detail)
            continue
        try:
            taken = make_taken(row, outcome, shard)
        except RefusalError as refusal:
            yield refuse(row, config, refusal.reason, refusal.detail)
            continue
        if outcome.digest in first_with:
            yield refuse(row, config, "duplicate audio", f"the same samples as {first_with[outcome.digest]}")
            continue
        first_with[outcome.digest] = row.id
        yield taken


def make_taken(row: Row, outcome: Outcome, shard: Path) -> Taken:
    """A row with its files; RefusalError where its times lie outside its samples."""
    assert row.split is not None
    seconds = outcome.seconds
    words, phones = fit_times(row.words, seconds, "word"), fit_times(row.phones, seconds, "phone")
    return Taken(
        row=replace(row, words=words, phones=phones),
        split=row.split,
        digest=outcome.digest,
        num_samples=outcome.num_samples,
        audio=shard / outcome.audio,
        image=shard / outcome.image if outcome.image else None,
    )


def refuse(row: Row, config: PrepareConfig, reason: str, detail: str) -> Refused:
    """A row as a refused one. Its path begins at its source: no machine's folders come into a corpus."""
    source = next(source for source in config.sources if source.name == row.source)
    path = row.path.name
    if not isinstance(source, SyntheticSource):
        root = source.path if source.path.is_dir() else source.path.parent
        path = row.path.relative_to(root).as_posix() if row.path.is_relative_to(root) else row.path.name
    return Refused(row.source, row.id, path, reason, detail)


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
