"""Items: tokens of phones, where they are and who says them; the `.item` files of libri-light and ZeroSpeech."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sonorant.data.frames import FRAME_RATE

Slicing = Literal["fixed", "librilight"]
Segment = tuple[str, float, float]
"""(label, start, end) in seconds."""

HEADER = "#file onset offset #phone prev-phone next-phone speaker"
SILENCE = "SIL"


@dataclass(frozen=True, slots=True, order=True)
class Item:
    """One token of a phone: where it is, its neighbours and who says it. Times are seconds in the file."""

    file: str
    onset: float
    offset: float
    phone: str
    previous: str
    following: str
    speaker: str


def read_items(path: Path) -> list[Item]:
    """The items of an `.item` file; ValueError where there is none, or a line is not one."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fault = type(error).__name__
        raise ValueError(f"{path}: found no text ({fault}), wanted an .item file: correct its name") from None
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            file, onset, offset, phone, previous, following, speaker = line.split()
            item = Item(file, float(onset), float(offset), phone, previous, following, speaker)
        except ValueError:
            raise ValueError(f"{path}:{number}: found {line!r}, wanted {HEADER[1:]!r}: correct it") from None
        if not 0 <= item.onset <= item.offset < math.inf:  # nor NaN
            raise ValueError(
                f"{path}:{number}: found {onset} to {offset}, wanted seconds from 0 on, onset first: correct them"
            )
        items.append(item)
    return items


def find_unwritable(items: Iterable[Item]) -> str | None:
    """A name that an `.item` file cannot hold: empty, or with white space, or one that makes its line a comment."""
    for item in items:
        for name in (item.file, item.phone, item.previous, item.following, item.speaker):
            if name.split() != [name]:
                return name
        if item.file.startswith("#"):
            return item.file
    return None


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Write items as an `.item` file; read again they hold the same frames."""
    lines = [HEADER]
    for item in items:
        times = (_seconds(item.onset), _seconds(item.offset))
        lines.append(" ".join([item.file, *times, item.phone, item.previous, item.following, item.speaker]))
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _seconds(time: float) -> str:
    """To a tenth of a millisecond where that is what it is, else to a nanosecond."""
    short = f"{time:.4f}"
    return short if abs(float(short) - time) < 1e-9 else f"{time:.9f}"


def phone_items(file: str, speaker: str, phones: Sequence[Segment]) -> list[Item]:
    """Every phone of an utterance as an item of its own span; silence, and what is off the edge, is `SIL`."""
    labels = [SILENCE, *(label for label, _, _ in phones), SILENCE]
    return [
        Item(file, start, end, label, labels[place], labels[place + 2], speaker)
        for place, (label, start, end) in enumerate(phones)
        if label != SILENCE
    ]


def triphone_items(file: str, speaker: str, phones: Sequence[Segment]) -> list[Item]:
    """Every phone between two phones as an item that spans all three; none of them may be silence."""
    return [
        Item(file, before[1], after[2], middle[0], before[0], after[0], speaker)
        for before, middle, after in zip(phones, phones[1:], phones[2:], strict=False)
        if SILENCE not in (before[0], middle[0], after[0])
    ]


def frame_span(item: Item, num_frames: int, slicing: Slicing = "fixed", rate: float = FRAME_RATE) -> tuple[int, int]:
    """First frame of an item and one past its last; frame i is at (i + ½) / `rate` seconds.

    "fixed" keeps every frame in the closed interval; "librilight" leaves out the last, as that program does.
    """
    # Times are decimal: 0.29 s * 50 Hz must be 14.5 and not 14.499999999999998.
    first = max(0, math.ceil(round(item.onset * rate - 0.5, 6)))
    last = math.floor(round(item.offset * rate - 0.5, 6))
    stop = min(num_frames, last + 1 if slicing == "fixed" else last)
    return first, max(first, stop)
