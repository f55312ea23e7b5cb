"""Fixtures every folder of tests may use."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from types import FrameType

import pytest

# Tests' models are tiny: threads only get in each other's way. torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Pipelines are compiled for an image by digest; components read this when they are imported.
os.environ.setdefault("SONORANT_IMAGE", f"registry.example/sonorant-train@sha256:{'0' * 64}")


def name_outer_frames(frame: FrameType | None) -> None:
    """kfp asks `inspect` for the whole stack at every task, and that searches all modules for code that is of none, as
    pytest-xdist's: a second where torch is loaded. It need not search where it is told."""
    while frame:
        name = str(frame.f_globals.get("__name__"))
        inspect.modulesbyfile.setdefault(frame.f_code.co_filename, name)  # type: ignore[attr-defined]
        frame = frame.f_back


name_outer_frames(sys._getframe())


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Tests are not called by bytes: audio files hold the second they were made at, and every process of pytest-xdist
    must find the same tests."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The sample speech beside the checkout or in $SONORANT_SHARED_DATA; skips where it is missing."""
    beside = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("SONORANT_SHARED_DATA", beside)).resolve()
    if not folder.is_dir():
        pytest.skip(f"sample data: found no folder {folder}: put it there or set SONORANT_SHARED_DATA")
    return folder
