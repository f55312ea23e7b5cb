"""docs/operations.md: every command in it is parsed, rendered or run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.placing import CLIENT, STORE, STORE_KEYS, WEBHOOK
from sonorant.artifacts import read_record
from sonorant.store.connection import open_client, read_settings
from tests.cluster.rgw import Rgw
from tests.tiny import write_model
from tests.written import ROOT, check_make, check_pipelines, shell_lines

PAGE = (ROOT / "docs" / "operations.md").read_text()
LINES = shell_lines(PAGE)
BUCKET, COPY = "sonorant-production", "sonorant-backup"
STORE_LINES = [line for line in LINES if line.startswith(("sonorant store", "rclone"))]
"""Those that a test runs in their order."""
FILE_LINES = [line for line in LINES if line.startswith(("python -m serving key", "sed ", "set -a"))]
"""Those that are run where an operator's files are."""
VARIABLES = {"AWS_ENDPOINT_URL", "AWS_REGION", "SONORANT_STORE", "KF_PIPELINES_ENDPOINT", "SONORANT_IMAGE"}
SECRETS = {STORE: set(STORE_KEYS), "sonorant-keys": {"keys.jsonl"}, WEBHOOK: {"url"}, CLIENT: {"key"}}
"""What pods look for in each Secret."""
DIGESTS = {"SERVE_DIGEST": "a1" * 32, "TRAIN_DIGEST": "b2" * 32}


def sh(command: str, place: Path, **variables: str) -> str:
    """What a command of the page says where it is run."""
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": tools, "PYTHONPATH": str(ROOT), **variables}
    words = ["bash", "-c", command]
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


# ---------------------------------------------------------------------------------------------------- the cluster


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's k8s/ and the operator's files, made by the page's own commands."""
    if shutil.which("kubectl") is None:
        said = "kubectl: found none, wanted 1.32 or newer to render k8s/: install it"
        pytest.fail(said) if "CI" in os.environ else pytest.skip(said)
    place = tmp_path_factory.mktemp("operator")
    shutil.copytree(ROOT / "k8s", place / "k8s")
    (place / "store.env").write_text("AWS_ACCESS_KEY_ID=ada\nAWS_SECRET_ACCESS_KEY=letters-and-digits\n")
    for line in FILE_LINES:
        # What a line sets is then set.
        said = sh(f'{line}\necho "$AWS_ACCESS_KEY_ID"', place, AWS_ACCESS_KEY_ID="", **DIGESTS)
        assert said.splitlines()[-1] == ("ada" if line.startswith("set -a") else "")
    return place


@pytest.fixture(scope="module")
def production(prepared: Path) -> list[dict[str, Any]]:
    """What the page's command applies."""
    [line] = {line for line in LINES if line.startswith("kubectl kustomize ")}
    return list(yaml.safe_load_all(sh(line.split("|")[0], prepared)))


