"""The images: `python docker/images.py build` makes them, `python docker/images.py test` makes and tries them.

The engine is docker (where one answers), podman or buildah; $ENGINE names another than the first found, $SOURCE the
repository for the label. Beside the images, in build/images: a CycloneDX list of what each holds (NAME.sbom.json) and
report.json. Where no python:3.11-slim can be pulled, `test` makes one of Debian's packages (debootstrap, as root) and
keeps it in the engine's storage.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "images"
BASE = "docker.io/library/python:3.11-slim"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SBOM_TOOL = "cyclonedx-bom==7.5.0"
CODENAME = "bookworm"
"""The Debian whose python3 is 3.11."""
LACKING = {"serve": "torch 2.11.0 requires triton, which is not installed.", "train": "No broken requirements found."}
"""What `pip check` says: the server compiles no kernels, and triton is a sixth of its size."""
RUNTIME = """#!/bin/sh
# runc, without the limits that a root lacking CAP_SYS_RESOURCE may not set.
bundle=
for word; do case "$previous" in --bundle|-b) bundle=$word;; esac; previous=$word; done
if [ -n "$bundle" ]; then
  jq 'del(.process.rlimits)' "$bundle/config.json" > "$bundle/new" && mv "$bundle/new" "$bundle/config.json"
fi
exec runc "$@"
"""


def call(*words: str, seconds: float = 60) -> str:
    """What a command writes to stdout; its failure ends everything with its last words."""
    answer = subprocess.run(words, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    if answer.returncode:
        sys.exit(f"{' '.join(words[:3])}: found exit {answer.returncode}, wanted 0: {answer.stderr.strip()[-2000:]}")
    return answer.stdout


def works(*words: str, seconds: float = 60) -> bool:
    """Whether a command is there and ends well."""
    if shutil.which(words[0]) is None:
        return False
    try:
        return subprocess.run(words, capture_output=True, timeout=seconds, cwd=ROOT).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def find_engine() -> str:
    """The first of docker, podman and buildah that answers; a docker client without an engine does not."""
    names = [os.environ["ENGINE"]] if os.environ.get("ENGINE") else ["docker", "podman", "buildah"]
    for name in names:
        if works(name, "info"):
            return name
    sys.exit(
        f"engine: found none of {', '.join(names)} that answers `info`, wanted one: install one or start its service"
    )


def tag(name: str) -> str:
    """What an image is called on this machine."""
    return f"sonorant-{name}:{VERSION}"


def has(engine: str, image: str) -> bool:
    """Whether the engine's storage holds an image."""
    return (
        bool(call(engine, "images", "--quiet", image).strip())
        if engine != "buildah"
        else works("buildah", "inspect", "--type", "image", image)
    )


def mounts(pairs: dict[Path | str, str]) -> list[str]:
    """The options that show folders of this machine inside."""
    return [word for here, there in pairs.items() for word in ("--volume", f"{here}:{there}")]


def build(engine: str, name: str) -> None:
    """One image of its Dockerfile; the log goes to build/images/NAME.log."""
    revision = call("git", "rev-parse", "HEAD").strip()
    words = [engine, "build" if engine != "buildah" else "bud", "--file", f"docker/{name}.Dockerfile"]
    labels = {"VERSION": VERSION, "REVISION": revision, "SOURCE": os.environ.get("SOURCE", "")}
    words += [
        "--tag",
        tag(name),
        *(word for key, value in labels.items() for word in ("--build-arg", f"{key}={value}")),
    ]
    if engine != "docker":
        # The OCI format has no health check. The mounts: who needs certificates or an index of his own has them here.
        words += ["--format", "docker", "--isolation", "chroot", "--layers"]
        words += ["--pull-never"] if engine == "buildah" and has(engine, BASE) else []
        words += mounts({path: f"{path}:ro" for path in ("/etc/ssl/certs", "/etc/pip.conf") if Path(path).exists()})
    log = OUT / f"{name}.log"
    with log.open("w") as file:
        code = subprocess.run([*words, "."], stdout=file, stderr=subprocess.STDOUT, timeout=3600, cwd=ROOT).returncode
    if code:
        tail = log.read_text()[-2000:]
        sys.exit(f"{tag(name)}: found exit {code} of {engine}, wanted 0: the end of {log}:\n{tail}")


