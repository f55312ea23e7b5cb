"""`sonorant compare`: published models side by side, from what `evaluate` wrote of each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Reports = Annotated[list[Path], typer.Argument(help="what `sonorant evaluate` wrote of each model", show_default=False)]
Page = Annotated[Path, typer.Option("--page", help="the HTML page to write")]


def compare(reports: Reports, page: Page = Path("comparison.html")) -> None:
    """Compare models that were evaluated on the same utterances: one table, one page, paired differences.

    A best one is marked only where the interval of its difference to every other holds no zero.
    """
    from sonorant.steps.comparing import compare_reports

    compare_reports(reports, page)