def named(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """Objects of a kind, as kubectl writes it, by name."""
    kinds = {"hpa": "HorizontalPodAutoscaler"}.get(kind, kind).lower()
    return {item["metadata"]["name"]: item for item in objects if item["kind"].lower() == kinds}


def check_kubectl(line: str, prepared: Path, production: list[dict[str, Any]]) -> None:
    """The objects and containers a command names are there; Secrets are made, by kubectl itself, as pods want them."""
    verb = shlex.split(line, comments=True)[1:]
    if "--namespace" in verb:
        assert verb[verb.index("--namespace") + 1] == "sonorant"
    match verb:
        case ["kustomize" | "diff", *rest]:
            [place] = [word for word in rest if word.startswith("k8s/")]
            assert (prepared / place / "kustomization.yaml").is_file()
            assert "|" not in line or line.split("|", 1)[1].strip() == "kubectl apply --server-side -f -"
        case ["create", "namespace", name]:
            assert name in named(production, "Namespace")
        case ["create", "secret", "generic", name, *_]:
            command = line.split("|")[0].replace(" --dry-run=client -o yaml", "") + " --dry-run=client -o yaml"
            made = yaml.safe_load(sh(command, prepared, SONORANT_API_KEY="key"))
            assert (made["metadata"]["name"], made["metadata"]["namespace"]) == (name, "sonorant")
            assert set(made["data"]) == SECRETS[name]
        case ["get", "pods" | "trainjobs", "--namespace", _]:
            pass
        case ["get", kind, name, "--namespace", _]:
            assert name in named(production, kind)
        case ["rollout", "status" | "restart" | "undo", *rest] | ["logs" | "port-forward", *rest]:
            targets = [word.split("/") for word in rest if "/" in word]
            assert targets, line
            for kind, name in targets:
                found = named(production, kind)
                assert name in found, f"{kind} {name}: not in the production overlay"
                if "--container" in rest:
                    pod = found[name]["spec"]["template"]["spec"]
                    names = [one["name"] for one in (*pod["containers"], *pod["initContainers"])]
                    assert rest[rest.index("--container") + 1] in names
        case _:
            raise AssertionError(f"{line}: no check for such a command")


# ---------------------------------------------------------------------------------------------------- each command


def check_variables(line: str) -> None:
    """It sets nothing but what is read."""
    given = {word.partition("=")[0] for word in shlex.split(line, comments=True)[1:]}
    assert given <= VARIABLES


def check_curl(line: str) -> None:
    """The server has this route."""
    routes = json.loads((ROOT / "tests" / "serving" / "openapi.json").read_text())["paths"]
    match = re.search(r"127\.0\.0\.1:8000(/[^\s?']*)", line)
    assert match
    assert match[1] in routes


CHECKS: dict[str, Callable[[str], None]] = {
    "export ": check_variables,
    "make ": check_make,
    "curl ": check_curl,
    "python -m pipelines ": check_pipelines,
}


@pytest.mark.parametrize("line", sorted(set(LINES) - {*STORE_LINES, *FILE_LINES}))
def test_a_command_is_what_there_is(line: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if line.startswith("kubectl "):
        check_kubectl(line, request.getfixturevalue("prepared"), request.getfixturevalue("production"))
        return
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "https://kubeflow.example.org")
    checks = [check for beginning, check in CHECKS.items() if line.startswith(beginning)]
    assert len(checks) == 1, f"{line}: no check for such a command"
    checks[0](line)


def test_the_store_s_commands_do_in_their_order_what_the_page_says(rgw: Rgw, tmp_path: Path) -> None:
    variables = rgw.variables(BUCKET)
    for name in ("STORE", "BACKUP"):
        remote = {"TYPE": "s3", "PROVIDER": "Ceph", "ENV_AUTH": "true", "ENDPOINT": rgw.endpoint}
        variables |= {f"RCLONE_CONFIG_{name}_{key}": value for key, value in remote.items()}
    client = open_client(read_settings(environment=variables))
    for bucket in (BUCKET, COPY):
        client.make_bucket(bucket)
    models = [write_model(tmp_path / f"model-{seed}", seed) for seed in (0, 1)]
    digests = [read_record(model, "model")["digest"] for model in models]
    pushed = 0
    for line in STORE_LINES:
        if " push " in line:
            # The second push on the page is of a newer model.
            shutil.rmtree(tmp_path / "artifacts", ignore_errors=True)
            shutil.copytree(models[pushed], tmp_path / "artifacts" / "model")
            pushed += 1
        said = sh(line, tmp_path, DIGEST=digests[1], **variables)
        if " rollback " in line:
            # To the model before the upgrade.
            assert digests[0] in said
            assert digests[0] in sh("sonorant store log model@production", tmp_path, **variables).splitlines()[0]
        if " move " in line:
            assert digests[1] in sh("sonorant store log model@production", tmp_path, **variables).splitlines()[0]
    assert pushed == 2
    assert read_record(tmp_path / "restored" / "model", "model")["digest"] == digests[1]


def test_every_alert_is_explained() -> None:
    rules = yaml.safe_load((ROOT / "k8s" / "components" / "monitoring" / "alerts.yaml").read_text())
    alerts = [rule["alert"] for group in rules["spec"]["groups"] for rule in group["rules"]]
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == alerts


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:k8s|tests|docs|src)/[\w./-]+)`", PAGE))))
def test_this_file_is_there(path: str) -> None:
    assert (ROOT / path).exists()
