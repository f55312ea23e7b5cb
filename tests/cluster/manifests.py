"""What is wrong with Kubernetes objects: their schemas, and the mistakes that no schema finds.

A check takes all objects of an overlay and returns complaints, one line each; none is what it should be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from kubeflow_trainer_api import models
from kubernetes_validate.utils import schema_contents
from pydantic import ValidationError

from serving.routes.kserve import routes as protocol_routes
from serving.routes.operation import routes as operation_routes
from serving.settings import Settings
from tests.trainer import unknown_fields

Object = dict[str, Any]
Check = Callable[[list[Object]], list[str]]
NAMESPACE = "sonorant"
VERSION = kubernetes_validate.latest_version()
CLUSTER_WIDE = {"Namespace", "ClusterRole", "ClusterRoleBinding", "ClusterTrainingRuntime", "ClusterServingRuntime"}
EXTERNAL = {
    ("Secret", "sonorant-s3"): "the object store's key: made by hand outside `local`, so that git never sees it",
    ("Secret", "sonorant-keys"): "who may ask for embeddings: made by hand, likewise",
}
"""What is referred to and not rendered, and why."""
FOREIGN_LABELS = {"workflows.argoproj.io/workflow"}
"""On pods that Kubeflow Pipelines makes, which are not rendered."""
DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
DNS_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
SIZES = {"": 1.0, "m": 1e-3} | {s: 1e3**i for i, s in enumerate("kMGTPE", 1)}
SIZES |= {f"{s}i": 1024.0**i for i, s in enumerate("KMGTPE", 1)}
DIGEST = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Pod:
    """A pod that some object describes; `serves`: it is to run for ever and be asked things."""

    where: str
    labels: dict[str, str]
    spec: Object
    serves: bool

    @property
    def containers(self) -> list[Object]:
        """All of them, those that initialise first."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str | int, int]:
        """Ports by name and by number."""
        ports = [port for container in self.containers for port in container.get("ports", [])]
        return {
            key: port["containerPort"] for port in ports for key in (port.get("name"), port["containerPort"]) if key
        }


def name_of(item: Object) -> str:
    """Kind and name, for complaints."""
    return f"{item['kind']} {item.get('metadata', {}).get('name')}"


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    """The objects of some kinds."""
    return [item for item in objects if item["kind"] in kinds]


def pods_of(objects: list[Object]) -> Iterator[Pod]:
    """Every pod that would come to be, those of custom objects too."""
    for item in objects:
        where, spec = name_of(item), item.get("spec", {})
        if item["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
            template = spec["template"]
            yield Pod(where, template.get("metadata", {}).get("labels", {}), template["spec"], item["kind"] != "Job")
        elif item["kind"] in ("ClusterTrainingRuntime", "TrainingRuntime"):
            for job in spec["template"]["spec"]["replicatedJobs"]:
                template = job["template"]["spec"]["template"]
                yield Pod(f"{where}, {job['name']}", template["metadata"]["labels"], template["spec"], False)
        elif item["kind"] == "InferenceService":
            yield merged(item, of_kind(objects, "ClusterServingRuntime"))


def merged(service: Object, runtimes: list[Object]) -> Pod:
    """The pod that KServe makes of an InferenceService and its runtime."""
    predictor = service["spec"]["predictor"]
    named = predictor["model"].get("runtime")
    runtime: Object = next((r["spec"] for r in runtimes if r["metadata"]["name"] == named), {"containers": []})
    spec = {key: value for key, value in predictor.items() if key in pod_fields()}
    volumes = [*runtime.get("volumes", []), *predictor.get("volumes", [])]
    spec |= {"containers": runtime["containers"], "volumes": volumes}
    return Pod(name_of(service), predictor.get("labels", {}), spec, True)


@cache
def pod_fields() -> frozenset[str]:
    """What a pod's specification may say."""
    return frozenset(
        schema_contents(f"kubernetes-json-schema/v{VERSION}-local-strict/podspec-v1.json", VERSION)["properties"]
    )


@cache
def custom_schemas() -> dict[str, Any]:
    """The schemas of custom.yaml."""
    read: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "custom.yaml").read_text())
    read["$defs"]["pod"] = {"properties": dict.fromkeys(pod_fields(), True)}
    return read


