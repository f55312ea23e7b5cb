"""The store's settings as the environment gives them, and the order in which moves are taken back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonorant.artifacts import exchange, put_in_place
from sonorant.store.connection import open_client, parse_url, read_settings
from sonorant.store.journal import stack_of

ENVIRONMENT = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9000/",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "verysecret",
    "AWS_SESSION_TOKEN": "alsosecret",
    "SONORANT_STORE": "s3://bucket/some//where/",
}


def test_settings_are_the_standard_variables() -> None:
    settings = read_settings(None, ENVIRONMENT)
    assert (settings.endpoint, settings.region) == ("http://127.0.0.1:9000", "us-east-1")
    assert (settings.bucket, settings.prefix) == ("bucket", "some/where/")
    assert settings.url == "s3://bucket/some/where"
    assert "secret" not in repr(settings)
    aws = {**ENVIRONMENT, "AWS_REGION": "eu-west-1"}
    del aws["AWS_ENDPOINT_URL"]
    settings = read_settings("s3://other", aws)
    assert (settings.endpoint, settings.url) == ("https://s3.eu-west-1.amazonaws.com", "s3://other")
    assert open_client(settings)._base_url.is_https


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SONORANT_STORE": ""}, r"store: found none, wanted s3://BUCKET\[/PREFIX\]: give --store or set \$SONORANT_"),
        ({"SONORANT_STORE": "bucket"}, "store: found 'bucket', wanted s3://"),
        ({"SONORANT_STORE": "s3://Bucket/x"}, "the bucket's name in lower case"),
        ({"SONORANT_STORE": "s3://bucket/../x"}, r"without \. and \.\. in it"),
        ({"AWS_ACCESS_KEY_ID": ""}, r"\$AWS_ACCESS_KEY_ID: found none, wanted the store's key"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, r"\$AWS_SECRET_ACCESS_KEY: found none"),
        (
            {"AWS_ENDPOINT_URL": "127.0.0.1:9000"},
            r"\$AWS_ENDPOINT_URL: found '127.0.0.1:9000', wanted http\[s\]://HOST",
        ),
        ({"AWS_ENDPOINT_URL": "http://host:port"}, r"\$AWS_ENDPOINT_URL: found 'http://host:port'"),
        ({"AWS_ENDPOINT_URL": "http://host/path"}, r"\$AWS_ENDPOINT_URL: found 'http://host/path'"),
        ({"AWS_CA_BUNDLE": "/nowhere"}, r"\$AWS_CA_BUNDLE /nowhere: found No such file or directory, wanted a file of"),
        ({"AWS_CA_BUNDLE": __file__}, r"\$AWS_CA_BUNDLE .*_settings.py: found no certificate, wanted a file of PEM"),
        ({"SONORANT_STORE_RETRIES": "-1"}, r"\$SONORANT_STORE_RETRIES: found '-1', wanted 0 to 100"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_settings(None, {**ENVIRONMENT, **changes})
    assert "secret" not in str(caught.value).replace("SECRET", "")


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "s3://bucket//"])
def test_a_store_at_the_top_of_its_bucket(url: str) -> None:
    assert parse_url(url) == ("bucket", "")


@given(st.lists(st.one_of(st.none(), st.sampled_from("abc")), max_size=12))
def test_a_rollback_takes_back_one_move(deeds: list[str | None]) -> None:
    """Moves to a letter, or a rollback: what is in service is what a stack says, and the journal says the same."""
    wanted: list[str] = []
    journal: list[tuple[str, str]] = []
    for letter in deeds:
        if letter is None:
            if len(wanted) < 2:
                continue
            assert stack_of(journal)[-2] == wanted[-2]
            wanted.pop()
            journal.append(("rolled-back", wanted[-1]))
        elif wanted[-1:] != [letter]:
            wanted.append(letter)
            journal.append(("moved", letter))
        assert stack_of(journal) == wanted


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_its_place_whole(exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At one instant where the system can, in two moves elsewhere."""
    if not exchanges:
        monkeypatch.setattr("sonorant.artifacts.exchange", lambda *_: False)
    staged, final = tmp_path / "staged", tmp_path / "final"
    for folder, text in ((staged, "new"), (final, "old")):
        folder.mkdir()
        (folder / "text").write_text(text)
    put_in_place(staged, final)
    assert (final / "text").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert not exchange(tmp_path / "missing", final)
    assert (final / "text").read_text() == "new"


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_folders_exchange_their_names(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(name)
    assert exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "text").read_text() == "other"
    assert (tmp_path / "other" / "text").read_text() == "one"
