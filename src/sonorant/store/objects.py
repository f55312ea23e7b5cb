"""Objects of a store: whole files in by resumable multipart uploads, out by resumable, verified range reads."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sonorant.store.connection import Settings, open_client, reason_of, wait_before

if TYPE_CHECKING:
    from minio.datatypes import Part
    from urllib3 import BaseHTTPResponse

PART_BYTES = 16 * 2**20
MOST_PARTS = 10_000
CHUNK_BYTES = 2**20
Count = Callable[[int], None]
"""Called with the number of bytes that are done now and were not before."""


@dataclass(frozen=True)
class Found:
    """An object in a listing: its name below the store's prefix, and when the store took it in."""

    name: str
    at: datetime | None


class Objects:
    """The objects of the store below its prefix; errors are those of minio and urllib3, see `explained`."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.client = settings, open_client(settings)

    def url(self, name: str) -> str:
        """Where the object is, as s3://BUCKET/KEY."""
        return f"s3://{self.settings.bucket}/{self._key(name)}"

    def _key(self, name: str) -> str:
        return self.settings.prefix + name

    def size(self, name: str) -> int | None:
        """How many bytes the object has; None where there is none."""
        from minio.error import S3Error

        try:
            return self.client.stat_object(self.settings.bucket, self._key(name)).size
        except S3Error as error:
            if error.code == "NoSuchKey":
                return None
            # The answer to HEAD has no body, and so no reason: GET's has.
            self.client.get_object(self.settings.bucket, self._key(name), 0, 1).close()
            raise

    def names(self, prefix: str, whole: bool = True) -> Iterator[Found]:
        """Objects whose names begin so, in the names' order; not `whole`: only up to the next slash."""
        start = len(self.settings.prefix)
        for found in self.client.list_objects(self.settings.bucket, self._key(prefix), recursive=whole):
            if found.object_name:
                yield Found(found.object_name[start:], found.last_modified)

    def put(self, name: str, content: bytes) -> None:
        """Write a small object, in one request."""
        self.client._put_object(self.settings.bucket, self._key(name), content, {})

    def get(self, name: str, first: int = 0, size: int = 0) -> bytes | None:
        """The content of a small object, or `size` bytes of any from its byte `first` on; None where there is none."""
        from minio.error import S3Error
        from urllib3.exceptions import HTTPError

        for attempt in itertools.count():
            try:
                answer = self.client.get_object(self.settings.bucket, self._key(name), first, size)
            except S3Error as error:
                if error.code == "NoSuchKey":
                    return None
                raise
            try:
                return answer.read()
            except HTTPError as error:
                # The client repeats what got no answer, not an answer that broke off.
                if attempt == self.settings.retries:
                    raise
                reason = reason_of(error)
            finally:
                answer.close()
                answer.release_conn()
            wait_before(attempt, reason, self.settings)
        raise AssertionError("count() has no end")

    # ------------------------------------------------------------------------------------------------ files in

    def upload(self, name: str, path: Path, digest: str, count: Count) -> None:
        """Bring a file of that SHA-256 in; the parts of an earlier try that the store has are not sent again.

        Nothing is there before all of it is. Raises ValueError where the file is another by now.
        """
        from minio.error import S3Error

        if path.stat().st_size <= PART_BYTES:
            content = path.read_bytes()
            check_digest(path, hashlib.sha256(content).hexdigest(), digest)
            self.put(name, content)
            count(len(content))
            return
        try:
            self._upload_parts(name, path, digest, count)
        except S3Error as error:
            # Another push of the same file has completed this upload, or the store has thrown it away.
            if error.code != "NoSuchUpload":
                raise
            if self.size(name) != path.stat().st_size:
                self._upload_parts(name, path, digest, lambda _: None)

    def _upload_parts(self, name: str, path: Path, digest: str, count: Count) -> None:
        from minio.datatypes import Part

        bucket, key, size = self.settings.bucket, self._key(name), path.stat().st_size
        length = max(PART_BYTES, -(-size // MOST_PARTS))
        upload, there = self._find_upload(key)
        if upload is None:
            upload = self.client._create_multipart_upload(bucket, key, {})
        total, parts = hashlib.sha256(), []
        with path.open("rb") as file:
            for number in itertools.count(1):
                content = file.read(length)
                if not content:
                    break
                total.update(content)
                tag = hashlib.md5(content, usedforsecurity=False).hexdigest()
                part = there.get(number)
                if part is None or (part.etag, part.size) != (tag, len(content)):
                    tag = self.client._upload_part(bucket, key, content, {}, upload, number)
                parts.append(Part(number, tag))
                count(len(content))
        if total.hexdigest() != digest:
            self.client._abort_multipart_upload(bucket, key, upload)
        check_digest(path, total.hexdigest(), digest)
        self.client._complete_multipart_upload(bucket, key, upload, parts)

    def _find_upload(self, key: str) -> tuple[str | None, dict[int, Part]]:
        """An upload of the object that was begun and not completed, and its parts by number."""
        from minio.error import S3Error

        bucket = self.settings.bucket
        try:
            listed = self.client._list_multipart_uploads(bucket, prefix=key).uploads
        except S3Error as error:
            # So rclone says that there are none, and others that they cannot list them.
            if error.code not in ("NoSuchUpload", "NotImplemented"):
                raise
            listed = []
        begun = [upload for upload in listed if upload.object_name == key]
        if not begun or begun[0].upload_id is None:
            return None, {}
        upload, parts, marker = begun[0].upload_id, {}, None
        while True:
            page = self.client._list_parts(bucket, key, upload, part_number_marker=marker)
            parts.update({part.part_number: part for part in page.parts})
            if not page.is_truncated or not page.parts:
                return upload, parts
            marker = str(page.parts[-1].part_number)

    # ----------------------------------------------------------------------------------------------- files out

    def download(self, name: str, path: Path, size: int, digest: str, count: Count) -> None:
        """Fetch a file of so many bytes and that SHA-256; where `path` has its beginning already, only the rest.

        Raises ValueError where the object is missing or damaged; nothing is left at `path` then.
        """
        already = path.stat().st_size if path.is_file() else 0
        self._fill(name, path, size, count)
        if already and digest_file(path) != digest:
            # What lay here was not the beginning of this file.
            path.unlink()
            count(-size)
            self._fill(name, path, size, count)
        if digest_file(path) != digest:
            path.unlink()
            raise ValueError(
                f"{self.url(name)}: found bytes that are not those of its digest, wanted what was pushed: "
                "the object is damaged; remove it from the store and push the artifact again"
            )

    def _fill(self, name: str, path: Path, size: int, count: Count) -> None:
        """Append to the file at `path` until it has so many bytes."""
        from urllib3.exceptions import HTTPError

        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size > size:
            path.unlink()
        path.touch()
        have, attempt = path.stat().st_size, 0
        count(have)
        while have < size:
            before = have
            answer = self._answer_from(name, have, size)
            try:
                for chunk in answer.stream(CHUNK_BYTES):
                    with path.open("ab") as file:
                        file.write(chunk)
                    have += len(chunk)
                    count(len(chunk))
            except HTTPError as error:
                # The client repeats what got no answer, not an answer that broke off.
                attempt = 0 if have > before else attempt + 1
                if attempt > self.settings.retries or not self.settings.retries:
                    raise
                wait_before(attempt, reason_of(error), self.settings)
                continue
            finally:
                # Not released: what was not read to its end cannot be used for another request.
                answer.close()
            if have < size:
                path.unlink()
                raise ValueError(
                    f"{self.url(name)}: found {have} bytes, wanted {size}: "
                    "the object is damaged; push the artifact again"
                )

    def _answer_from(self, name: str, first: int, size: int) -> BaseHTTPResponse:
        """The object's bytes from the one on, up to so many in all."""
        from minio.error import S3Error

        try:
            return self.client.get_object(self.settings.bucket, self._key(name), first, size - first)
        except S3Error as error:
            if error.code in ("NoSuchKey", "InvalidRange"):
                raise ValueError(
                    f"{self.url(name)}: found {error.code}, wanted {size} bytes: "
                    "the object is missing or damaged; push the artifact again"
                ) from None
            raise


def digest_file(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(path: Path, found: str, wanted: str) -> None:
    """ValueError where a file is no longer the one that was looked at."""
    if found != wanted:
        raise ValueError(
            f"{path}: found it changed while it was sent, wanted it left alone: run the same command again"
        )
