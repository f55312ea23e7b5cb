"""The rollout: a model into the canary, tried out there, then into production."""

from kfp import dsl, kubernetes

from components import operations
from pipelines.placing import RUNS_CLAIM, RUNS_PATH, operate, with_client_key, with_store, with_webhook

NAME = "sonorant-serve-canary"
PRODUCTION = "model@production"
NO_LIMITS: dict[str, object] = {}
"""What a CanaryConfig then says."""
CANARY_URL, PRODUCTION_URL = (f"http://{name}.sonorant:8000" for name in ("sonorant-canary", "sonorant-serving"))
"""The Services of k8s/, from any namespace of the cluster."""


@dsl.pipeline(name=NAME, description="A model into the canary, tried out there, then into production.")
def serve_canary(
    candidate: str,
    store: str,
    speech: str,
    canary: str = CANARY_URL,
    production: str = PRODUCTION_URL,
    limits: dict = NO_LIMITS,
):
    """Stage, await, check, promote; whatever fails, production keeps or gets back what it had, and the canary too.

    candidate: model@sha256:DIGEST or model@ALIAS; speech: a folder that the pod sees, below /runs; limits: a
    CanaryConfig's values.
    """
    ending = operations.end_canary(store=store, pipeline=NAME, run=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    operate(ending, retries=0)
    with_store(ending)
    with_webhook(ending)
    with dsl.ExitHandler(ending):
        former = operations.resolve(store=store, reference=PRODUCTION)
        operate(former)
        with_store(former)
        staged = operations.stage(store=store, candidate=candidate).after(former)
        operate(staged, memory="8Gi")
        with_store(staged)
        digest = staged.outputs["Output"]
        shown = operations.await_model(limits=limits, url=canary, digest=digest)
        # Waiting twice for what did not come tells nothing new.
        operate(shown, minutes=24 * 60, retries=0)
        with_client_key(shown)
        checked = operations.check(
            limits=limits,
            speech=speech,
            model=staged.outputs["model"],
            canary=canary,
            production=production,
            incumbent=former.output,
        ).after(shown)
        # A fault that does not come again is a fault all the same.
        operate(checked, memory="8Gi", minutes=120, retries=0)
        with_client_key(checked)
        kubernetes.mount_pvc(checked, pvc_name=RUNS_CLAIM, mount_path=RUNS_PATH)
        promoted = operations.promote(limits=limits, store=store, digest=digest, url=production).after(checked)
        operate(promoted, minutes=24 * 60, retries=0)
        with_store(promoted)
        with_client_key(promoted)
