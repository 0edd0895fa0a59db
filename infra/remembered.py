"""Prompt versions that ClickHouse has and the log has not: the broker was made anew, and history goes back further."""

from collections.abc import Collection, Iterable

import structlog

from processors.store.queries import Queries
from schemas.prompts import PromptError, PromptVersion
from schemas.records import PromptRecord
from streams.prompts import Prompts

log = structlog.get_logger(__name__)

_VERSIONS = """
    SELECT digest, name, template, output_schema, parameters FROM prompts FINAL
    WHERE kind = 'version' AND digest NOT IN {known:Array(String)}
    AND digest IN (SELECT prompt_digest FROM risk_events WHERE run = 'live')
    ORDER BY created_at LIMIT 1 BY digest
"""


async def versions(store: Queries, known: Collection[str]) -> dict[str, PromptVersion]:
    """The versions that live events were judged with and that are not among the known, by digest.

    One that is not what its digest says is no version.

    Raises:
        UnavailableError: ClickHouse is away.
    """
    found: dict[str, PromptVersion] = {}
    for row in await store.rows(_VERSIONS, known=list(known)):
        try:
            version = PromptVersion.from_record(PromptRecord(kind="version", scope="", comment="", created_at=0, **row))
        except PromptError as error:
            log.warning("prompt version of ClickHouse not used", digest=row["digest"], why=str(error))
        else:
            found[version.digest] = version
    return found


async def put_back(prompts: Prompts, forgotten: Iterable[PromptVersion]) -> None:
    """Put them on the log, where whoever judges with them looks them up. None becomes active by it.

    Raises:
        FencedError, UncertainError: as `Prompts.add`.
    """
    for version in forgotten:
        await prompts.add(version, "judged windows before the log was made anew: taken from ClickHouse for a replay")
