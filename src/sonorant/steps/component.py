"""A step inside a Kubeflow component: typed artifacts in, metrics and digests into their metadata.

Components are copied into their pods as source, so what they share lives here, in the installed package.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sonorant.artifacts import read_record
from sonorant.steps.step import Step

PAGES = {"report": "report.html", "findings": "study.html"}
"""What Kubeflow shows of an artifact."""


class Artifact(Protocol):
    """What is needed of a kfp artifact."""

    metadata: dict[str, Any]

    @property
    def path(self) -> str:
        """Where its folder lies in the pod."""


def run(
    step: Step,
    config: Mapping[str, Any],
    metrics: Artifact,
    page: Artifact | None = None,
    **artifacts: Artifact | Sequence[Artifact] | None,
) -> None:
    """Run `step` on kfp artifacts; an optional input may be None, one that takes many is a list.

    Its metrics go into `metrics`; into each output's metadata goes which step made it, from what, its digest. `page`
    becomes a copy of the artifact's page, which Kubeflow shows.
    """
    try:
        paths: dict[str, Any] = {name: path_of(artifact) for name, artifact in artifacts.items()}
        values = step(config, **paths)
    except SystemExit as stop:
        # A step that was told to stop keeps a checkpoint and exits 0, which Kubeflow would take for finished;
        # any other status makes it retry.
        raise SystemExit(stop.code or os.EX_TEMPFAIL) from None
    # Kubeflow reads metadata as JSON, which has no NaN and no infinity.
    metrics.metadata.update({name: v if math.isfinite(v) else str(v) for name, v in values.items()})
    # Where metrics have no file, kfp.local takes a finished task for one whose results were lost.
    Path(metrics.path).write_text(json.dumps(metrics.metadata, indent=1) + "\n")
    for name in step.outputs:
        artifact = artifacts[name]
        assert artifact is not None
        assert not isinstance(artifact, Sequence)
        record = read_record(Path(artifact.path), name)
        if page and name in PAGES:
            shutil.copyfile(Path(artifact.path) / PAGES[name], page.path)
        artifact.metadata.update({key: record[key] for key in ("step", "sonorant", "inputs", "digest")})


def path_of(artifact: Artifact | Sequence[Artifact] | None) -> str | list[str] | None:
    """Where an artifact lies, or each of several."""
    if isinstance(artifact, Sequence):
        return [one.path for one in artifact]
    return artifact.path if artifact else None
