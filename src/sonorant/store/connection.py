"""The way to an S3 store: settings from the environment, a client with bounded patience, failures on one line.

The settings are the standard ones, so that DVC, boto and this module reach the same store: AWS_ENDPOINT_URL,
AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and AWS_CA_BUNDLE. SONORANT_STORE says where in
it: s3://BUCKET[/PREFIX]. SONORANT_STORE_RETRIES is how often a request that got no answer is sent again.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import ssl
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from minio import Minio
    from minio.error import S3Error
    from urllib3 import PoolManager

VARIABLE = "SONORANT_STORE"
RETRIES_VARIABLE = "SONORANT_STORE_RETRIES"
RETRIES = 7
"""With the waits below, an outage of about half a minute is ridden out."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0
CONNECT_SECONDS, READ_SECONDS = 5.0, 60.0
CONNECTIONS = 16
PASSING_STATUS = (429, 500, 502, 503, 504)
"""HTTP statuses by which a store says that the same request may do later."""
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True)
class Settings:
    """Where the store is, and with which key; the key's secret parts stay out of what is printed.

    prefix: "" or a path that ends with a slash; retries: of a request that got no answer.
    """

    endpoint: str
    region: str
    access_key: str
    secret_key: str = field(repr=False)
    bucket: str
    prefix: str = ""
    session_token: str | None = field(default=None, repr=False)
    ca_bundle: str | None = None
    retries: int = RETRIES

    @property
    def url(self) -> str:
        """The place as s3://BUCKET[/PREFIX]."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def read_settings(url: str | None = None, environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings of the store at `url`, else at $SONORANT_STORE; ValueError says what is missing or cannot be."""
    bucket, prefix = parse_url(url or environment.get(VARIABLE, ""))
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1"
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        if not environment.get(name):
            raise ValueError(f"${name}: found none, wanted the store's key: set it in the environment")
    return Settings(
        endpoint=check_endpoint(endpoint or f"https://s3.{region}.amazonaws.com"),
        region=region,
        access_key=environment["AWS_ACCESS_KEY_ID"],
        secret_key=environment["AWS_SECRET_ACCESS_KEY"],
        session_token=environment.get("AWS_SESSION_TOKEN") or None,
        ca_bundle=check_ca_bundle(environment.get("AWS_CA_BUNDLE") or None),
        bucket=bucket,
        prefix=prefix,
        retries=parse_retries(environment.get(RETRIES_VARIABLE, str(RETRIES))),
    )


def parse_url(url: str) -> tuple[str, str]:
    """Bucket and prefix of s3://BUCKET[/PREFIX]; the prefix is "" or ends with a slash."""
    wanted = "wanted s3://BUCKET[/PREFIX]"
    if not url:
        raise ValueError(f"store: found none, {wanted}: give --store or set ${VARIABLE}")
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not BUCKET.fullmatch(bucket):
        raise ValueError(f"store: found {url!r}, {wanted}, the bucket's name in lower case: correct it")
    parts = [part for part in prefix.split("/") if part]
    if any(part in (".", "..") or not part.isprintable() for part in parts):
        raise ValueError(f"store: found {url!r}, {wanted} without . and .. in it: correct it")
    return bucket, "".join(f"{part}/" for part in parts)


def check_endpoint(endpoint: str) -> str:
    """The endpoint without a slash at its end; ValueError where it is not http[s]://HOST[:PORT]."""
    try:
        parsed = urlsplit(endpoint)
        good = parsed.scheme in ("http", "https") and parsed.hostname and parsed.port != 0
    except ValueError:
        good = False
    if not good or parsed.path.strip("/") or parsed.query or parsed.fragment or "@" in parsed.netloc:
        raise ValueError(f"$AWS_ENDPOINT_URL: found {endpoint!r}, wanted http[s]://HOST[:PORT]: correct it")
    return f"{parsed.scheme}://{parsed.netloc}"


def check_ca_bundle(path: str | None) -> str | None:
    """The file; ValueError where it holds no certificates."""
    if path is not None:
        try:
            ssl.create_default_context(cafile=path)
        except OSError as error:  # ssl.SSLError is one
            reason = "no certificate" if isinstance(error, ssl.SSLError) else error.strerror
            raise ValueError(
                f"$AWS_CA_BUNDLE {path}: found {reason}, wanted a file of PEM certificates: correct it"
            ) from None
    return path


