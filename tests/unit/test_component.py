"""A step inside a Kubeflow component."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from kfp import dsl

from sonorant.artifacts import digest_folder
from sonorant.config import Section
from sonorant.steps.component import run
from sonorant.steps.step import In, Metrics, Out, step


class TallyConfig(Section):
    start: int = 1


@step
def write(config: TallyConfig, *, count: Out) -> Metrics:
    """Write a number."""
    (count / "count.txt").write_text(str(config.start))
    return {"count": config.start, "share": float("nan")}


@step
def add(config: TallyConfig, *, count: In, total: Out, extra: In | None = None) -> Metrics:
    """Add numbers."""
    numbers = [int((folder / "count.txt").read_text()) for folder in (count, extra) if folder]
    (total / "total.txt").write_text(str(config.start + sum(numbers)))
    return {"total": config.start + sum(numbers)}


@step
def interrupt(_config: TallyConfig, *, total: Out) -> Metrics:
    """Stop as a step does that was told to."""
    raise SystemExit(len(str(total)) * 0)


def artifact(path: Path) -> dsl.Artifact:
    return dsl.Artifact(name=path.name, uri=str(path))


def metrics(path: Path) -> dsl.Metrics:
    return dsl.Metrics(name=path.name, uri=str(path))


def test_metrics_and_lineage_become_metadata(tmp_path: Path) -> None:
    count, total = artifact(tmp_path / "count"), artifact(tmp_path / "total")
    written, added = metrics(tmp_path / "written"), metrics(tmp_path / "added")
    run(write, {"start": 2.0}, written, count=count)
    run(add, {}, added, count=count, total=total, extra=None)
    # Not-a-number has no place in JSON, which is what Kubeflow reads.
    assert json.dumps(written.metadata, allow_nan=False) == '{"count": 2, "share": "nan"}'
    assert json.loads(Path(written.path).read_text()) == written.metadata
    assert added.metadata == {"total": 3}
    assert total.metadata == {
        "step": "add",
        "sonorant": total.metadata["sonorant"],
        "inputs": {"count": count.metadata["digest"]},
        "digest": digest_folder(tmp_path / "total"),
    }


def test_an_optional_input_is_read_where_it_is_given(tmp_path: Path) -> None:
    count, extra, total = (artifact(tmp_path / name) for name in ("count", "extra", "total"))
    run(write, {"start": 2}, metrics(tmp_path / "m"), count=count)
    run(write, {"start": 5}, metrics(tmp_path / "m"), count=extra)
    added = metrics(tmp_path / "added")
    run(add, {}, added, count=count, total=total, extra=extra)
    assert added.metadata == {"total": 8}
    assert set(total.metadata["inputs"]) == {"count", "extra"}


def test_a_stopped_step_is_not_a_finished_one(tmp_path: Path) -> None:
    """It exits 0 at a command line, but a workflow must try it again."""
    with pytest.raises(SystemExit) as stop:
        run(interrupt, {}, metrics(tmp_path / "m"), total=artifact(tmp_path / "total"))
    assert stop.value.code == os.EX_TEMPFAIL
