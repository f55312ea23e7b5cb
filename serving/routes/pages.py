"""The page for people: `/` and the files it loads, from memory, under a policy that lets it reach this server alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serving.errors import ApiError, shorten

FOLDER = Path(__file__).resolve().parents[1] / "page"
MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "media-src blob:",
        "connect-src 'self'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
HEADERS = {
    "Cache-Control": "no-cache",  # kept, and asked after each time
    "Content-Security-Policy": POLICY,
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
}


@dataclass(frozen=True)
class File:
    """One file of the page. tag: names its content."""

    data: bytes
    media: str
    tag: str

    def answer(self, request: Request) -> Response:
        """It, or 304 where the client has it."""
        headers = {**HEADERS, "ETag": self.tag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.tag in known or known == ["*"]:
            return Response(status_code=304, headers=headers)
        return Response(self.data, headers=headers, media_type=self.media)


def read_files() -> dict[str, File]:
    """The files of the page by name."""
    files = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in MEDIA:
            data = path.read_bytes()
            files[path.name] = File(data, MEDIA[path.suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')
    return files


def make_routes() -> APIRouter:
    """The routes of the page as its files are now."""
    files = read_files()
    index = files.pop("index.html")
    routes = APIRouter(include_in_schema=False)

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return index.answer(request)

    @routes.api_route("/page/{file}", methods=["GET", "HEAD"])
    async def page_file(request: Request, file: str) -> Response:
        if file not in files:
            raise ApiError(404, "not_found", f"page: found no file {shorten(file)}, wanted one that / loads")
        return files[file].answer(request)

    return routes
