"""The unit store: every utterance's unit tokens in one memory-mapped array.

    units/
      units.npy     (F,) int16, all utterances end to end
      offsets.npy   (U + 1,) int64, where each utterance begins
      samples.npy   (U,) int64, how long each utterance's audio is
      ids.json      the utterances' ids
      store.json    num_units, rate (Hz), where the units come from
      codebook.safetensors  the k-means centroids that made them

A store says its rate, and its lengths prove it: labels at 100 Hz are refused where 50 Hz is wanted, whatever
store.json says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sonorant.data.frames import FRAME_RATE, SAMPLE_RATE, num_frames

MAX_UNITS = np.iinfo(np.int16).max  # 32,767


class UnitStore:
    """Unit tokens by utterance id.

    Opening one raises ValueError where its rate is not `rate`, or an utterance has not one label a frame.
    """

    def __init__(self, folder: Path, rate: float = FRAME_RATE) -> None:
        path = folder / "store.json"
        if not path.is_file():
            raise ValueError(f"units {folder}: found no store.json, wanted a unit store: run `sonorant cluster` first")
        try:
            self.about: dict[str, Any] = json.loads(path.read_text())
            self._units = np.load(folder / "units.npy", mmap_mode="r")
            self._offsets = np.load(folder / "offsets.npy")
            samples = np.load(folder / "samples.npy")
            ids = json.loads((folder / "ids.json").read_text())
            found_rate, self.num_units = float(self.about["rate"]), int(self.about["num_units"])
        except (OSError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"units {folder}: found a damaged unit store ({reason}), wanted a whole one: cluster again"
            ) from None
        if found_rate != rate:
            raise ValueError(
                f"units {folder}: found labels at {found_rate:g} Hz, wanted {rate:g} Hz, one a frame: cluster again"
            )
        if not len(ids) == len(samples) == len(self._offsets) - 1 or len(self._units) != self._offsets[-1]:
            raise ValueError(
                f"units {folder}: found files of different lengths, wanted those of one run: cluster again"
            )
        if rate == FRAME_RATE:
            counts = np.diff(self._offsets)
            for name, length, count in zip(ids, samples.tolist(), counts.tolist(), strict=True):
                _check_length(f"units {folder}: {name}", length, count)
        self._rows = {name: row for row, name in enumerate(ids)}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, utterance: object) -> bool:
        return utterance in self._rows

    def __getitem__(self, utterance: str) -> NDArray[np.int16]:
        """The utterance's units, (T,)."""
        if utterance not in self._rows:
            raise ValueError(
                f"units: found no labels for {utterance!r}, wanted one per frame: cluster this corpus again"
            )
        row = self._rows[utterance]
        tokens: NDArray[np.int16] = self._units[self._offsets[row] : self._offsets[row + 1]]
        return tokens


def write_units(
    folder: Path,
    labels: Iterable[tuple[str, int, NDArray[np.integer[Any]]]],
    num_units: int,
    rate: float = FRAME_RATE,
    **about: Any,
) -> None:
    """Write (utterance id, samples of audio, units (T,)) as a store. `rate` is in labels per second.

    Raises ValueError where the rate is the encoder's and an utterance has not one label a frame, where a unit
    is not in [0, num_units), and where two utterances share an id.
    """
    if not 1 <= num_units <= MAX_UNITS:
        raise ValueError(f"units: found num_units {num_units}, wanted 1 to {MAX_UNITS}: choose fewer units")
    ids, samples, parts = [], [], []
    for name, num_samples, units in labels:
        if rate == FRAME_RATE:
            _check_length(f"units: {name}", num_samples, len(units))
        if len(units) and not 0 <= units.min() <= units.max() < num_units:
            raise ValueError(
                f"units: {name}: found labels from {units.min()} to {units.max()}, wanted 0 to "
                f"{num_units - 1}: give the num_units of the codebook that made them"
            )
        ids.append(name)
        samples.append(num_samples)
        parts.append(np.asarray(units, dtype=np.int16))
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(f"units: found {twice!r} twice, wanted every utterance once: prepare the corpus again")
    np.save(folder / "units.npy", np.concatenate(parts) if parts else np.zeros(0, np.int16))
    np.save(folder / "offsets.npy", np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64))
    np.save(folder / "samples.npy", np.asarray(samples, dtype=np.int64))
    (folder / "ids.json").write_text(json.dumps(ids) + "\n")
    store = {"num_units": num_units, "rate": rate, "sample_rate": SAMPLE_RATE, **about}
    (folder / "store.json").write_text(json.dumps(store, indent=1, sort_keys=True) + "\n")


def _check_length(name: str, num_samples: int, num_labels: int) -> None:
    if num_labels != (wanted := num_frames(num_samples)):
        seconds = num_samples / SAMPLE_RATE
        raise ValueError(
            f"{name}: found {num_labels} labels for {seconds:g} s of audio, "
            f"wanted {wanted}, one a frame at {FRAME_RATE:g} Hz: cluster this corpus again"
        )
