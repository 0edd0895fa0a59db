"""Telling a schema registry what our records are, so that other programs (`rpk`, Console, connectors) can read them.

We need none: our readers find the writer's schema in the tree. The frame of every record names its schema by an id
that follows from the schema itself (`codec.schema_id`), so a registry is not asked for ids but told them, in its import
mode: what was recorded before there was a registry can be read by it too, and its loss costs nothing. Every version
that was ever committed is told, under `<topic>-value`, the oldest first. The API is Confluent's, as Redpanda has it;
its import mode came with 25.3.
"""

import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import fastavro.schema
import httpx
import structlog

from schemas import avro_schemas
from streams.codec import schema_id
from streams.errors import UnavailableError, explain
from streams.kafka import KafkaSettings

log = structlog.get_logger(__name__)

# An answer comes in milliseconds; a registry that just starts reads its topic first.
_TIMEOUT_S = 10.0

_AWAITED = "schema registry"
"""What `migrate` waits on."""


class RegistryError(Exception):
    """The registry does not take our schemas, and waiting will not help; the message names the setting and the fix."""


class Told(NamedTuple):
    """What one subject has now."""

    subject: str
    registered: tuple[int, ...]
    """Ids that it was told now."""
    there: int
    """Versions of ours that it had before."""
    others: tuple[int, ...]
    """Versions in it that are not ours; this version's readers and theirs can read each other's records."""


