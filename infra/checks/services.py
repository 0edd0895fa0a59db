"""Checks of the services: broker and topics, ClickHouse and its tables, the clocks, the LLM server, the detector."""

import asyncio
import time
from contextlib import aclosing

import httpx
from aiokafka.errors import KafkaError

from infra.checks.check import PATIENCE_S, Check, Context, not_running
from infra.config import Settings
from processors.analyze.llm import OpenAiLlm
from processors.analyze.settings import LlmSettings
from processors.detect.settings import DetectorSettings
from processors.store.queries import Queries
from schemas.migrations import MigrationError
from streams.errors import UnavailableError, explain
from streams.kafka import Kafka
from streams.topics import TOPICS

# Ticks close windows 30 s after the last arrival: seconds of skew are noise there, and hours would never close one.
SKEW_MOST_S = 2.0


async def broker(context: Context) -> list[Check]:
    """Whether it answers, and has the topics that the settings ask for. Its clock does not matter to anything."""
    settings = context.settings
    if settings.local_kafka and "kafka" not in context.running:
        return [not_running("broker")]
    kafka = Kafka(settings.kafka)
    where = settings.kafka.bootstrap_servers
    try:
        async with asyncio.timeout(PATIENCE_S), kafka.admin() as admin:
            cluster = await admin.describe_cluster()
            names = [name for name in await admin.list_topics() if name in TOPICS]
            described = await admin.describe_topics(names) if names else []
    except (KafkaError, OSError, TimeoutError) as error:
        refusal = kafka.refused(error)
        if refusal is not None:
            return [Check("broker", "failed", f"{where} {refusal.what}", refusal.fix)]
        fix = "start the broker, or correct kafka.bootstrap_servers (and kafka.security_protocol, kafka.sasl_*)"
        return [Check("broker", "failed", f"{where}: {explain(error)}", fix)]
    brokers = len(cluster["brokers"])
    checks = [Check("broker", "ok", f"{where}, {brokers} broker{'s' * (brokers != 1)}")]
    if settings.kafka.replication_factor > brokers:
        found = f"{settings.kafka.replication_factor} replicas on {brokers} brokers"
        checks.append(Check("replication", "failed", found, f"set kafka.replication_factor to {brokers} or less"))
    counts = {topic["topic"]: len(topic["partitions"]) for topic in described}
    return [*checks, topics(settings, counts)]


def topics(settings: Settings, counts: dict[str, int]) -> Check:
    """Whether every topic is there with its partitions; `counts` is what the broker has."""
    if missing := sorted(set(TOPICS) - set(counts)):
        return Check("topics", "failed", f"missing: {', '.join(missing)}", "`rewatch migrate`")
    wrong = {
        name: count
        for name, count in counts.items()
        if count != (1 if TOPICS[name].single else settings.kafka.partitions)
    }
    if wrong:
        found = ", ".join(f"{name} has {count} partitions" for name, count in sorted(wrong.items()))
        there = {count for name, count in wrong.items() if not TOPICS[name].single}
        back = f" to {there.pop()}" if len(there) == 1 else " back"
        fix = f"set kafka.partitions{back} ({settings.kafka.partitions} now): it is fixed when a topic is made"
        return Check("topics", "failed", found, fix)
    return Check("topics", "ok", f"{len(counts)}, {settings.kafka.partitions} partitions")


