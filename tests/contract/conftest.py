"""Fixtures of the contract tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.kfp_server import Kubeflow


@pytest.fixture
def kubeflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubeflow]:
    for variable in ("KF_PIPELINES_ENDPOINT", "KFP_TOKEN", "KF_PIPELINES_OVERRIDE_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    server = Kubeflow()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.silence.set()
    server.shutdown()
    server.server_close()
