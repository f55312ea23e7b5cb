"""A folder in the store: files go in whole, and come out by ranges."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sonorant.store.connection import explained, open_client, read_settings, reason_of, wait_before

DIGEST = "sha256"
"""The name under which the store keeps a file's SHA-256 beside it."""


class Place:
    """What lies below one name in the store; `url` is its s3:// address."""

    def __init__(self, url: str | None, below: str = "") -> None:
        """`url` is that of the store, $SONORANT_STORE where it is None; `below` a path in it."""
        settings = read_settings(url)
        self.url = f"{settings.url}/{below}".rstrip("/")
        self._settings, self._client = read_settings(self.url), open_client(settings)

    def upload(self, path: Path, name: str) -> bool:
        """Bring a file here under that name; False where it was here already.

        Raises ValueError where the store refuses or does not answer. The store holds what is sent to its checksum.
        """
        from minio.error import S3Error

        settings, key = self._settings, self._settings.prefix + name
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with explained(settings, f"write {name}"):
            try:
                found = self._client.stat_object(settings.bucket, key)
                if found.size == path.stat().st_size and (found.metadata or {}).get(f"x-amz-meta-{DIGEST}") == digest:
                    return False
            except S3Error as error:
                if error.code not in ("NoSuchKey", "NoSuchObject"):
                    raise
            self._client.fput_object(settings.bucket, key, str(path), metadata={DIGEST: digest})
        return True

    def read(self, name: str, first: int, size: int) -> bytes:
        """So many bytes of a file from its byte `first` on.

        Raises ValueError where it is not there, or the store does not answer for longer than it is waited for.
        """
        from urllib3.exceptions import HTTPError

        settings = self._settings
        with explained(settings, f"read {name}"):
            for attempt in range(settings.retries + 1):
                answer = self._client.get_object(settings.bucket, settings.prefix + name, first, size)
                try:
                    return answer.read()
                except HTTPError as error:
                    # The client repeats what got no answer, not an answer that broke off.
                    if attempt == settings.retries:
                        raise
                    reason = reason_of(error)
                finally:
                    answer.close()
                    answer.release_conn()
                wait_before(attempt, reason, settings)
        raise AssertionError("the last attempt returns or raises")