def schemas(objects: list[Object]) -> list[str]:
    """Every object has a schema, and keeps to it; so do the pods within custom objects."""
    found = [(name_of(item), complaint) for item in objects for complaint in against_schema(item)]
    for pod in pods_of(of_kind(objects, "ClusterTrainingRuntime", "InferenceService", "ClusterServingRuntime")):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod.spec}
        found += [(pod.where, complaint) for complaint in against_schema(whole)]
    return [f"{where}: {complaint}" for where, complaint in found]


def against_schema(item: Object) -> list[str]:
    """What an object's own schema says of it."""
    return list(judged(json.dumps(item)))


@cache
def judged(written: str) -> list[str]:
    """The same of an object as JSON: overlays share most of theirs."""
    item = json.loads(written)
    group, key = item["apiVersion"].partition("/")[0], f"{item['apiVersion']}/{item['kind']}"
    if group == "trainer.kubeflow.org":
        model = getattr(models, f"TrainerV1alpha1{item['kind']}", None)
        if model is None or not item["apiVersion"].endswith("/v1alpha1"):
            return [f"{key} has no schema"]
        try:
            return [f"{place} is unknown" for place in unknown_fields(item, model.from_dict(item).to_dict())]
        except (ValidationError, ValueError) as error:
            return [" ".join(str(error).split())]
    try:
        if key in custom_schemas():
            defs = custom_schemas()["$defs"]
            whole = {
                "$defs": defs,
                "type": "object",
                "required": ["apiVersion", "kind", "metadata", "spec"],
                "additionalProperties": False,
                "properties": {
                    "apiVersion": True,
                    "kind": True,
                    "metadata": {"$ref": "#/$defs/metadata"},
                    "spec": custom_schemas()[key],
                },
            }
            jsonschema.Draft202012Validator(whole).validate(item)
        else:
            kubernetes_validate.validate(item, VERSION, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        return [f"{key} has no schema"]
    except jsonschema.ValidationError as error:
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"]
    return []


def names(objects: list[Object]) -> list[str]:
    """Names are what Kubernetes takes, no object is there twice, and each is in the one namespace or in none."""
    wrong, seen = [], set()
    for item in objects:
        meta = item["metadata"]
        if not DNS_NAME.fullmatch(meta["name"]):
            wrong.append(f"{name_of(item)}: the name is no DNS name")
        wanted = None if item["kind"] in CLUSTER_WIDE else NAMESPACE
        if meta.get("namespace") != wanted:
            wrong.append(f"{name_of(item)}: found namespace {meta.get('namespace')}, wanted {wanted}")
        if (item["kind"], meta["name"]) in seen:
            wrong.append(f"{name_of(item)}: is there twice")
        seen.add((item["kind"], meta["name"]))
    for pod in pods_of(objects):
        labels = [container["name"] for container in pod.containers]
        labels += [volume["name"] for volume in pod.spec.get("volumes", [])]
        ports = [port["name"] for c in pod.containers for port in c.get("ports", []) if "name" in port]
        wrong += [f"{pod.where}: {name} is no DNS label" for name in labels if not DNS_LABEL.fullmatch(name)]
        wrong += [f"{pod.where}: {name} is no port's name" for name in ports if not PORT_NAME.fullmatch(name)]
        wrong += [f"{pod.where}: {port} is no port" for port in pod.ports.values() if not 0 < port < 65536]
        wrong += [f"{pod.where}: {name} is there twice" for name in set(labels) if labels.count(name) > 1 and name]
    return wrong


def size(quantity: Any) -> float | None:
    """A quantity as a number; None where it is none."""
    found = QUANTITY.fullmatch(str(quantity))
    return float(found[1]) * SIZES[found[2] or ""] if found else None


def quantities(objects: list[Object]) -> list[str]:
    """Quantities can be read, GPUs are whole, nobody asks for more than the limit, everybody has a memory limit."""
    wrong = []
    claims = [(name_of(c), c["spec"]) for c in of_kind(objects, "PersistentVolumeClaim")]
    claims += [
        (name_of(s), c["spec"])
        for s in of_kind(objects, "StatefulSet")
        for c in s["spec"].get("volumeClaimTemplates", [])
    ]
    asked = [(where, spec["resources"]) for where, spec in claims]
    for pod in pods_of(objects):
        for container in pod.containers:
            resources = container.get("resources", {})
            asked.append((f"{pod.where}, {container['name']}", resources))
            if "memory" not in resources.get("limits", {}) or "cpu" not in resources.get("requests", {}):
                wrong.append(f"{pod.where}, {container['name']}: found no memory limit or no CPU request")
        for volume in pod.spec.get("volumes", []):
            if "emptyDir" in volume and size(volume["emptyDir"].get("sizeLimit")) is None:
                wrong.append(f"{pod.where}: volume {volume['name']} has no legal sizeLimit")
    for where, resources in asked:
        requests, limits = resources.get("requests", {}), resources.get("limits", {})
        for kind, quantity in [*requests.items(), *limits.items()]:
            value = size(quantity)
            if value is None:
                wrong.append(f"{where}: {kind} {quantity} is no quantity")
            elif "/" in kind and not value.is_integer():
                wrong.append(f"{where}: {kind} {quantity} is not whole")
        for kind in requests.keys() & limits.keys():
            if (size(requests[kind]) or 0) > (size(limits[kind]) or 0):
                wrong.append(f"{where}: requests more {kind} than its limit")
            if "/" in kind and requests[kind] != limits[kind]:
                wrong.append(f"{where}: {kind} must be the same in requests and limits")
    return wrong


def matches(selector: Object | None, labels: dict[str, str]) -> bool:
    """Whether a label selector takes something with these labels."""
    selector = selector or {}
    for term in selector.get("matchExpressions", []):
        value, operator = labels.get(term["key"]), term["operator"]
        values = term.get("values", [])
        if not {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[operator]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def is_foreign(selector: Object) -> bool:
    """Whether it is for pods that others make."""
    keys = {term["key"] for term in selector.get("matchExpressions", [])} | selector.get("matchLabels", {}).keys()
    return bool(keys & FOREIGN_LABELS)


def selectors(objects: list[Object]) -> list[str]:
    """Whoever selects, selects what it is meant to: its own pods, some pod, one workload's alone."""
    wrong, pods = [], list(pods_of(objects))
    for item in of_kind(objects, "Deployment", "StatefulSet", "DaemonSet"):
        where, spec = name_of(item), item["spec"]
        taken = [pod.where for pod in pods if matches(spec["selector"], pod.labels)]
        if taken != [where]:
            wrong.append(f"{where}: its selector takes the pods of {taken or 'nobody'}, wanted its own alone")
        for spread in spec["template"]["spec"].get("topologySpreadConstraints", []):
            if not matches(spread["labelSelector"], spec["template"]["metadata"]["labels"]):
                wrong.append(f"{where}: spreads pods that are not its own")
    for item in of_kind(objects, "Service"):
        found = [pod for pod in pods if matches({"matchLabels": item["spec"].get("selector", {})}, pod.labels)]
        if len(found) != 1:
            wrong.append(f"{name_of(item)}: selects the pods of {[p.where for p in found]}, wanted one workload's")
    for item in of_kind(objects, "PodDisruptionBudget"):
        found = [pod for pod in pods if matches(item["spec"]["selector"], pod.labels)]
        if len(found) != 1:
            wrong.append(f"{name_of(item)}: selects the pods of {[p.where for p in found]}, wanted one workload's")
    for item in of_kind(objects, "ServiceMonitor"):
        services = of_kind(objects, "Service")
        if not any(matches(item["spec"]["selector"], s["metadata"].get("labels", {})) for s in services):
            wrong.append(f"{name_of(item)}: selects no Service")
    for item in of_kind(objects, "NetworkPolicy"):
        own = item["spec"]["podSelector"]
        peers = [
            peer["podSelector"]
            for way, end in (("ingress", "from"), ("egress", "to"))
            for rule in item["spec"].get(way, [])
            for peer in rule.get(end, [])
            if "podSelector" in peer
        ]
        for selector in (own, *peers):
            if not is_foreign(selector) and not any(matches(selector, pod.labels) for pod in pods):
                wrong.append(f"{name_of(item)}: {selector} selects no pod")
    return wrong


def isolation(objects: list[Object]) -> list[str]:
    """The namespace denies by default and holds pods to `restricted`; whoever uses the store may reach it."""
    wrong = []
    policies = of_kind(objects, "NetworkPolicy")
    denies = [p for p in policies if p["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}]
    if not denies:
        wrong.append("NetworkPolicy: found none that denies everything by default")
    for space in of_kind(objects, "Namespace"):
        if space["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
            wrong.append(f"{name_of(space)}: does not enforce Pod Security restricted")
    ways = [p["spec"]["podSelector"] for p in policies if p["metadata"]["name"] == "store"]
    for pod in pods_of(objects):
        uses = any("secretRef" in source for c in pod.containers for source in c.get("envFrom", []))
        if uses and not any(matches(way, pod.labels) for way in ways):
            wrong.append(f"{pod.where}: uses the object store and may not reach it")
    return wrong


def ports(objects: list[Object]) -> list[str]:
    """Probes, Services, scrapers and policies name ports that are there."""
    wrong, pods, services = [], list(pods_of(objects)), of_kind(objects, "Service")
    for pod in pods:
        for container in pod.containers:
            own = Pod(pod.where, {}, {"containers": [container]}, False).ports
            for probe in probes_of(container).values():
                port = probe.get("httpGet", probe.get("tcpSocket", probe.get("grpc", {}))).get("port")
                if port is not None and port not in own:
                    wrong.append(f"{pod.where}, {container['name']}: a probe asks port {port}, which it has not")
    for service in services:
        for pod in (p for p in pods if matches({"matchLabels": service["spec"].get("selector", {})}, p.labels)):
            for port in service["spec"]["ports"]:
                target = port.get("targetPort", port["port"])
                if target not in pod.ports:
                    wrong.append(f"{name_of(service)}: leads to port {target}, which {pod.where} has not")
    for monitor in of_kind(objects, "ServiceMonitor"):
        for service in services:
            if matches(monitor["spec"]["selector"], service["metadata"].get("labels", {})):
                there = {port.get("name") for port in service["spec"]["ports"]}
                for end in monitor["spec"]["endpoints"]:
                    if end["port"] not in there:
                        wrong.append(f"{name_of(monitor)}: {name_of(service)} has no port {end['port']}")
        for end in monitor["spec"]["endpoints"]:
            if end.get("path", "/metrics") not in paths():
                wrong.append(f"{name_of(monitor)}: asks {end['path']}, which the server has not")
    for policy in of_kind(objects, "NetworkPolicy"):
        spec = policy["spec"]
        for rule in spec.get("ingress", []):
            wrong += unknown_ports(policy, rule, [p for p in pods if matches(spec["podSelector"], p.labels)])
        for rule in spec.get("egress", []):
            for peer in rule.get("to", []):
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    wrong += unknown_ports(policy, rule, [p for p in pods if matches(peer["podSelector"], p.labels)])
    return wrong


def unknown_ports(policy: Object, rule: Object, pods: list[Pod]) -> list[str]:
    """Ports by name that none of the pods has."""
    asked = [port["port"] for port in rule.get("ports", []) if isinstance(port.get("port"), str)]
    return [f"{name_of(policy)}: no pod has port {p}" for p in asked if not any(p in pod.ports for pod in pods)]


def probes_of(container: Object) -> dict[str, Object]:
    """A container's probes by kind."""
    return {kind: container[kind] for kind in ("startupProbe", "readinessProbe", "livenessProbe") if kind in container}


def probes(objects: list[Object]) -> list[str]:
    """What is asked has all three probes; they ask routes that our server has."""
    routes = {"/health/live", "/health/ready"} & paths() | {path for path in paths() if path.startswith("/v2/health/")}
    wrong = []
    for pod in (pod for pod in pods_of(objects) if pod.serves):
        for container in pod.containers:
            found = probes_of(container)
            if container.get("ports") and len(found) != 3:
                wrong.append(f"{pod.where}, {container['name']}: found {sorted(found)}, wanted all three probes")
            for kind, probe in found.items():
                path = probe.get("httpGet", {}).get("path")
                if "sonorant-serve" in container["image"] and path not in routes:
                    wrong.append(f"{pod.where}, {container['name']}: {kind} asks {path}, which the server has not")
    return wrong


@cache
def paths() -> frozenset[str]:
    """Routes of the server that an operator asks."""
    return frozenset(
        getattr(route, "path", "") for routes in (operation_routes, protocol_routes) for route in routes.routes
    )


def references(objects: list[Object]) -> list[str]:
    """Whatever is named is rendered too, or is external for a stated reason."""
    there = {(item["kind"], item["metadata"]["name"]): item for item in objects}
    wrong: list[str] = []

    def need(where: str, kind: str, name: str, key: str | None = None) -> None:
        item = there.get((kind, name))
        if item is None and (kind, name) not in EXTERNAL:
            wrong.append(f"{where}: there is no {kind} {name}")
        held = (item or {}).get("data", {}) | (item or {}).get("stringData", {})
        if item is not None and key is not None and key not in held:
            wrong.append(f"{where}: {kind} {name} has no {key}")

    for pod in pods_of(objects):
        spec = pod.spec
        if spec.get("serviceAccountName"):
            need(pod.where, "ServiceAccount", spec["serviceAccountName"])
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        for item in of_kind(objects, "StatefulSet"):
            if name_of(item) == pod.where:
                volumes |= {claim["metadata"]["name"] for claim in item["spec"].get("volumeClaimTemplates", [])}
        for volume in spec.get("volumes", []):
            if "secret" in volume:
                need(pod.where, "Secret", volume["secret"]["secretName"])
            if "configMap" in volume:
                need(pod.where, "ConfigMap", volume["configMap"]["name"])
            if "persistentVolumeClaim" in volume:
                need(pod.where, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
        for container in pod.containers:
            where = f"{pod.where}, {container['name']}"
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    wrong.append(f"{where}: there is no volume {mount['name']}")
            for source in container.get("envFrom", []):
                for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                    if field in source:
                        need(where, kind, source[field]["name"])
            for variable in container.get("env", []):
                source = variable.get("valueFrom", {})
                for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                    if field in source:
                        need(where, kind, source[field]["name"], source[field]["key"])
                of = source.get("resourceFieldRef", {}).get("containerName", container["name"])
                if of not in {c["name"] for c in pod.containers}:
                    wrong.append(f"{where}: there is no container {of}")
    for item in of_kind(objects, "HorizontalPodAutoscaler"):
        target = item["spec"]["scaleTargetRef"]
        need(name_of(item), target["kind"], target["name"])
        scaled = there.get((target["kind"], target["name"]))
        if scaled and "replicas" in scaled["spec"]:
            wrong.append(f"{name_of(item)}: {name_of(scaled)} says replicas too, and each apply would undo the scaling")
        for metric in (m["containerResource"] for m in item["spec"]["metrics"] if m["type"] == "ContainerResource"):
            if scaled and metric["container"] not in {
                c["name"] for c in scaled["spec"]["template"]["spec"]["containers"]
            }:
                wrong.append(f"{name_of(item)}: there is no container {metric['container']}")
    for item in of_kind(objects, "StatefulSet"):
        need(name_of(item), "Service", item["spec"]["serviceName"])
    for item in of_kind(objects, "RoleBinding", "ClusterRoleBinding"):
        need(name_of(item), item["roleRef"]["kind"], item["roleRef"]["name"])
        for subject in item["subjects"]:
            need(name_of(item), subject["kind"], subject["name"])
    for item in of_kind(objects, "InferenceService"):
        if runtime := item["spec"]["predictor"]["model"].get("runtime"):
            need(name_of(item), "ClusterServingRuntime", runtime)
    return wrong


def images(objects: list[Object]) -> list[str]:
    """Every image names a version."""
    wrong = []
    for pod in pods_of(objects):
        for container in pod.containers:
            image = container["image"]
            tag = image.rpartition("/")[2].partition(":")[2]
            if "@" not in image and tag in ("", "latest"):
                wrong.append(f"{pod.where}, {container['name']}: found image {image}, wanted a version")
    return wrong


def digests(objects: list[Object]) -> list[str]:
    """Every image is named by its digest: in production a tag may come to mean something else."""
    return [
        f"{pod.where}, {container['name']}: found image {container['image']}, wanted …@sha256:DIGEST"
        for pod in pods_of(objects)
        for container in pod.containers
        if not DIGEST.fullmatch(container["image"])
    ]


def restricted(objects: list[Object]) -> list[str]:
    """Pods keep to Pod Security `restricted`, have a read-only root, and no token that they do not use."""
    wrong = []
    for pod in pods_of(objects):
        spec, own = pod.spec, pod.spec.get("securityContext", {})
        if any(spec.get(field) for field in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace")):
            wrong.append(f"{pod.where}: shares the host's or its containers' namespaces")
        if spec.get("automountServiceAccountToken") is not False:
            wrong.append(f"{pod.where}: mounts a token of its account")
        allowed = {
            "configMap",
            "csi",
            "downwardAPI",
            "emptyDir",
            "ephemeral",
            "persistentVolumeClaim",
            "projected",
            "secret",
        }
        for volume in spec.get("volumes", []):
            if kinds := volume.keys() - {"name"} - allowed:
                wrong.append(f"{pod.where}: volume {volume['name']} is of kind {sorted(kinds)}")
        for container in pod.containers:
            context = own | container.get("securityContext", {})
            faults = {
                "is privileged": context.get("privileged"),
                "may escalate": context.get("allowPrivilegeEscalation") is not False,
                "may be root": context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0,
                "keeps capabilities": context.get("capabilities", {}) != {"drop": ["ALL"]},
                "has no seccomp profile": context.get("seccompProfile", {}).get("type") != "RuntimeDefault",
                "may write to its root": context.get("readOnlyRootFilesystem") is not True,
                "has a port of the host": any("hostPort" in port for port in container.get("ports", [])),
                "changes /proc": context.get("procMount", "Default") != "Default",
            }
            wrong += [f"{pod.where}, {container['name']}: {fault}" for fault, is_so in faults.items() if is_so]
    return wrong


def settings(objects: list[Object]) -> list[str]:
    """Variables of the server are such that it knows, with values that it takes; and it may drain in peace."""
    wrong = []
    for pod in pods_of(objects):
        for container in pod.containers:
            where = f"{pod.where}, {container['name']}"
            given = [variable["name"] for variable in container.get("env", [])]
            wrong += [f"{where}: {name} is there twice" for name in set(given) if given.count(name) > 1]
            values = {
                v["name"].removeprefix("SONORANT_SERVE_").lower(): v.get("value", "1")
                for v in container.get("env", [])
                if v["name"].startswith("SONORANT_SERVE_")
            }
            if not values:
                continue
            try:
                read = Settings(**{**values, "model": values.get("model", "").replace("{{.Name}}", "name")})
            except ValidationError as error:
                wrong.append(f"{where}: {' '.join(str(error).split())}")
                continue
            pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            needed, given_seconds = pause + read.drain_seconds + 1, pod.spec.get("terminationGracePeriodSeconds", 30)
            if not pause or given_seconds <= needed:
                wrong.append(f"{where}: found a grace of {given_seconds} s, wanted a pause and more than {needed:g} s")
    return wrong


CHECKS: tuple[Check, ...] = (
    schemas,
    names,
    quantities,
    selectors,
    isolation,
    ports,
    probes,
    references,
    images,
    restricted,
    settings,
)
