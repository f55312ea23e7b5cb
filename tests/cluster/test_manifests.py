"""What k8s/ renders is what Kubernetes takes, and every check finds the mistake it is there for."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.canary import CANARY_URL, PRODUCTION_URL
from pipelines.placing import RUNS_CLAIM, RUNS_PATH, STORE, STORE_KEYS, STORE_SETTINGS
from serving.metrics import Metrics
from sonorant import __version__
from sonorant.cli import make_app
from sonorant.config import LaunchConfig
from tests.cluster import manifests
from tests.cluster.manifests import CHECKS, Check, Object, name_of, of_kind, pods_of

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "k8s" / "README.md").read_text()
OVERLAYS = ("local", "staging", "production", "kserve")
REGISTRY = {"SERVE_DIGEST": "a1" * 32, "TRAIN_DIGEST": "b2" * 32}
"""What a registry said of the images that were pushed."""


def written(beginning: str) -> list[str]:
    """The commands of the README that begin so."""
    found = [line for line in README.splitlines() if line.startswith(beginning)]
    assert found, f"k8s/README.md: found no command that begins with {beginning}"
    return found


def run(command: str, place: Path) -> str:
    """What a command of the README says."""
    environment = {**os.environ, **REGISTRY}
    done = subprocess.run(["sh", "-c", command], cwd=place, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def kubectl() -> str:
    """What renders; skips where there is none, in CI there must be."""
    if shutil.which("kubectl") is None:
        said = "kubectl: found none, wanted 1.32 or newer to render k8s/: install it"
        pytest.fail(said) if "CI" in os.environ else pytest.skip(said)
    return "kubectl kustomize"


@pytest.fixture(scope="session")
def checkout(kubectl: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of k8s/ where the README's preparations were made."""
    place = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "k8s", place / "k8s", ignore=shutil.ignore_patterns("store.env"))
    assert written(kubectl)
    for beginning in ("cp ", "sed "):
        for command in written(beginning):
            run(command, place)
    return place


@pytest.fixture(scope="session")
def rendered(checkout: Path) -> dict[str, list[Object]]:
    """Each overlay's objects, by the README's commands."""
    commands = {line.split("overlays/")[1].split()[0]: line for line in written("kubectl kustomize ")}
    assert set(commands) == set(OVERLAYS)
    return {name: list(yaml.safe_load_all(run(line.split("|")[0], checkout))) for name, line in commands.items()}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_is_wrong(overlay: str, check: Check, rendered: dict[str, list[Object]]) -> None:
    assert check(rendered[overlay]) == []


def test_production_names_images_by_digest(rendered: dict[str, list[Object]]) -> None:
    assert manifests.digests(rendered["production"]) == []


def test_production_cannot_be_applied_as_it_stands_in_git(kubectl: str) -> None:
    objects = list(yaml.safe_load_all(run(f"{kubectl} k8s/overlays/production", ROOT)))
    assert len(manifests.digests(objects)) == sum(len(pod.containers) for pod in pods_of(objects))


def test_no_secret_is_in_git(rendered: dict[str, list[Object]]) -> None:
    kinds = {name: [name_of(item) for item in of_kind(objects, "Secret")] for name, objects in rendered.items()}
    assert kinds == {"local": ["Secret sonorant-s3"], "staging": [], "production": [], "kserve": []}
    ignored = subprocess.run(["git", "check-ignore", "-q", "k8s/overlays/local/store.env"], cwd=ROOT, timeout=60)
    assert ignored.returncode == 0
    for path in (ROOT / "k8s").rglob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text()):
            assert document.get("kind") != "Secret", path


def find(objects: list[Object], kind: str, name: str) -> Any:
    """The one object of a kind and a name."""
    [item] = [item for item in of_kind(objects, kind) if item["metadata"]["name"] == name]
    return item


def server(objects: list[Object]) -> Any:
    """The embedding server's container."""
    return find(objects, "Deployment", "sonorant-serving")["spec"]["template"]["spec"]["containers"][0]


def serving(objects: list[Object]) -> Any:
    """The embedding service's pod."""
    return find(objects, "Deployment", "sonorant-serving")["spec"]["template"]["spec"]