def parse_retries(text: str) -> int:
    """How often a request is sent again; ValueError where that is no number from 0 to 100."""
    if not text.isdecimal() or int(text) > 100:
        raise ValueError(f"${RETRIES_VARIABLE}: found {text!r}, wanted 0 to 100: correct it")
    return int(text)


def open_client(settings: Settings) -> Minio:
    """A client of the store whose every request waits, and is repeated, for a bounded time; nothing is sent yet."""
    from minio import Minio

    scheme, host = settings.endpoint.split("://")
    return Minio(
        host,
        access_key=settings.access_key,
        secret_key=settings.secret_key,
        session_token=settings.session_token,
        secure=scheme == "https",
        region=settings.region,
        http_client=open_pool(settings),
    )


def open_pool(settings: Settings) -> PoolManager:
    """Connections whose requests are repeated with back-off where the store is away or overloaded."""
    import urllib3

    class PatientPool(urllib3.PoolManager):
        # No redirects: a signature holds for one host.
        def urlopen(  # type: ignore[override]  # urllib3 has overloads for keywords that minio does not use
            self, method: str, url: str, redirect: bool = False, **given: Any
        ) -> Any:
            for attempt in itertools.count():
                last = attempt == settings.retries
                try:
                    answer = super().urlopen(method, url, redirect=redirect, retries=False, **given)
                    if answer.headers.get("content-type", "").startswith("text/xml"):
                        # rclone's word for it; minio reads what went wrong from application/xml alone.
                        answer.headers["content-type"] = "application/xml"
                    if last or answer.status not in PASSING_STATUS:
                        return answer
                    answer.drain_conn()
                    answer.release_conn()
                    reason = f"HTTP {answer.status}"
                except urllib3.exceptions.HTTPError as error:
                    if last or not is_passing(error):
                        raise
                    reason = reason_of(error)
                wait_before(attempt, reason, settings)
            raise AssertionError("count() has no end")

    return PatientPool(
        maxsize=CONNECTIONS,
        timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
        cert_reqs="CERT_REQUIRED",
        **({"ca_certs": settings.ca_bundle} if settings.ca_bundle else {"ssl_context": ssl.create_default_context()}),
    )


def is_passing(error: Exception) -> bool:
    """Whether a request that failed so may do later: not where TLS itself was refused."""
    from urllib3.exceptions import SSLError

    return not isinstance(error, SSLError)


def wait_before(attempt: int, reason: str, settings: Settings) -> None:
    """Sleep before a request is sent again, twice as long each time, and say so on stderr.

    Chance keeps clients that failed together from coming back together.
    """
    seconds = random.uniform(0.5, 1) * min(LONGEST_WAIT, FIRST_WAIT * 2.0**attempt)
    times = f"{attempt + 1} of {settings.retries}"
    print(f"store {settings.endpoint}: {reason}; trying again ({times})", file=sys.stderr, flush=True)
    time.sleep(seconds)


def reason_of(error: BaseException) -> str:
    """What the network said, in a few words: the innermost error's."""
    import urllib3.exceptions as faults

    if isinstance(error, faults.NameResolutionError):
        return "no host of this name"
    if isinstance(error, faults.IncompleteRead):
        return "an answer that broke off"
    if isinstance(error, faults.TimeoutError) and not isinstance(error, faults.NewConnectionError):
        return "no answer within the time"
    inner: Any = error
    while deeper := inner.__cause__ or next((word for word in inner.args if isinstance(word, BaseException)), None):
        inner = deeper
    text = getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
    return " ".join(str(text).split())[:200]


# ------------------------------------------------------------------------------------------------- what is told


