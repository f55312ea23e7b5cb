"""One self-contained page about a model: it loads nothing, and equal inputs give equal bytes."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

from sonorant.evaluation.measures import MEASURES, RETRIEVAL, System
from sonorant.evaluation.report.drawings import (
    DRAWING,
    confusion_map,
    heat_map,
    layer_panels,
    training_panels,
    utterance_strips,
)
from sonorant.evaluation.report.page import make_page
from sonorant.evaluation.report.parts import Example, Report, Search, Shown
from sonorant.evaluation.report.tables import (
    PURITIES,
    corpus_table,
    difference_table,
    headline_tiles,
    provenance_list,
    retrieval_table,
    score_tables,
)

__all__ = ["Example", "Report", "Search", "Shown", "render", "render_comparison"]


def render(report: Report) -> str:
    """The page as HTML."""
    with matplotlib.rc_context(DRAWING):
        sections = [
            ("Scores", headline_tiles(report.systems) + score_tables(MEASURES, report.systems) + PURITIES),
            ("Retrieval", retrieval_table(report)),
            ("What probes read of each layer", layer_panels(report.systems)),
            ("Training", training_panels(report.journal)),
            ("Units and phones", heat_map(report.joint) + confusion_map(report.joint)),
            ("Utterances", utterance_strips(report.examples)),
            ("Corpus", corpus_table(report)),
            ("Provenance", provenance_list(report.provenance)),
        ]
    return make_page(report.title, report.notes, sections)


def render_comparison(systems: Sequence[System]) -> str:
    """A page of models side by side, and of how each differs from the first one."""
    tables = score_tables({**MEASURES, **RETRIEVAL}, systems) + PURITIES
    sections = [("Scores", tables), (f"Differences from {systems[0].name}", difference_table(systems))]
    return make_page(f"{len(systems)} models compared", (), sections)
