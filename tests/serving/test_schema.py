"""The server held to its OpenAPI document by schemathesis: whatever the document allows or forbids, and no 5xx."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
import schemathesis
import soundfile
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from serving.app import create_app
from serving.settings import Settings
from tests.serving.conftest import FakeSpeech, serving
from tests.serving.test_openapi import PINNED


def audio(seconds: float, form: str) -> bytes:
    file = io.BytesIO()
    wave = np.random.default_rng(0).normal(0, 0.1, int(16_000 * seconds)).astype(np.float32)
    soundfile.write(file, wave, 16_000, format=form)
    return file.getvalue()


for media in ("audio/*", "application/octet-stream"):
    schemathesis.openapi.media_type(
        media, st.sampled_from([audio(0.1, "WAV"), audio(1, "FLAC"), audio(0.5, "OGG"), b"", b"RIFF"])
    )


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = create_app(Settings(max_file_seconds=5), {"tiny": FakeSpeech()})
    with serving(app) as address:
        yield f"http://{address}"


document = schemathesis.openapi.from_path(PINNED)
UNTOLD = [schemathesis.checks.positive_data_acceptance]
"""What is audio, and which layers a model has, no schema tells: what is allowed may be refused by 400 or 422."""


@document.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_server_keeps_to_its_document(case, url):
    case.call_and_validate(base_url=url, excluded_checks=UNTOLD, timeout=30)


@pytest.mark.slow
@document.parametrize()
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_server_keeps_to_its_document_for_long(case, url):
    case.call_and_validate(base_url=url, excluded_checks=UNTOLD, timeout=30)
