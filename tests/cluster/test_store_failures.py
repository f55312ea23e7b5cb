"""What can go wrong between here and a store, provoked for real: refusals, outages, kills; nothing half-published."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from sonorant.artifacts import digest_folder, read_record
from sonorant.store import Store
from sonorant.store.connection import RETRIES_VARIABLE, open_client, read_settings
from tests.cluster.artifact import PART_BYTES, requests_of, use_small_parts, write_artifact
from tests.cluster.rgw import Rgw, answers, free_ports

BIG = 4 * PART_BYTES + 1000
Change = Callable[[pytest.MonkeyPatch, Rgw], object]


@pytest.fixture
def gateway(rgw: Rgw) -> Iterator[Rgw]:
    """The gateway, which a test may stop: it runs again afterwards."""
    yield rgw
    if not answers(rgw.endpoint):
        rgw.start()


def setting(name: str, value: str) -> Change:
    return lambda patch, _: patch.setenv(name, value)


def slow_clock(patch: pytest.MonkeyPatch, _: Rgw) -> None:
    """The signer's clock is an hour late."""
    patch.setattr("minio.time.utcnow", lambda: datetime.now(UTC) - timedelta(hours=1))


def trust_nobody(patch: pytest.MonkeyPatch, rgw: Rgw) -> None:
    patch.setenv("AWS_ENDPOINT_URL", rgw.tls_endpoint)


def tls_without_tls(patch: pytest.MonkeyPatch, rgw: Rgw) -> None:
    patch.setenv("AWS_ENDPOINT_URL", rgw.endpoint.replace("http://", "https://"))


def plain_to_tls(patch: pytest.MonkeyPatch, rgw: Rgw) -> None:
    patch.setenv("AWS_ENDPOINT_URL", rgw.tls_endpoint.replace("https://", "http://"))


def nobody_there(patch: pytest.MonkeyPatch, _: Rgw) -> None:
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")


