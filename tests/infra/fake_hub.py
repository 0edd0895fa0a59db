"""A model hub on this machine that speaks the real one's protocol, and can be told to misbehave."""

import asyncio
import hashlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

COMMIT = "c" * 40


class Hub:
    """Repositories and how they are served.

    Attributes:
        repos: content by file name, by `owner/name`.
        break_off: serve so many bytes of an answer, then end the connection, so many times.
        lie: what is added to the size that is published.
        spoil: serve other bytes than were published.
        ranges: whether `Range` is understood.
        busy: answer 503 so many times.
        asked: the `Range` headers that came, one a download.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        self.repos = repos
        self.break_off: list[int] = []
        self.lie = 0
        self.spoil = False
        self.ranges = True
        self.busy = 0
        self.asked: list[str | None] = []
        self.tokens: list[str | None] = []
        self.app = Starlette(
            routes=[
                Route("/api/models/{owner}/{name}", self._info),
                Route("/{owner}/{name}/resolve/{revision}/{file:path}", self._file),
            ]
        )

    async def _info(self, request: Request) -> Response:
        repo = f"{request.path_params['owner']}/{request.path_params['name']}"
        if repo not in self.repos:
            return JSONResponse({"error": "Repository not found"}, 404)
        siblings = []
        for name, data in self.repos[repo].items():
            size = len(data) + self.lie
            file = {"rfilename": name, "size": size, "blobId": _git_sha1(data)}
            if name.endswith((".gguf", ".safetensors")):
                file["lfs"] = {"size": size, "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
            siblings.append(file)
        return JSONResponse({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings})

    async def _file(self, request: Request) -> Response:
        asked = request.headers.get("range")
        self.asked.append(asked)
        self.tokens.append(request.headers.get("authorization"))
        if self.busy:
            self.busy -= 1
            return Response(status_code=503, headers={"Retry-After": "0"})
        data = self.repos[f"{request.path_params['owner']}/{request.path_params['name']}"][request.path_params["file"]]
        if self.spoil:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        headers = {"Content-Length": str(len(data) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        end = start + self.break_off.pop(0) if self.break_off else len(data)
        return StreamingResponse(
            _pieces(data[start:end], whole=end >= len(data)), 206 if start else 200, headers=headers
        )


async def _pieces(data: bytes, *, whole: bool) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 65536):
        yield data[at : at + 65536]
    if not whole:
        await asyncio.sleep(0.05)  # what was sent arrives; what is still in the server's hands goes down with the line
        raise ConnectionError("the line broke")


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