class SchemaRegistry:
    """The registry of `kafka.schema_registry_url`; an async context manager.

    Raises:
        RegistryError: a user is set without a password, or the other way round.
        CredentialsError: a certificate of the settings cannot be used.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        self._url = settings.schema_registry_url.rstrip("/")
        user, password = settings.schema_registry_user, settings.schema_registry_password
        if (user is None) != (password is None):
            raise RegistryError(
                "kafka.schema_registry_user and kafka.schema_registry_password (by environment: "
                "REWATCH_KAFKA__SCHEMA_REGISTRY_PASSWORD) belong together: set both, or neither"
            )
        self._client = httpx.AsyncClient(
            base_url=self._url,
            auth=(user, password.get_secret_value()) if user is not None and password is not None else None,
            timeout=_TIMEOUT_S,
            trust_env=False,
            # The broker's authority vouches for its registry, too.
            verify=settings.tls() if settings.with_tls else True,
            headers={"Accept": "application/vnd.schemaregistry.v1+json"},
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def register(self) -> list[Told]:
        """Tell it every schema that it lacks. Safe to repeat, and to end at any instant.

        All subjects are looked at before the first is changed.

        Raises:
            RegistryError: a subject holds what does not go with ours, or may not be changed.
            UnavailableError: the registry is away (waiting on `schema registry`).
        """
        plans = [await self._look(topic) for topic in avro_schemas.topics()]
        if problems := [problem for plan in plans for problem in plan.problems]:
            raise RegistryError("\n".join(problems))
        return [await self._tell(plan) for plan in plans]

    async def _look(self, topic: str) -> "_Plan":
        """What a subject has, and what it lacks."""
        subject = f"{topic}-value"
        ours = {schema_id(fingerprint): text for fingerprint, text in avro_schemas.documents(topic).items()}
        current = ours[schema_id(avro_schemas.fingerprint(topic))]
        problems: list[str] = []
        there: set[int] = set()
        others: list[int] = []
        for version in await self._versions(subject):
            found = await self._ask("GET", f"{subject}/versions/{version}")
            if found["id"] not in ours:
                others.append(version)
                if not await self._compatible(subject, version, current):
                    problems.append(
                        f"{subject} in the schema registry (kafka.schema_registry_url) has version {version}, id "
                        f"{found['id']}, which does not go with the schema of {topic}: delete that version, upgrade "
                        "rewatch if a newer one put it there, or set another registry"
                    )
            elif _fingerprint(found["schema"]) != _fingerprint(ours[found["id"]]):
                problems.append(
                    f"{subject} in the schema registry (kafka.schema_registry_url) has another schema under our id "
                    f"{found['id']}: delete its version {version}, or set another registry"
                )
            else:
                there.add(found["id"])
        missing = {number: text for number, text in ours.items() if number not in there}
        mode = await self._mode(subject)
        if missing and mode == "READONLY":
            problems.append(
                f"{subject} is READONLY in the schema registry (kafka.schema_registry_url): set its mode to READWRITE, "
                "or register at the registry that this one is a copy of"
            )
        return _Plan(subject, missing, len(there), tuple(others), mode, tuple(problems))

    async def _tell(self, plan: "_Plan") -> Told:
        """Register what is missing, and leave the subject in the mode that it was in."""
        done: list[int] = []
        try:
            if plan.missing:
                await self._import(plan.subject)
                version = max(await self._versions(plan.subject, deleted=True), default=0)
                for number, text in plan.missing.items():
                    version += 1
                    body = {"schema": text, "schemaType": "AVRO", "id": number, "version": version}
                    answer = await self._ask("POST", f"{plan.subject}/versions", body)
                    if answer["id"] != number:
                        raise RegistryError(
                            f"the schema registry (kafka.schema_registry_url) gave {plan.subject} the id "
                            f"{answer['id']} where records have {number}: it must take ids, as Redpanda does since 25.3"
                        )
                    done.append(number)
        finally:
            # Also where one that was killed left it importing.
            if plan.missing or plan.mode == "IMPORT":
                await self._back(plan)
        if done:
            log.info("schemas registered", subject=plan.subject, ids=done)
        return Told(plan.subject, tuple(done), plan.there, plan.others)

    async def _versions(self, subject: str, *, deleted: bool = False) -> list[int]:
        asked = f"{subject}/versions" + ("?deleted=true" if deleted else "")
        return [int(version) for version in await self._ask("GET", asked, missing=[])]

    async def _compatible(self, subject: str, version: int, text: str) -> bool:
        answer = await self._send("POST", f"/compatibility/subjects/{quote(subject)}/versions/{version}", _schema(text))
        return bool(self._read(answer)["is_compatible"])

    async def _mode(self, subject: str) -> str:
        """The mode that holds for the subject; `IMPORT` only where it is the subject's own."""
        own = await self._send("GET", f"/mode/{quote(subject)}")
        if own.status_code != 404:
            return str(self._read(own)["mode"])
        of_all = str(self._read(await self._send("GET", "/mode"))["mode"])
        return "" if of_all in {"IMPORT", "READWRITE"} else of_all

    async def _import(self, subject: str) -> None:
        answer = await self._send("PUT", f"/mode/{quote(subject)}?force=true", {"mode": "IMPORT"})
        if answer.status_code == 422:
            raise RegistryError(
                "the schema registry (kafka.schema_registry_url) takes no ids, since it has no import mode: records "
                "have theirs already; use Redpanda 25.3 or newer, or leave kafka.schema_registry_url empty"
            )
        self._read(answer)

    async def _back(self, plan: "_Plan") -> None:
        path = f"/mode/{quote(plan.subject)}"
        if plan.mode in {"", "IMPORT"}:
            answer = await self._send("DELETE", path)
            if answer.status_code != 404:
                self._read(answer)
        else:
            self._read(await self._send("PUT", path, {"mode": plan.mode}))

    async def _ask(self, method: str, below: str, body: Mapping[str, Any] | None = None, missing: Any = None) -> Any:
        """An answer of `/subjects/...`; `missing` where there is no such subject."""
        answer = await self._send(method, f"/subjects/{below}", body)
        if answer.status_code == 404 and missing is not None:
            return missing
        return self._read(answer)

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            answer = await self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._away(explain(error)) from error
        if answer.status_code in {401, 403}:
            raise RegistryError(
                f"the schema registry at {self._url} refuses us (HTTP {answer.status_code}): set "
                "kafka.schema_registry_user and REWATCH_KAFKA__SCHEMA_REGISTRY_PASSWORD to those of a user that may "
                "register schemas"
            )
        if answer.status_code >= 500 or answer.status_code == 429:
            raise self._away(f"HTTP {answer.status_code}: {answer.text[:200]}")
        return answer

    def _read(self, answer: httpx.Response) -> Any:
        if answer.is_success:
            try:
                return answer.json()
            except ValueError as error:
                raise RegistryError(
                    f"{self._url} (kafka.schema_registry_url) is no schema registry: {answer.request.url.path} answers "
                    f"{answer.text[:80]!r}"
                ) from error
        raise RegistryError(
            f"the schema registry at {self._url} (kafka.schema_registry_url) answers {answer.request.method} "
            f"{answer.request.url.path} with HTTP {answer.status_code}: {answer.text[:300]}"
        )

    def _away(self, why: str) -> UnavailableError:
        return UnavailableError(
            _AWAITED, f"the schema registry at {self._url} does not answer (kafka.schema_registry_url): {why}"
        )


class _Plan(NamedTuple):
    """One subject, as it is and as it shall be."""

    subject: str
    missing: Mapping[int, str]
    """What it lacks, the oldest first: the schema by its id."""
    there: int
    others: tuple[int, ...]
    mode: str
    """Its own mode, or READONLY where that holds for all; empty where it has none of its own."""
    problems: tuple[str, ...]


def _schema(text: str) -> dict[str, str]:
    return {"schema": text, "schemaType": "AVRO"}


def _fingerprint(text: str) -> str:
    """What a schema means, whatever a registry did to its spelling."""
    canonical = fastavro.schema.to_parsing_canonical_form(fastavro.schema.parse_schema(json.loads(text)))
    return str(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))