def describe(engine: str, name: str) -> dict[str, Any]:
    """An image's id, digest (none before a push, with docker), size in bytes, command and health check."""
    if engine == "buildah":
        found = json.loads(call("buildah", "inspect", "--type", "image", tag(name)))
        config, key, digest = found["Docker"]["config"], found["FromImageID"], found["FromImageDigest"]
        [listed] = json.loads(call("buildah", "images", "--json", tag(name)))
        number, unit = listed["size"].split()
        size = int(float(number) * {"KB": 1e3, "MB": 1e6, "GB": 1e9}[unit])
    else:
        [found] = json.loads(call(engine, "image", "inspect", tag(name)))
        config, key, digest = found["Config"], found["Id"], found.get("Digest")
        config.setdefault("Healthcheck", found.get("Healthcheck"))  # podman keeps it here
        size = found["Size"]
    health = (config.get("Healthcheck") or {}).get("Test", [])[1:]
    return {"tag": tag(name), "id": key, "digest": digest, "size": size, "command": config["Cmd"], "health": health}


class Runner:
    """Containers of an engine: as user 10001, without a network, on a read-only root where the engine has one."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.options: list[str] = []
        self.read_only = engine != "buildah"
        if engine == "podman" and not works("podman", "run", "--rm", "--network", "none", BASE, "true"):
            script = OUT / "runc-without-limits"
            script.write_text(RUNTIME)
            script.chmod(0o755)
            settings = OUT / "containers.conf"
            settings.write_text('[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n')
            os.environ["CONTAINERS_CONF"] = str(settings)
            self.options = ["--runtime", str(script)]

    def run(self, image: str, words: list[str], shown: dict[Path | str, str], seconds: float) -> str:
        """What a command inside prints; its failure ends everything with all that it said."""
        if self.engine == "buildah":
            name = call("buildah", "from", "--pull-never", image).strip()
            inside = ["buildah", "run", "--isolation", "chroot", "--user", "10001", *mounts(shown), name, "--", *words]
            remove = ["buildah", "rm", name]
        else:
            name = f"sonorant-test-{os.getpid()}"
            locked = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
            inside = [self.engine, *self.options, "run", "--rm", "--name", name, "--network", "none", *locked]
            inside += ["--user", "10001", *mounts(shown), image, *words]
            remove = [self.engine, *self.options, "rm", "--force", name]
        try:
            answer = subprocess.run(inside, capture_output=True, text=True, timeout=seconds)
        finally:
            subprocess.run(remove, capture_output=True, timeout=60)
        if answer.returncode:
            sys.exit(
                f"{image}: found exit {answer.returncode}, wanted 0:\n{answer.stdout[-3000:]}{answer.stderr[-3000:]}"
            )
        return answer.stdout


def write_sbom(runner: Runner, name: str) -> int:
    """The packages in an image, as CycloneDX: the tool is shown to the image and never enters it."""
    tool = OUT / "sbom"
    if not (tool / "cyclonedx_py").exists():
        call(
            "uv", "pip", "install", "--quiet", "--python-version", "3.11", "--target", str(tool), SBOM_TOOL, seconds=300
        )
    program = "import sys; sys.path.append('/tool'); from cyclonedx_py._internal.cli import run; sys.exit(run())"
    words = ["environment", "--output-reproducible", "--of", "JSON", "/opt/venv/bin/python"]
    text = runner.run(tag(name), ["python", "-c", program, *words], {tool: "/tool:ro"}, 300)
    sbom = json.loads(text)
    (OUT / f"{name}.sbom.json").write_text(json.dumps(sbom, indent=1, sort_keys=True) + "\n")
    return len(sbom["components"])


def make_base(engine: str) -> None:
    """A python:3.11-slim of Debian's packages, where none can be pulled."""
    if has(engine, BASE) or works(engine, "pull", BASE, seconds=120):
        return
    print(f"== {BASE}: cannot be pulled, made of Debian's packages", flush=True)
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    mirror = re.findall(r"^URIs: *(\S+)", sources.read_text(), re.M)[:1] if sources.exists() else []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary:
        folder = Path(temporary) / "base"
        packages = "--include=python3,python3-venv,python3-pip,ca-certificates"
        call("debootstrap", "--variant=minbase", packages, CODENAME, str(folder), *mirror, seconds=900)
        # pip may install into the system's Python in an image, as it may in the real one.
        (folder / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()
        for link, target in {"python": "python3.11", "pip": "pip3"}.items():
            (folder / "usr/local/bin" / link).symlink_to(f"/usr/bin/{target}")
        if engine == "podman":
            archive = Path(temporary) / "base.tar"
            call("tar", "-C", str(folder), "-cf", str(archive), ".", seconds=300)
            call("podman", "import", str(archive), BASE, seconds=300)
        else:
            name = call("buildah", "from", "scratch").strip()
            call("buildah", "add", name, str(folder), "/", seconds=300)
            call("buildah", "commit", "--rm", name, BASE, seconds=300)


def try_image(runner: Runner, image: dict[str, Any], name: str) -> dict[str, float]:
    """What an image does, seen from inside (docker/inside.py); returns times."""
    with tempfile.TemporaryDirectory(dir=OUT) as temporary:
        folder = Path(temporary)
        folder.chmod(0o777)
        shown: dict[Path | str, str] = {ROOT / "docker" / "inside.py": "/inside.py:ro"}
        if name == "serve":
            model = ROOT / "artifacts" / "model"
            if not (model / "artifact.json").exists():
                sys.exit(f"{model}: found no model, wanted one: run make demo first")
            # Whoever published the model may keep its files to himself.
            for path in shutil.copytree(model, folder / "model").iterdir():
                path.chmod(0o644)
            shown[folder / "model"] = "/model:ro"
        else:
            shown[folder] = "/runs"
        told = {**image, "name": name, "read_only": runner.read_only, "lacking": LACKING[name]}
        said = runner.run(tag(name), ["python", "/inside.py", json.dumps(told)], shown, 600)
    *lines, times = said.splitlines()
    print("\n".join(line for line in lines if line.startswith("ok: ")))
    return dict(json.loads(times))


def main() -> None:
    wanted = sys.argv[1:]
    if wanted not in (["build"], ["test"]):
        sys.exit(f"images: found {wanted}, wanted build or test: python docker/images.py build")
    OUT.mkdir(parents=True, exist_ok=True)
    engine = find_engine()
    print(f"== engine: {engine}", flush=True)
    if wanted == ["test"] and engine != "docker":
        make_base(engine)
    report: dict[str, Any] = {"engine": engine}
    runner = None
    for name in ("serve", "train"):
        begin = time.monotonic()
        print(f"== {tag(name)}", flush=True)
        build(engine, name)
        image = describe(engine, name)
        image["build_seconds"] = round(time.monotonic() - begin, 1)
        runner = runner or Runner(engine)
        image["num_packages"] = write_sbom(runner, name)
        if wanted == ["test"]:
            begin = time.monotonic()
            image |= try_image(runner, image, name)
            image["test_seconds"] = round(time.monotonic() - begin, 1)
        report[name] = image
    (OUT / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    for name in ("serve", "train"):
        image = report[name]
        print(f"{image['tag']}  {image['size'] / 1e9:.2f} GB  {image['digest'] or image['id']}")
        print(
            "  "
            + ", ".join(f"{key} {image[key]}" for key in image if key.endswith("_seconds") or key == "num_packages")
        )
    print(f"report: {OUT / 'report.json'}")


if __name__ == "__main__":
    main()
