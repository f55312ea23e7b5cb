"""Fixtures every folder of tests may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The sample speech beside the checkout or in $SONORANT_SHARED_DATA; skips where it is missing."""
    beside = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("SONORANT_SHARED_DATA", beside)).resolve()
    if not folder.is_dir():
        pytest.skip(f"sample data: found no folder {folder}: put it there or set SONORANT_SHARED_DATA")
    return folder