async def clickhouse(context: Context) -> list[Check]:
    """Whether it answers, by which clock, and whether its tables are this version's."""
    settings = context.settings
    if settings.local_clickhouse and "clickhouse" not in context.running:
        return [not_running("clickhouse")]
    where = settings.clickhouse.url
    async with aclosing(Queries(settings.clickhouse)) as store:
        try:
            before = time.time()
            version, server_ms = await store.version_and_clock()
            after = time.time()
        except UnavailableError as error:
            fix = "start it, or correct clickhouse.url (and its user, password and database)"
            return [Check("clickhouse", "failed", str(error), fix)]
        checks = [Check("clickhouse", "ok", f"{where}, version {version}")]
        # The answer was made between the two readings: only what lies outside them is skew.
        checks.append(_clock(max(before - server_ms / 1000, server_ms / 1000 - after, 0.0)))
        try:
            pending = await store.pending_migrations()
        except MigrationError as error:
            fix = "run the version of rewatch that made it, or set clickhouse.database to another"
            return [*checks, Check("tables", "failed", str(error), fix)]
        if pending:
            return [*checks, Check("tables", "failed", f"not migrated: {', '.join(pending)}", "`rewatch migrate`")]
        checks.append(Check("tables", "ok", "as this version has them"))
        [row] = await store.rows("SELECT toUnixTimestamp64Milli(max(arrived_at)) AS at FROM frames")
        return [*checks, *_arrivals(row["at"] / 1000 - time.time())]


def _clock(skew: float) -> Check:
    found = f"{skew:.1f} s between this machine and ClickHouse"
    if skew <= SKEW_MOST_S:
        return Check("clock", "ok", found)
    fix = "`sudo timedatectl set-ntp true` on both machines: windows close by wall time"
    return Check("clock", "failed", found, fix)


def _arrivals(ahead_s: float) -> list[Check]:
    """Ingest stamps arrivals, batch closes windows by its own clock: on two machines they must agree."""
    if ahead_s <= SKEW_MOST_S:
        return []
    found = f"the newest frame arrived {ahead_s:.0f} s from now: the clock of ingest's machine is ahead of this one"
    return [Check("clock of ingest", "failed", found, "`sudo timedatectl set-ntp true` on both machines")]


async def llm(context: Context) -> list[Check]:
    """Whether the LLM server answers, with a context that a prompt fits into."""
    settings = context.settings
    if settings.local_llm and "llama" not in context.running:
        return [not_running("llm")]
    return [await _llm(settings.llm, url) for url in settings.llm.urls]


async def _llm(settings: LlmSettings, url: str) -> Check:
    client = OpenAiLlm(settings, url=url)
    try:
        async with asyncio.timeout(PATIENCE_S):
            server = await client.server()
    except (UnavailableError, TimeoutError) as error:
        fix = "start the server, or correct llm.url and llm.api_key (NEMOTRON_URL, NEMOTRON_API_KEY)"
        return Check("llm", "failed", str(error) or "no answer", fix)
    finally:
        await client.close()
    found = f"{client.name}, model {server.model}, {server.context_size} tokens, {server.slots or '?'} slots"
    room = server.context_size - settings.max_completion_tokens
    # A window of one frame renders to about 400 tokens: less, and nothing but the shortest prompt fits.
    if room < 512:
        fix = "start the server with a larger context (llm.context_size), or lower llm.max_completion_tokens"
        return Check("llm", "failed", f"{found}: {room} are left for the prompt", fix)
    if 0 < server.slots < (settings.slots or 0):
        fix = f"set llm.slots to {server.slots}, or start the server with --parallel {settings.slots}"
        return Check("llm", "warning", f"{found}: fewer than llm.slots ({settings.slots})", fix)
    return Check("llm", "ok", found)


async def detector(context: Context) -> list[Check]:
    """Whether the detector's service answers, where it is one."""
    settings = context.settings.detector
    if settings.url is None:
        return []
    return [await _detector_service(settings, settings.url.rstrip("/"))]


async def _detector_service(settings: DetectorSettings, url: str) -> Check:
    key = settings.api_key.get_secret_value() if settings.api_key else ""
    try:
        async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False, verify=settings.client.trusted()) as client:
            answer = await client.get(f"{url}/health", headers={"Authorization": f"Bearer {key}"} if key else {})
    except httpx.HTTPError as error:
        return Check("detector", "failed", f"{url}: {explain(error)}", "start it, or correct detector.url")
    if not answer.is_success:
        fix = "look at its log; set detector.api_key (RTDETR_API_KEY) where it asks for one"
        return Check("detector", "failed", f"{url}: HTTP {answer.status_code}", fix)
    return Check("detector", "ok", url)
