"""Starting a run on a Kubeflow Pipelines host, in bounded time and with errors on one line."""

import json
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api
import urllib3


def submit_run(
    package: Path,
    parameters: dict[str, Any],
    *,
    host: str,
    experiment: str,
    name: str | None = None,
    namespace: str | None = None,
    token: str | None = None,
    seconds: int = 60,
) -> str:
    """Start a run of a compiled pipeline in an experiment, made if need be; the run's id.

    Raises ValueError where the host cannot be reached, refuses, or has not answered after `seconds`.
    """
    with deadline(seconds, host):
        check_host(host, token)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            client = kfp.Client(host, existing_token=token, namespace=namespace or "kubeflow")
        try:
            run = client.create_run_from_pipeline_package(
                str(package),
                arguments=parameters,
                run_name=name,
                experiment_name=experiment,
                namespace=namespace,
            )
        except kfp_server_api.ApiException as error:
            raise ValueError(
                f"{host}: found HTTP {error.status} ({describe_refusal(error)}), wanted a new run: "
                "check --experiment, --namespace and the token's rights"
            ) from None
        except urllib3.exceptions.HTTPError as error:
            raise ValueError(f"{host}: found {flatten(error)}, wanted a new run: submit again") from None
    return run.run_id


def check_host(host: str, token: str | None) -> None:
    """Refuse a host that does not answer as Kubeflow Pipelines; kfp's own client would try for ever."""
    if not host.startswith(("http://", "https://")):
        raise ValueError(f"--host: found {host!r}, wanted http://… or https://…: add the scheme")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = urllib3.PoolManager(retries=urllib3.Retry(0, redirect=False), timeout=10).request(
            "GET", f"{host.rstrip('/')}/apis/v2beta1/healthz", headers=headers, redirect=False
        )
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        raise ValueError(
            f"--host {host}: found {flatten(error)}, wanted a Kubeflow Pipelines API: "
            "check it (kubectl -n kubeflow port-forward svc/ml-pipeline-ui 8080:80 makes one here)"
        ) from None
    if answer.status in (301, 302, 303, 307, 308, 401, 403):
        raise ValueError(f"--host {host}: found HTTP {answer.status}, wanted to be let in: set KFP_TOKEN")
    if answer.status != 200 or not answer.headers.get("Content-Type", "").startswith("application/json"):
        raise ValueError(
            f"--host {host}: found HTTP {answer.status} {answer.headers.get('Content-Type', '')}, "
            "wanted a Kubeflow Pipelines API: check the address"
        )


@contextmanager
def deadline(seconds: int, host: str) -> Iterator[None]:
    """Raise ValueError inside the block after so many seconds: kfp sets no time limit on its requests."""

    def give_up(*_: object) -> None:
        raise ValueError(f"--host {host}: found no answer in {seconds} s, wanted a new run: see to the host")

    handler = signal.signal(signal.SIGALRM, give_up)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def describe_refusal(error: kfp_server_api.ApiException) -> str:
    """The server's own words, on one line."""
    try:
        message = json.loads(error.body)["message"]
    except (KeyError, TypeError, ValueError):
        message = error.reason
    return flatten(message)


def flatten(message: object) -> str:
    """A message on one line of at most 300 characters."""
    return " ".join(str(message).split())[:300]