REFUSALS: dict[str, tuple[Change, str]] = {
    "secret": (
        setting("AWS_SECRET_ACCESS_KEY", "wrong"),
        r"found SignatureDoesNotMatch, wanted the secret that belongs to the key: correct \$AWS_SECRET_ACCESS_KEY",
    ),
    "key": (
        setting("AWS_ACCESS_KEY_ID", "stranger"),
        r"found InvalidAccessKeyId.* not stranger: correct \$AWS_ACCESS_KEY_ID",
    ),
    "bucket": (
        setting("SONORANT_STORE", "s3://nowhere"),
        r"found NoSuchBucket.*, wanted the bucket nowhere: create it or correct \$SONORANT_STORE",
    ),
    "clock": (
        slow_clock,
        r"found RequestTimeTooSkewed.*, wanted a clock within 15 minutes of the store's: set this machine's clock",
    ),
    "certificate": (
        trust_nobody,
        r"found a certificate that is not trusted \(.*self-signed.*\), wanted one: set \$AWS_CA_BUNDLE to its issuer's",
    ),
    "https": (tls_without_tls, r"found no TLS \(.*\), wanted https .* write http:// there if the store has none"),
    "http": (plain_to_tls, r"found Remote end closed .* check \$AWS_ENDPOINT_URL \(https:// where the store has TLS\)"),
    "host": (
        setting("AWS_ENDPOINT_URL", "http://nowhere.invalid:9000"),
        r"at http://nowhere.invalid:9000: found no host of this name, wanted a store that answers: check",
    ),
    "port": (nobody_there, r"found Connection refused, wanted a store that answers: check \$AWS_ENDPOINT_URL and the"),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.usefixtures("bucket")
def test_a_refusal_says_on_one_line_what_to_do(
    name: str, rgw: Rgw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = REFUSALS[name]
    monkeypatch.setenv(RETRIES_VARIABLE, "0")
    change(monkeypatch, rgw)
    store, artifact = Store.from_environment(), write_artifact(tmp_path / "1")
    deeds: list[Callable[[], object]] = [
        store.check,
        lambda: store.resolve("model@production"),
        lambda: store.push(artifact),
        lambda: store.fetch("model@production", tmp_path / "model"),
    ]
    for deed in deeds:
        with pytest.raises(ValueError, match=message) as caught:
            deed()
        assert "\n" not in str(caught.value)
        assert rgw.secret_key not in str(caught.value)


def test_tls_with_the_issuers_certificate(bucket: str, rgw: Rgw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", rgw.tls_endpoint)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(rgw.ca_bundle))
    store = Store.from_environment(f"s3://{bucket}")
    store.check()
    assert [found.name for found in store._objects.names("")] == ["check"]


def test_another_region_is_none_of_cephs_business(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other stores refuse it; test_what_only_other_stores_say has their words."""
    monkeypatch.setenv("AWS_REGION", "eu-west-9")
    Store.from_environment(f"s3://{bucket}").check()


@pytest.fixture(scope="module")
def limited(rgw: Rgw) -> dict[str, str]:
    """The key of a user of whom tests take rights away."""
    keys = {"access_key": "limited", "secret_key": "limited-secret"}
    rgw.create_user("limited", **keys)
    return keys


def test_a_key_without_the_right_to_write(
    bucket: str, rgw: Rgw, limited: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.from_environment()
    model = store.push(write_artifact(tmp_path / "1"), alias="production")
    policy = f"""{{"Version": "2012-10-17", "Statement": [{{"Effect": "Allow", "Principal": {{"AWS":
        ["arn:aws:iam:::user/limited"]}}, "Action": ["s3:GetObject", "s3:ListBucket"],
        "Resource": ["arn:aws:s3:::{bucket}", "arn:aws:s3:::{bucket}/*"]}}]}}"""
    open_client(read_settings()).set_bucket_policy(bucket, policy)
    for name, value in rgw.variables(bucket, **limited).items():
        monkeypatch.setenv(name, value)
    reader = Store.from_environment()
    assert reader.fetch("model@production", tmp_path / "model") == model
    reader.check(writes=False)
    advice = "found AccessDenied, wanted rights to do this with the key limited: have its policy changed"
    with pytest.raises(ValueError, match=f"^check writing: .*{advice}"):
        reader.check()
    with pytest.raises(ValueError, match=f"^push model: .*{advice}"):
        reader.push(write_artifact(tmp_path / "2", 2), alias="production")
    with pytest.raises(ValueError, match=f"^move model@canary: .*{advice}"):
        reader.move(model, "canary")
    assert store.resolve("model@production") == model
    assert len(store.artifacts()) == 1


@pytest.mark.parametrize("size", [200_000, BIG])
def test_a_full_store(
    size: int, rgw: Rgw, limited: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_parts(monkeypatch)
    for name, value in rgw.variables(f"full-{size}", **limited).items():
        monkeypatch.setenv(name, value)
    store = Store.from_environment()
    open_client(read_settings()).make_bucket(f"full-{size}")
    quota = ("--quota-scope=user", "--uid=limited")
    rgw.admin("quota", "set", *quota, "--max-size=100K")
    rgw.admin("quota", "enable", *quota)
    with pytest.raises(
        ValueError, match=r"^push model: s3://full.*found QuotaExceeded.*, wanted space: remove.* then run"
    ):
        store.push(write_artifact(tmp_path / "1", size=size), alias="production")
    assert store.artifacts() == []
    rgw.admin("quota", "disable", *quota)
    assert store.push(tmp_path / "1", alias="production") == store.resolve("model@production")


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("ExpiredToken", 400, r"wanted credentials that are still valid: get new ones, \$AWS_SESSION_TOKEN too"),
        ("AuthorizationHeaderMalformed", 400, r"wanted the bucket's region, not us-east-1: correct \$AWS_REGION"),
        ("PermanentRedirect", 301, r"wanted the bucket's region, not us-east-1: correct \$AWS_REGION"),
        ("XMinioStorageFull", 507, "wanted space: remove something"),
        ("SlowDown", 503, "wanted a store that answers: run the same command again when it does"),
        ("Strange", 418, "found Strange .* wanted it done: see the store's log"),
        (None, 502, "found HTTP 502, wanted an S3 store's answer: run the same command again when it is back"),
        (None, 404, r"found HTTP 404, wanted an S3 store's answer: correct \$AWS_ENDPOINT_URL"),
    ],
)
def test_what_only_other_stores_say(
    code: str | None, status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that neither Ceph nor rclone can be made to give, as AWS, MinIO and proxies word them."""

    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fault = f"<Error><Code>{code}</Code><Message>no</Message><Resource>/b</Resource></Error>"
            body = fault.encode() if code else b"<html>no</html>"
            self.send_response(status)
            self.send_header("Content-Type", "application/xml" if code else "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Refusal) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv(RETRIES_VARIABLE, "0")
        try:
            with pytest.raises(ValueError, match=message):
                Store.from_environment("s3://bucket").check()
        finally:
            server.shutdown()
            thread.join()


# ------------------------------------------------------------------------------------------------------- outages


def parts_of(asked: list[tuple[str, str, int]]) -> list[str]:
    """The parts among what was asked: their numbers and the upload's id."""
    return [path.split("?")[1] for method, path, _ in asked if method == "PUT" and "partNumber" in path]


@pytest.mark.usefixtures("bucket")
def test_the_store_is_killed_in_the_middle_of_an_upload(
    gateway: Rgw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_parts(monkeypatch)
    old, new = write_artifact(tmp_path / "1", 1), write_artifact(tmp_path / "2", 2, BIG)
    Store.from_environment().push(old, alias="production")
    monkeypatch.setenv(RETRIES_VARIABLE, "1")
    store = Store.from_environment()

    def kill(done: int, _: int) -> None:
        if done > 2 * PART_BYTES and answers(gateway.endpoint):
            # While the third part is on its way, or just before or after it.
            threading.Thread(target=gateway.stop).start()

    with (
        requests_of(store) as asked,
        pytest.raises(ValueError, match=r"^push model: .*then run the same command again"),
    ):
        store.push(new, "production", kill)
    first = parts_of(asked)
    assert len(first) >= 2
    gateway.start()
    again = Store.from_environment()
    assert again.resolve("model@production") == read_record(old, "model")["digest"]
    assert len(again.artifacts()) == 1
    with requests_of(again) as asked:
        assert again.push(new, "production") == again.resolve("model@production")
    second = parts_of(asked)
    # The same upload, and of its five parts none that had come over.
    assert {path.split("uploadId=")[1] for path in first} == {path.split("uploadId=")[1] for path in second}
    assert len(second) <= 3
    assert not {path for path in second if "partNumber=1&" in path or "partNumber=2&" in path}
    again.fetch("model@production", tmp_path / "model")
    assert digest_folder(tmp_path / "model") == read_record(new, "model")["digest"]


@pytest.mark.usefixtures("bucket")
def test_the_store_is_killed_in_the_middle_of_a_download(
    gateway: Rgw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = write_artifact(tmp_path / "1", 1), write_artifact(tmp_path / "2", 2, BIG)
    store = Store.from_environment()
    store.push(old, alias="production")
    store.fetch("model@production", tmp_path / "model")
    digest = store.push(new, alias="production")
    monkeypatch.setenv(RETRIES_VARIABLE, "1")
    reached = 0

    def kill(done: int, _: int) -> None:
        nonlocal reached
        reached = max(reached, done)
        if done > PART_BYTES and answers(gateway.endpoint):
            gateway.stop()

    with pytest.raises(ValueError, match=r"^fetch model@production: .*then run the same command again"):
        Store.from_environment().fetch("model@production", tmp_path / "model", kill)
    assert digest_folder(tmp_path / "model") == read_record(old, "model")["digest"]
    gateway.start()
    heard: list[int] = []
    again = Store.from_environment()
    with requests_of(again) as asked:
        assert again.fetch("model@production", tmp_path / "model", lambda done, _: heard.append(done)) == digest
    assert digest_folder(tmp_path / "model") == digest
    # What was there counts at once, and only the rest of the one file was asked for.
    assert len([path for method, path, _ in asked if method == "GET" and "/files/" in path]) == 1
    assert any(abs(done - reached) < 2000 for done in heard[:6])
    assert not list(tmp_path.glob(".model*"))


@pytest.mark.parametrize("direction", ["push", "fetch"])
@pytest.mark.usefixtures("bucket")
def test_a_short_outage_is_ridden_out(
    direction: str,
    gateway: Rgw,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_small_parts(monkeypatch)
    store, artifact = Store.from_environment(), write_artifact(tmp_path / "1", 1, BIG)
    if direction == "fetch":
        store.push(artifact, alias="production")
    gone = threading.Event()

    def kill(done: int, _: int) -> None:
        if done > PART_BYTES and not gone.is_set():
            gateway.stop()
            gone.set()

    def work() -> None:
        if direction == "push":
            store.push(artifact, "production", kill)
        else:
            store.fetch("model@production", tmp_path / "model", kill)

    worker = threading.Thread(target=work)
    worker.start()
    assert gone.wait(60)
    time.sleep(1)
    gateway.start()
    worker.join(60)
    if direction == "fetch":
        assert digest_folder(tmp_path / "model") == read_record(artifact, "model")["digest"]
    assert store.resolve("model@production") == read_record(artifact, "model")["digest"]
    assert "trying again (1 of 7)" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- our own ends

KILLED = """
import os, signal, sys
from pathlib import Path
from sonorant.store import Store, objects
objects.PART_BYTES = {part}

def end(done, total):
    if done > 2 * {part}:
        os.kill(os.getpid(), signal.SIGKILL)

store = Store.from_environment()
store.{call}
"""


def be_killed(call: str) -> None:
    source = KILLED.format(part=PART_BYTES, call=call)
    answer = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert answer.returncode == -signal.SIGKILL, answer.stderr


@pytest.mark.usefixtures("bucket")
def test_a_killed_push_and_a_killed_fetch_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_parts(monkeypatch)
    store, artifact = Store.from_environment(), write_artifact(tmp_path / "1", 1, BIG)
    digest = read_record(artifact, "model")["digest"]
    be_killed(f"push(Path({str(artifact)!r}), 'production', end)")
    assert store.find("model@production") is None
    assert store.artifacts() == []
    # A listing of parts has pages: here of one part, where a store's have a thousand.
    client = store._objects.client
    monkeypatch.setattr(client, "_list_parts", partial(client._list_parts, max_parts=1))
    with requests_of(store) as asked:
        store.push(artifact, "production")
    assert len(parts_of(asked)) == 3
    be_killed(f"fetch('model@production', {str(tmp_path / 'model')!r}, end)")
    assert not (tmp_path / "model").exists()
    heard: list[int] = []
    assert store.fetch("model@production", tmp_path / "model", lambda done, _: heard.append(done)) == digest
    assert any(done > 2 * PART_BYTES for done in heard[:6])
    # A beginning that is another file's does no harm.
    staged = tmp_path / f".other.{digest[:16]}.partial"
    staged.mkdir()
    (staged / "weights.bin").write_bytes(b"something else")
    (staged / "stray.bin").write_bytes(b"stray")
    assert store.fetch("model@production", tmp_path / "other") == digest
    assert digest_folder(tmp_path / "other") == digest


def test_a_file_that_changes_while_it_is_sent_is_not_published(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_parts(monkeypatch)
    store, artifact = Store.from_environment(), write_artifact(tmp_path / "1", 1, BIG)

    def change(done: int, _: int) -> None:
        if done > PART_BYTES:
            with (artifact / "weights.bin").open("r+b") as file:
                file.seek(BIG - 4)
                file.write(b"anew")

    with pytest.raises(ValueError, match=r"weights.bin: found it changed while it was sent"):
        store.push(artifact, "production", change)
    assert store.artifacts() == []
    client = open_client(read_settings())
    assert client._list_multipart_uploads(bucket).uploads == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_an_interruption_is_one_line(number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a store that says nothing is waited for."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        words = [sys.executable, "-m", "sonorant", "store", "fetch", "model@production", str(tmp_path / "model")]
        process = subprocess.Popen([*words, "--store", "s3://bucket"], stderr=subprocess.PIPE, text=True)
        connection, _ = silent.accept()
        connection.recv(1000)
        time.sleep(0.1)
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
        connection.close()
    assert process.returncode == status
    assert told == (
        "store fetch: interrupted; what has come over is not sent again; run the same command again to go on\n"
    )
