"""A real S3 server for tests: Ceph's gateway on loopback, in memory, with one monitor, one OSD and cephx on."""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "ceph-authtool", "monmaptool", "openssl")
PACKAGES = "radosgw ceph-osd ceph-mon ceph-common openssl"
CONFIGURATION = """
[global]
fsid = {fsid}
mon host = {monitor}
public addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
log file = {folder}/$name.log
admin socket = {folder}/$name.asok
run dir = {folder}
keyring = {folder}/keyring
[mon.a]
mon data = {folder}/mon
[osd]
osd objectstore = memstore
memstore device bytes = 1073741824
osd data = {folder}/osd
osd class load list = *
osd class default list = *
# The dead gateway is not waited for.
osd client watch timeout = 2
[client.rgw]
# Without tcp_nodelay every small answer waits 40 ms for an acknowledgement.
rgw frontends = beast {frontends} ssl_certificate={folder}/tls.pem tcp_nodelay=1
# A cache would have a gateway that came back wait half a minute for the one that went to hear of each new bucket.
rgw cache enabled = false
rgw data = {folder}/rgw
rgw enable usage log = false
rgw thread pool size = 32
rgw user quota bucket sync interval = 1
rgw bucket quota ttl = 0
"""


def missing_programs() -> list[str]:
    """What of the gateway is not installed here."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


class Rgw:
    """A running gateway: `endpoint` and `tls_endpoint` (issuer's certificate: `ca_bundle`), `access_key`, `secret_key`.

    `stop()` takes the gateway away, `start()` brings it back with its data, `close()` ends everything.
    """

    def __init__(self) -> None:
        # Sockets lie in it, and their paths may have no more than 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="rgw-"))
        port, tls_port, *monitor = free_ports(4)
        self.endpoint, self.tls_endpoint = f"http://127.0.0.1:{port}", f"https://127.0.0.1:{tls_port}"
        self.ca_bundle = self.folder / "ca.pem"
        self.access_key, self.secret_key = secrets.token_hex(8), secrets.token_hex(16)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._make_certificate()
            self._start_cluster(f"[v2:127.0.0.1:{monitor[0]},v1:127.0.0.1:{monitor[1]}]", port, tls_port)
            self.start()
            self.create_user("tests", self.access_key, self.secret_key)
        except BaseException:
            self.close()
            raise

    def stop(self) -> None:
        """Take the gateway away at once, whatever it is doing; its data stay."""
        self._processes["rgw"].kill()
        self._end("rgw")

    def start(self) -> None:
        """Bring the gateway to its place, with the data it had; it ends with the thread that does this."""
        process = self._begin("rgw", "radosgw", "-n", "client.rgw", "-f")
        self._wait("the gateway", lambda: answers(self.endpoint), process, 90)

    def close(self) -> None:
        """End what was started, and remove its folder."""
        for name in ("rgw", "osd", "mon"):
            self._end(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def admin(self, *words: str) -> str:
        """What `radosgw-admin` answers."""
        return self._call("radosgw-admin", *words)

    def create_user(self, name: str, access_key: str, secret_key: str) -> None:
        """A user with buckets and a key of their own."""
        keys = (f"--access-key={access_key}", f"--secret={secret_key}")
        self.admin("user", "create", f"--uid={name}", f"--display-name={name}", *keys)

    def variables(self, bucket: str, access_key: str | None = None, secret_key: str | None = None) -> dict[str, str]:
        """The environment by which a program finds a bucket here."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": access_key or self.access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key or self.secret_key,
            "SONORANT_STORE": f"s3://{bucket}",
        }

    def _make_certificate(self) -> None:
        key, certificate = self.folder / "key.pem", self.ca_bundle
        kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
        names = ("-subj", "/CN=rgw", "-addext", "subjectAltName=IP:127.0.0.1")
        run_quietly("openssl", "req", "-x509", *kind, *names, "-keyout", str(key), "-out", str(certificate))
        (self.folder / "tls.pem").write_text(key.read_text() + certificate.read_text())

    def _start_cluster(self, monitor: str, port: int, tls_port: int) -> None:
        folder, fsid = self.folder, str(uuid.uuid4())
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()
        frontends = f"endpoint=127.0.0.1:{port} ssl_endpoint=127.0.0.1:{tls_port}"
        given = {"fsid": fsid, "monitor": monitor, "folder": folder, "frontends": frontends}
        (folder / "ceph.conf").write_text(CONFIGURATION.format(**given))
        keyring, monmap = str(folder / "keyring"), str(folder / "monmap")
        rights = {
            "mon.": ("mon", "allow *"),
            "client.admin": ("mon", "allow *", "osd", "allow *", "mgr", "allow *"),
            "client.rgw": ("mon", "allow rwx", "osd", "allow rwx"),
            "osd.0": ("mon", "allow profile osd", "osd", "allow *", "mgr", "allow profile osd"),
        }
        for number, (name, words) in enumerate(rights.items()):
            caps = [word for pair in zip(words[::2], words[1::2], strict=True) for word in ("--cap", *pair)]
            create = () if number else ("--create-keyring",)
            run_quietly("ceph-authtool", keyring, *create, "--gen-key", "-n", name, *caps)
        run_quietly("monmaptool", "--create", "--fsid", fsid, "--addv", "a", monitor, monmap)
        self._call("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._begin("mon", "ceph-mon", "-i", "a", "-f")
        self._call("ceph", "osd", "create")
        self._call("ceph-osd", "-i", "0", "--mkfs", "--osd-data", str(folder / "osd"))
        osd = self._begin("osd", "ceph-osd", "-i", "0", "-f")
        self._wait("the OSD", lambda: '"num_up_osds":1' in self._call("ceph", "osd", "stat", "-f", "json"), osd, 60)

    def _call(self, program: str, *words: str) -> str:
        return run_quietly(program, "-c", str(self.folder / "ceph.conf"), *words)

    def _begin(self, name: str, program: str, *words: str) -> subprocess.Popen[bytes]:
        # It ends with the tests, however these end: to be exact, with the thread that begins it.
        tied = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()
        with (self.folder / f"{name}.out").open("wb") as log:
            command = [*tied, program, "-c", str(self.folder / "ceph.conf"), *words]
            self._processes[name] = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        return self._processes[name]

    def _end(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is None:
            return
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait(self, what: str, ready: Callable[[], object], process: subprocess.Popen[bytes], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.out"))
                raise RuntimeError(f"{what} did not come up in {seconds:g} s:\n{logs}")
            time.sleep(0.1)


def answers(endpoint: str) -> bool:
    """Whether a server takes requests there, whatever it says to them."""
    try:
        urllib.request.urlopen(endpoint, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def run_quietly(*command: str) -> str:
    """A program's output; RuntimeError with what it complained of where it failed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stdout