def runtime(objects: list[Object]) -> Any:
    """A TrainJob's pod."""
    spec = find(objects, "ClusterTrainingRuntime", "sonorant-torch")["spec"]
    return spec["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def trainjob(**fields: Any) -> Object:
    """A TrainJob as Kubeflow Trainer 2 takes it, and what is added."""
    spec = {"runtimeRef": {"name": "sonorant-torch"}, "trainer": {"numNodes": 2, "numProcPerNode": 4}, **fields}
    meta = {"name": "job", "namespace": "sonorant"}
    return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": meta, "spec": spec}


Mutation = Callable[[list[Object]], object]
MISTAKES: dict[str, tuple[Check, str, Mutation]] = {
    # The ten that the issue asks for.
    "wrong selector": (
        manifests.selectors,
        "takes the pods of nobody",
        lambda o: find(o, "Deployment", "sonorant-serving")["spec"]["selector"]["matchLabels"].update(a="b"),
    ),
    "missing secret": (
        manifests.references,
        "no Secret sonorant-s4",
        lambda o: serving(o)["initContainers"][0]["envFrom"][1].update(secretRef={"name": "sonorant-s4"}),
    ),
    "half a GPU": (
        manifests.quantities,
        "nvidia.com/gpu 0.5 is not whole",
        lambda o: runtime(o)["containers"][0]["resources"]["limits"].update({"nvidia.com/gpu": "0.5"}),
    ),
    "bad quantity": (
        manifests.quantities,
        "cpu 500mm is no quantity",
        lambda o: server(o)["resources"]["requests"].update(cpu="500mm"),
    ),
    "unknown field": (manifests.schemas, "imagePullpolicy", lambda o: server(o).update(imagePullpolicy="Always")),
    "port typo": (
        manifests.ports,
        "leads to port htpp",
        lambda o: find(o, "Service", "sonorant-serving")["spec"]["ports"][0].update(targetPort="htpp"),
    ),
    "privileged container": (
        manifests.restricted,
        "is privileged",
        lambda o: server(o)["securityContext"].update(privileged=True),
    ),
    "missing probe": (manifests.probes, "wanted all three probes", lambda o: server(o).pop("readinessProbe")),
    "image tag latest": (manifests.images, "latest", lambda o: server(o).update(image="sonorant-serve:latest")),
    "TrainJob field that no longer exists": (
        manifests.schemas,
        "podTemplateOverrides is unknown",
        lambda o: o.append(trainjob(podTemplateOverrides=[])),
    ),
    # And what else has no other guard.
    "runtime field that no longer exists": (
        manifests.schemas,
        "numProcPerNode",
        lambda o: find(o, "ClusterTrainingRuntime", "sonorant-torch")["spec"]["mlPolicy"]["torch"].update(
            numProcPerNode="auto"
        ),
    ),
    "custom object without a schema": (
        manifests.schemas,
        "example.org/v1/Widget has no schema",
        lambda o: o.append({"apiVersion": "example.org/v1", "kind": "Widget", "metadata": {"name": "a"}}),
    ),
    "unknown field of a ServiceMonitor": (
        manifests.schemas,
        "intervall",
        lambda o: find(o, "ServiceMonitor", "sonorant-serving")["spec"]["endpoints"][0].update(intervall="15s"),
    ),
    "unknown field in a runtime's pod": (
        manifests.schemas,
        "nodeSelektor",
        lambda o: runtime(o).update(nodeSelektor={"gpu": "a"}),
    ),
    "image without a tag": (
        manifests.images,
        "registry:5000/serve",
        lambda o: server(o).update(image="registry:5000/serve"),
    ),
    "tag in production": (manifests.digests, "serve:1.0", lambda o: server(o).update(image="serve:1.0")),
    "probe's port typo": (
        manifests.ports,
        "a probe asks port 8080",
        lambda o: server(o)["livenessProbe"]["httpGet"].update(port=8080),
    ),
    "probe's path typo": (
        manifests.probes,
        "asks /healthz",
        lambda o: server(o)["livenessProbe"]["httpGet"].update(path="/healthz"),
    ),
    "scraped port typo": (
        manifests.ports,
        "has no port metrics",
        lambda o: find(o, "ServiceMonitor", "sonorant-serving")["spec"]["endpoints"][0].update(port="metrics"),
    ),
    "scraped path typo": (
        manifests.ports,
        "asks /metric,",
        lambda o: find(o, "ServiceMonitor", "sonorant-serving")["spec"]["endpoints"][0].update(path="/metric"),
    ),
    "policy's port typo": (
        manifests.ports,
        "no pod has port web",
        lambda o: find(o, "NetworkPolicy", "serving")["spec"]["ingress"][0]["ports"][0].update(port="web"),
    ),
    "policy for nobody": (
        manifests.selectors,
        "selects no pod",
        lambda o: find(o, "NetworkPolicy", "serving")["spec"]["podSelector"]["matchLabels"].update(a="b"),
    ),
    "Service of two workloads": (
        manifests.selectors,
        "wanted one workload's",
        lambda o: find(o, "Service", "sonorant-serving")["spec"].update(
            selector={"app.kubernetes.io/component": "serving"}
        ),
    ),
    "budget for nobody": (
        manifests.selectors,
        "PodDisruptionBudget sonorant-serving: selects",
        lambda o: find(o, "PodDisruptionBudget", "sonorant-serving")["spec"]["selector"]["matchLabels"].update(a="b"),
    ),
    "scaler of nothing": (
        manifests.references,
        "no Deployment sonorant",
        lambda o: find(o, "HorizontalPodAutoscaler", "sonorant-serving")["spec"]["scaleTargetRef"].update(
            name="sonorant"
        ),
    ),
    "scaler and replicas": (
        manifests.references,
        "undo the scaling",
        lambda o: find(o, "Deployment", "sonorant-serving")["spec"].update(replicas=2),
    ),
    "missing volume claim": (
        manifests.references,
        "no PersistentVolumeClaim",
        lambda o: o.remove(find(o, "PersistentVolumeClaim", "sonorant-runs")),
    ),
    "missing account": (
        manifests.references,
        "no ServiceAccount sonorant-serving",
        lambda o: o.remove(find(o, "ServiceAccount", "sonorant-serving")),
    ),
    "missing ConfigMap": (
        manifests.references,
        "no ConfigMap sonorant-s3",
        lambda o: o.remove(find(o, "ConfigMap", "sonorant-s3")),
    ),
    "mount without a volume": (
        manifests.references,
        "there is no volume",
        lambda o: serving(o).update(volumes=serving(o)["volumes"][:1]),
    ),
    "name in capitals": (manifests.names, "is no DNS label", lambda o: server(o).update(name="Server")),
    "long port name": (
        manifests.names,
        "is no port's name",
        lambda o: server(o)["ports"][0].update(name="embedding-server-http"),
    ),
    "other namespace": (
        manifests.names,
        "found namespace default",
        lambda o: find(o, "Service", "sonorant-serving")["metadata"].update(namespace="default"),
    ),
    "request above its limit": (
        manifests.quantities,
        "requests more memory",
        lambda o: server(o)["resources"]["requests"].update(memory="9Gi"),
    ),
    "no memory limit": (manifests.quantities, "no memory limit", lambda o: server(o)["resources"].pop("limits")),
    "writable root": (
        manifests.restricted,
        "may write to its root",
        lambda o: runtime(o)["containers"][0]["securityContext"].pop("readOnlyRootFilesystem"),
    ),
    "root": (manifests.restricted, "may be root", lambda o: runtime(o)["securityContext"].pop("runAsNonRoot")),
    "folder of the host": (
        manifests.restricted,
        "is of kind ['hostPath']",
        lambda o: serving(o)["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
    ),
    "open namespace": (
        manifests.isolation,
        "does not enforce",
        lambda o: find(o, "Namespace", "sonorant")["metadata"].pop("labels"),
    ),
    "no denial": (manifests.isolation, "denies", lambda o: o.remove(find(o, "NetworkPolicy", "deny-all"))),
    "no way to the store": (
        manifests.isolation,
        "may not reach it",
        lambda o: o.remove(find(o, "NetworkPolicy", "store")),
    ),
    "variable that the server does not know": (
        manifests.settings,
        "worker",
        lambda o: server(o)["env"].append({"name": "SONORANT_SERVE_WORKERS", "value": "2"}),
    ),
    "value that the server does not take": (
        manifests.settings,
        "port",
        lambda o: next(v for v in server(o)["env"] if v["name"] == "SONORANT_SERVE_PORT").update(value="80000"),
    ),
    "grace shorter than the drain": (
        manifests.settings,
        "found a grace of 30 s",
        lambda o: serving(o).update(terminationGracePeriodSeconds=30),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, rendered: dict[str, list[Object]]) -> None:
    check, complaint, mutate = MISTAKES[mistake]
    objects = copy.deepcopy(rendered["production"])
    mutate(objects)
    found = check(objects)
    assert any(complaint in line for line in found), found


def test_a_trainjob_is_right_as_it_is() -> None:
    assert manifests.schemas([trainjob()]) == []


def test_names_that_the_pipelines_use_are_there(rendered: dict[str, list[Object]]) -> None:
    for overlay in ("local", "staging", "production"):
        objects = rendered[overlay]
        names = {name_of(item) for item in objects}
        for url in (CANARY_URL, PRODUCTION_URL):
            service, namespace = re.fullmatch(r"http://([\w-]+)\.([\w-]+):8000", url).groups()  # type: ignore[union-attr]
            found = find(objects, "Service", service)
            assert found["metadata"]["namespace"] == namespace
            assert [port["port"] for port in found["spec"]["ports"]] == [8000]
        assert f"PersistentVolumeClaim {RUNS_CLAIM}" in names
        assert f"ClusterTrainingRuntime {LaunchConfig().runtime}" in names
        assert set(STORE_SETTINGS) <= find(objects, "ConfigMap", STORE)["data"].keys()
        [node] = runtime(objects)["containers"]
        assert node["name"] == "node"
        assert {mount["name"]: mount["mountPath"] for mount in node["volumeMounts"]}["runs"] == RUNS_PATH
    assert find(rendered["local"], "Secret", STORE)["data"].keys() == set(STORE_KEYS)


def test_each_deployment_follows_its_alias(rendered: dict[str, list[Object]]) -> None:
    for name, alias in (("sonorant-serving", "model@production"), ("sonorant-canary", "model@canary")):
        spec = find(rendered["production"], "Deployment", name)["spec"]["template"]["spec"]
        fetch, follow = spec["initContainers"]
        assert [container["env"][0]["value"] for container in (fetch, follow)] == [alias, alias]
        assert follow["restartPolicy"] == "Always"
        folder = fetch["command"][-1]
        assert follow["command"][4] == folder
        served = {v["name"]: v.get("value") for v in spec["containers"][0]["env"]}["SONORANT_SERVE_MODEL"]
        assert served == f"model={folder}"


@pytest.mark.parametrize("overlay", ["production", "kserve"])
def test_the_command_line_knows_what_containers_run(
    overlay: str, rendered: dict[str, list[Object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SONORANT_STORE", *STORE_KEYS, *STORE_SETTINGS):
        monkeypatch.delenv(name, raising=False)
    commands = []
    for pod in pods_of(rendered[overlay]):
        for container in pod.spec.get("initContainers", []):
            words = container["command"]
            for variable in container["env"]:
                words = [word.replace(f"$({variable['name']})", variable["value"]) for word in words]
            commands.append(words)
    assert commands
    for program, *words in commands:
        assert program == "sonorant"
        done = CliRunner().invoke(make_app(), words)
        # It understood, and went on to what it lacks here: words that it does not know end with 2.
        assert done.exit_code == 1, done.output
        assert "set $SONORANT_STORE" in str(done.output) + str(done.exception)


def test_images_are_of_this_version(rendered: dict[str, list[Object]]) -> None:
    ours = {c["image"] for pod in pods_of(rendered["staging"]) for c in pod.containers}
    assert ours == {f"registry.example.org/sonorant-{name}:{__version__}" for name in ("serve", "train")}


def test_the_scaler_asks_for_what_the_adapter_makes_and_the_server_tells(
    rendered: dict[str, list[Object]],
) -> None:
    scaler = find(rendered["production"], "HorizontalPodAutoscaler", "sonorant-serving")
    [asked] = [metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"] if metric["type"] == "Pods"]
    assert [metric["type"] for metric in scaler["spec"]["metrics"]] == ["Pods", "ContainerResource"]
    rules = yaml.safe_load((ROOT / "k8s/components/monitoring/adapter.yaml").read_text())["rules"]["custom"]
    assert [rule["name"]["as"] for rule in rules] == [asked]
    assert rules[0]["seriesQuery"].partition("{")[0] == asked
    assert asked in Metrics().exposition().decode()


def test_rights_are_least(rendered: dict[str, list[Object]]) -> None:
    objects = rendered["production"]
    rules = [rule for item in of_kind(objects, "Role", "ClusterRole") for rule in item["rules"]]
    for rule in rules:
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        assert "secrets" not in rule["resources"] or rule["resourceNames"]
    [jobs] = [rule for rule in rules if rule["resources"] == ["trainjobs"]]
    assert sorted(jobs["verbs"]) == ["create", "delete", "get", "list", "watch"]
    holders = {s["name"] for b in of_kind(objects, "RoleBinding", "ClusterRoleBinding") for s in b["subjects"]}
    assert holders == {"sonorant-pipeline"}
