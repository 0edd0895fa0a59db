"""A schema registry in memory, with the parts of Redpanda's HTTP API that are used, and its answers where it refuses.

After its sources (src/v/pandaproxy/schema_registry, 25.3 on): modes by subject and for all, ids and versions that only
import mode takes, no check of compatibility in it, one schema an id for ever, soft deletion.
"""

import base64
import json
import threading
from collections.abc import Callable
from typing import Any

import fastavro.schema
import uvicorn
from avro.compatibility import ReaderWriterCompatibilityChecker, SchemaCompatibilityType
from avro.schema import parse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from streams.serving import bind


class FakeRegistry:
    """What it holds, and switches for what it does wrong. Serves from a thread between `start` and `stop`."""

    def __init__(self) -> None:
        self.schemas: dict[int, str] = {}
        self.subjects: dict[str, dict[int, int]] = {}
        """By subject the id of each version."""
        self.deleted: set[tuple[str, int]] = set()
        self.modes: dict[str, str] = {}
        self.mode = "READWRITE"
        self.login = ""
        """`user:password`, where it asks for one."""
        self.imports = True
        self.wrong: Callable[[Request], Response | None] = lambda _: None
        """Answers in its place."""
        self.asked: list[tuple[str, str]] = []
        # Requests that come before the thread serves wait in the socket's queue.
        self._socket = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        routes = [
            Route("/mode", self._all, methods=["GET"]),
            Route("/mode/{subject}", self._own, methods=["GET", "PUT", "DELETE"]),
            Route("/subjects/{subject}/versions", self._versions, methods=["GET", "POST"]),
            Route("/subjects/{subject}/versions/{version:int}", self._version, methods=["GET"]),
            Route("/schemas/ids/{id:int}", self._schema, methods=["GET"]),
            Route("/compatibility/subjects/{subject}/versions/{version:int}", self._compatible, methods=["POST"]),
        ]
        self._app = Starlette(routes=[self._guarded(route) for route in routes])
        self._server = uvicorn.Server(uvicorn.Config(self._app, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))

    def start(self) -> "FakeRegistry":
        self._thread.start()
        return self

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def put(self, subject: str, schema: dict[str, Any], number: int) -> int:
        """A version that somebody else registered."""
        versions = self.subjects.setdefault(subject, {})
        version = max(versions, default=0) + 1
        versions[version] = number
        self.schemas[number] = json.dumps(schema)
        return version

    def _guarded(self, route: Route) -> Route:
        async def answer(request: Request) -> Response:
            self.asked.append((request.method, request.url.path))
            wrong = self.wrong(request)
            if wrong is not None:
                return wrong
            wanted = f"Basic {base64.b64encode(self.login.encode()).decode()}"
            if self.login and request.headers.get("authorization") != wanted:
                return _error(401, 40101, "Unauthorized")
            return await route.endpoint(request)

        return Route(route.path, answer, methods=list(route.methods or ()))

    async def _all(self, _: Request) -> Response:
        return JSONResponse({"mode": self.mode})

    async def _own(self, request: Request) -> Response:
        subject = request.path_params["subject"]
        if request.method == "PUT":
            mode = (await request.json())["mode"]
            if mode == "IMPORT" and not self.imports:
                return _error(422, 42204, f"Invalid mode. Valid values are READWRITE, READONLY; got {mode}")
            if mode == "IMPORT" and self.subjects.get(subject) and request.query_params.get("force") != "true":
                return _error(422, 42205, f"Cannot import since found existing subjects: {subject}")
            self.modes[subject] = mode
            return JSONResponse({"mode": mode})
        if subject not in self.modes:
            return _error(404, 40409, f"Subject '{subject}' does not have subject-level mode configured")
        mode = self.modes[subject]
        if request.method == "DELETE":
            del self.modes[subject]
        return JSONResponse({"mode": mode})

    async def _versions(self, request: Request) -> Response:
        subject = request.path_params["subject"]
        if request.method == "POST":
            return await self._register(subject, await request.json())
        seen = request.query_params.get("deleted") == "true"
        there = [v for v in self.subjects.get(subject, {}) if seen or (subject, v) not in self.deleted]
        return JSONResponse(sorted(there)) if there else _error(404, 40401, f"Subject '{subject}' not found.")

    async def _register(self, subject: str, body: dict[str, Any]) -> Response:
        mode = self.modes.get(subject, self.mode)
        if mode == "READONLY":
            return _error(422, 42205, f"Subject {subject} is in read-only mode")
        if "id" in body and mode != "IMPORT":
            return _error(422, 42205, f"Subject {subject} is not in import mode")
        fastavro.schema.parse_schema(json.loads(body["schema"]))
        number = body.get("id", len(self.schemas) + 1)
        if number in self.schemas and self.schemas[number] != body["schema"]:
            return _error(422, 42205, f"Overwrite new schema with id {number} is not permitted.")
        versions = self.subjects.setdefault(subject, {})
        if body.get("version") in versions and versions[body["version"]] != number:
            return _error(422, 42205, f"Version {body['version']} is taken")
        self.schemas[number] = body["schema"]
        versions[body.get("version") or max(versions, default=0) + 1] = number
        return JSONResponse({"id": number})

    async def _version(self, request: Request) -> Response:
        subject, version = request.path_params["subject"], request.path_params["version"]
        number = self.subjects[subject][version]
        return JSONResponse({"subject": subject, "version": version, "id": number, "schema": self.schemas[number]})

    async def _schema(self, request: Request) -> Response:
        number = request.path_params["id"]
        if number not in self.schemas:
            return _error(404, 40403, f"Schema {number} not found")
        return JSONResponse({"schema": self.schemas[number]})

    async def _compatible(self, request: Request) -> Response:
        there = self.schemas[self.subjects[request.path_params["subject"]][request.path_params["version"]]]
        asked = (await request.json())["schema"]
        # BACKWARD, its default: who reads by the new schema can read what was written by the old one.
        found = ReaderWriterCompatibilityChecker().get_compatibility(parse(asked), parse(there))
        return JSONResponse({"is_compatible": found.compatibility is SchemaCompatibilityType.compatible})


def _error(status: int, code: int, message: str) -> Response:
    return JSONResponse({"error_code": code, "message": message}, status)
