"""Prompt versions that ClickHouse has and the log has not: the broker was made anew, and history goes back further."""

from collections.abc import Collection, Iterable

import structlog

from processors.store.queries import Queries
from schemas.prompts import PromptError, PromptVersion
from schemas.records import PromptRecord
from streams.prompts import Known, Prompts

log = structlog.get_logger(__name__)

_COMMENT = "judged windows before the log was made anew: taken from ClickHouse for a replay"

_VERSIONS = """
    SELECT digest, name, template, output_schema, parameters, toUnixTimestamp64Milli(created_at) AS created_at
    FROM prompts FINAL
    WHERE kind = 'version' AND digest NOT IN {known:Array(String)}
    AND digest IN (SELECT prompt_digest FROM risk_events WHERE run = 'live')
    ORDER BY prompts.created_at LIMIT 1 BY digest
"""


async def versions(store: Queries, known: Collection[str]) -> dict[str, Known]:
    """The versions that live events were judged with and that are not among the known, by digest.

    One that is not what its digest says is no version.

    Raises:
        UnavailableError: ClickHouse is away.
    """
    found: dict[str, Known] = {}
    for row in await store.rows(_VERSIONS, known=list(known)):
        try:
            version = PromptVersion.from_record(PromptRecord(kind="version", scope="", comment="", **row))
        except PromptError as error:
            log.warning("prompt version of ClickHouse not used", digest=row["digest"], why=str(error))
        else:
            found[version.digest] = Known(version, row["created_at"], _COMMENT)
    return found


async def put_back(prompts: Prompts, forgotten: Iterable[Known]) -> None:
    """Put them on the log, where whoever judges with them looks them up; those that are there by now stay.

    Each keeps the time at which it was made: of two versions of one name the newer one goes by it, as before.

    Raises:
        FencedError, UncertainError: as `ControlTable.append`.
    """
    for known in forgotten:
        record = known.version.to_record(known.created_at or 0, known.comment)
        await prompts.table.append(record, only_new=True)