@contextmanager
def explained(settings: Settings, doing: str, resumes: str = "run the same command again") -> Iterator[None]:
    """What the store or the network refuses becomes a ValueError on one line.

    doing: what was tried, such as "push model"; resumes: what to do once the store is back.
    """
    import urllib3
    from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

    where = f"{doing}: {settings.url} at {settings.endpoint}"
    try:
        yield
    except S3Error as error:
        raise ValueError(f"{where}: {explain(error, settings, resumes)}") from error
    except (ServerError, InvalidResponseError) as error:
        status = getattr(error, "status_code", getattr(error, "_code", None))
        away = status in PASSING_STATUS
        advice = f"{resumes} when it is back" if away else "correct $AWS_ENDPOINT_URL"
        raise ValueError(f"{where}: found HTTP {status}, wanted an S3 store's answer: {advice}") from error
    except MinioException as error:
        raise ValueError(f"{where}: found {error}, wanted an S3 store's answer: correct the settings") from error
    except urllib3.exceptions.SSLError as error:
        raise ValueError(f"{where}: {explain_tls(error)}") from error
    except urllib3.exceptions.HTTPError as error:
        reason, plain = reason_of(error), settings.endpoint.startswith("http://")
        hint = " (https:// where the store has TLS)" if plain and "closed connection" in reason else ""
        raise ValueError(
            f"{where}: found {reason}, wanted a store that answers: "
            f"check $AWS_ENDPOINT_URL{hint} and the network, then {resumes}"
        ) from error


def explain_tls(error: Exception) -> str:
    """What to do where no TLS connection came about."""
    reason = reason_of(error)
    if "certificate verify failed" in reason:
        return f"found a certificate that is not trusted ({reason}), wanted one: set $AWS_CA_BUNDLE to its issuer's"
    return f"found no TLS ({reason}), wanted https as $AWS_ENDPOINT_URL says: write http:// there if the store has none"


def explain(error: S3Error, settings: Settings, resumes: str) -> str:
    """What a store's refusal means and what to do, by its code: Ceph, MinIO, AWS and rclone use the same ones."""
    code, key = str(error.code), settings.access_key
    said = f"found {code}"
    if error.message and error.message != code:
        said += f" ({' '.join(str(error.message).split())[:200]})"
    wanted = {
        "SignatureDoesNotMatch": "wanted the secret that belongs to the key: correct $AWS_SECRET_ACCESS_KEY",
        "InvalidAccessKeyId": f"wanted a key the store knows, not {key}: correct $AWS_ACCESS_KEY_ID",
        "InvalidClientTokenId": f"wanted a key the store knows, not {key}: correct $AWS_ACCESS_KEY_ID",
        "ExpiredToken": "wanted credentials that are still valid: get new ones, $AWS_SESSION_TOKEN too",
        "ExpiredTokenException": "wanted credentials that are still valid: get new ones, $AWS_SESSION_TOKEN too",
        "TokenRefreshRequired": "wanted credentials that are still valid: get new ones, $AWS_SESSION_TOKEN too",
        "InvalidToken": "wanted the session's token: correct $AWS_SESSION_TOKEN, or unset it",
        "RequestTimeTooSkewed": "wanted a clock within 15 minutes of the store's: set this machine's clock",
        "AccessDenied": f"wanted rights to do this with the key {key}: have its policy changed, or use another key",
        "NoSuchBucket": f"wanted the bucket {settings.bucket}: create it or correct ${VARIABLE}",
        "AuthorizationHeaderMalformed": f"wanted the bucket's region, not {settings.region}: correct $AWS_REGION",
        "InvalidRegion": f"wanted the bucket's region, not {settings.region}: correct $AWS_REGION",
        "PermanentRedirect": f"wanted the bucket's region, not {settings.region}: correct $AWS_REGION",
        "QuotaExceeded": f"wanted space: remove something or raise the quota, then {resumes}",
        "XMinioStorageFull": f"wanted space: remove something or add disks, then {resumes}",
        "XMinioAdminBucketQuotaExceeded": f"wanted space: remove something or raise the quota, then {resumes}",
        "EntityTooLarge": f"wanted space: remove something or raise the quota, then {resumes}",
    }
    if code in wanted:
        return f"{said}, {wanted[code]}"
    if code in ("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "BadGateway"):
        return f"{said}, wanted a store that answers: {resumes} when it does"
    return f"{said} for {error.resource or 'this request'}, wanted it done: see the store's log"
