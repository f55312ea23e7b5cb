"""`sonorant study`: what papers claim, tested again on any corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Names = Annotated[list[str], typer.Argument(help="studies of recipes/studies, or files", show_default=False)]
Configs = Annotated[list[Path], typer.Option("--config", help="the sections that all arms have in common; repeatable")]
Overrides = Annotated[list[str], typer.Option("--set", help="section.key=value, overrides the files")]
Folder = Annotated[Path, typer.Option("--folder", help="where runs and the page are kept")]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="steps at once, each on one core")]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="instead of the study's own; repeat for each")]

NONE: list[str] = []


def study(
    names: Names,
    config: Configs,
    overrides: Overrides = NONE,
    folder: Folder = Path("build/study"),
    jobs: Jobs = 1,
    seed: Seeds = None,
) -> None:
    """Run every arm and seed of studies, and say of each claim whether it holds: supports, contradicts, cannot tell.

    What is done is not done again, so the same command goes on where it was stopped. The page has every study whose
    findings lie in the folder.
    """
    from sonorant.studies.running import run_studies

    run_studies(names, config, overrides, folder, jobs, seed)
