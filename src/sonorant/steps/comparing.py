"""Published models side by side, from what `evaluate` wrote of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sonorant.artifacts import read_record
from sonorant.evaluation.estimates import read_estimates
from sonorant.evaluation.measures import System
from sonorant.evaluation.report import render_comparison
from sonorant.steps.summary import show_tables


def compare_reports(reports: Sequence[Path], page: Path) -> None:
    """Print the table of models that were measured on the same utterances and write the page.

    Raises ValueError where there are fewer than two, or a score of one is of other utterances than the first one's.
    """
    if len(set(reports)) < 2:
        raise ValueError(f"compare: found {len(set(reports))} report, wanted two at least: name more of them")
    systems = [read_system(folder) for folder in reports]
    first = systems[0]
    for system in systems[1:]:
        for name in sorted(first.estimates.keys() & system.estimates.keys()):
            if apart := first.estimates[name].influence.keys() ^ system.estimates[name].influence.keys():
                raise ValueError(
                    f"compare: found {name} of {system.key} on other utterances than that of {first.key} ({len(apart)} "
                    "are of one only), wanted the same: evaluate both on the same split of the same corpus"
                )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render_comparison(systems))
    show_tables(f"{len(systems)} models", systems)
    print(f"page: {page}")


def read_system(folder: Path) -> System:
    """The model of a report, under the report's path."""
    record = read_record(folder, "report")
    path = folder / "metrics.json"
    try:
        scores = {str(name): float(value) for name, value in json.loads(path.read_text())["model"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        raise ValueError(
            f"{path}: found no scores of a model ({type(error).__name__}), wanted those of `sonorant evaluate`: name "
            "what it wrote"
        ) from None
    config = record["config"]
    detail = f"split {config.get('split')}" + (f" of {config['source']}" if config.get("source") else "")
    return System(str(folder), str(folder), detail, scores, read_estimates(folder, "model", scores))
