"""Estimates in a file beside a report, so that models measured apart can be compared utterance by utterance.

`estimates.npz` holds `utterances` (U,), by id, and the images that were asked for what is said of them, by name; for
each system and score a column (U,) of influences named system/score, nan where the score is not of the utterance or
image. The scores themselves are in metrics.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from sonorant.evaluation.intervals import Estimate
from sonorant.evaluation.measures import System

FILE = "estimates.npz"


def write_estimates(folder: Path, systems: Sequence[System]) -> None:
    """Write what is known by utterance of the systems' scores."""
    estimates = {(s.key, name): one for s in systems for name, one in s.estimates.items()}
    utterances = sorted({name for one in estimates.values() for name in one.influence})
    columns = {
        f"{system}/{score}": np.array([one.influence.get(name, np.nan) for name in utterances])
        for (system, score), one in estimates.items()
    }
    np.savez(folder / FILE, utterances=np.array(utterances, dtype=np.str_), **columns)  # type: ignore[arg-type]


def read_estimates(folder: Path, system: str, scores: Mapping[str, float]) -> dict[str, Estimate]:
    """What is known by utterance of some of a system's scores; ValueError where there is no such file."""
    path = folder / FILE
    try:
        with np.load(path, allow_pickle=False) as arrays:
            utterances = arrays["utterances"].tolist()
            columns = {name: arrays[f"{system}/{name}"] for name in scores if f"{system}/{name}" in arrays}
    except (FileNotFoundError, BadZipFile, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: found no estimates ({type(error).__name__}), wanted those that `sonorant evaluate` writes: "
            "evaluate the model again"
        ) from None
    return {
        name: Estimate(
            scores[name],
            {u: float(v) for u, v in zip(utterances, column, strict=True) if not np.isnan(v)},
        )
        for name, column in columns.items()
    }
