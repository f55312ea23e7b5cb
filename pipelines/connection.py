"""A Kubeflow Pipelines host, asked in bounded time and with errors on one line."""

import json
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import kfp
import kfp_server_api
import urllib3


@contextmanager
def connected(
    host: str, *, wanted: str, advice: str, namespace: str | None = None, token: str | None = None, seconds: float = 60
) -> Iterator[kfp.Client]:
    """A client of the host for the block, which must be done within `seconds`.

    Raises ValueError where the host cannot be reached, refuses, or has not answered by then; `wanted` and `advice` say
    what the block is after and what may help.
    """
    with deadline(seconds, host, wanted):
        check_host(host, token)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            client = kfp.Client(host, existing_token=token, namespace=namespace or "kubeflow")
        try:
            yield client
        except kfp_server_api.ApiException as error:
            raise ValueError(
                f"{host}: found HTTP {error.status} ({describe_refusal(error)}), wanted {wanted}: {advice}"
            ) from None
        except urllib3.exceptions.HTTPError as error:
            raise ValueError(f"{host}: found {flatten(error)}, wanted {wanted}: try again") from None


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
def deadline(seconds: float, host: str, wanted: str) -> Iterator[None]:
    """Raise ValueError inside the block after so many seconds: kfp sets no time limit on its requests."""

    def give_up(*_: object) -> None:
        raise ValueError(f"--host {host}: found no answer in {seconds:g} s, wanted {wanted}: see to the host")

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
