"""An object store that runs for all tests of a session, and a bucket of its own for each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from uuid import uuid4

import pytest

from sonorant.store.connection import open_client, read_settings
from tests.cluster.rgw import PACKAGES, Rgw, missing_programs


@pytest.fixture(scope="session")
def rgw() -> Iterator[Rgw]:
    """Ceph's gateway; skips where it is not installed, unless $SONORANT_NEED_RGW says that it must be."""
    if missing := missing_programs():
        found = f"object store: found no {', '.join(missing)}"
        advice = f"apt-get install --no-install-recommends {PACKAGES}"
        if "SONORANT_NEED_RGW" in os.environ:
            pytest.fail(f"{found}, wanted them, as $SONORANT_NEED_RGW says: {advice}")
        pytest.skip(f"{found}: {advice}")
    server = Rgw()
    yield server
    server.close()


@pytest.fixture
def bucket(rgw: Rgw, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a new bucket; the environment says how it is reached, so $SONORANT_STORE is s3:// and this name."""
    name = f"b{uuid4().hex[:12]}"
    for variable, value in rgw.variables(name).items():
        monkeypatch.setenv(variable, value)
    for variable in ("AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(variable, raising=False)
    open_client(read_settings()).make_bucket(name)
    return name
