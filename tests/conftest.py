"""Fixtures every folder of tests may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests' models are tiny: threads only get in each other's way. torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Pipelines are compiled for an image by digest; components read this when they are imported.
os.environ.setdefault("SONORANT_IMAGE", f"registry.example/sonorant-train@sha256:{'0' * 64}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The sample speech beside the checkout or in $SONORANT_SHARED_DATA; skips where it is missing."""
    beside = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("SONORANT_SHARED_DATA", beside)).resolve()
    if not folder.is_dir():
        pytest.skip(f"sample data: found no folder {folder}: put it there or set SONORANT_SHARED_DATA")
    return folder
