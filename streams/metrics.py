"""What every stage measures, and the families that Prometheus reads of it.

A process has one registry, made by its endpoint (`streams/scraping.py`); nothing here is global, so any number of
workers live side by side in one process. What can be read at scrape time is read then (`Liveness`, the consumer);
only events are counted as they happen, in the event loop's thread and without the client library's locks: its
histogram takes 1.6 us an observation, `Distribution` 0.3 (measured), and a record costs two.
"""

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from schemas import ids
from schemas.records import DeadLetter
from streams import codec
from streams.delivery import Ownership
from streams.liveness import Liveness
from streams.messages import Emit

log = structlog.get_logger(__name__)

WAITS = (
    *("backlog", "broker", "camera", "detector", "disk", "folder", "group", "images", "live", "llm", "settings"),
    "store",
)
"""What a stage can say that it waits on."""

WORK_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Bounds of work, seconds: from a fold's 0.1 ms a record to the 300 s that an LLM has for a window."""

# A commit is 8 ms, 35 ms back to back (measured), and given up after 15 s.
_COMMIT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15)

# From a frame that is detected at once to an hour of backlog; an idle window alone takes 30 s to close.
AGE_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600)

# Older than this it is footage that was played back, and its age is no latency.
_PLAYED_BACK_S = 86_400


class Counts:
    """A counter by labels. `fixed` labels are the same for every count of it."""

    def __init__(self, name: str, text: str, *labels: str, unit: str = "", **fixed: str) -> None:
        self._name = name
        self._text = text
        self._labels = (*fixed, *labels)
        self._fixed = tuple(fixed.values())
        self._unit = unit
        self._values: defaultdict[tuple[str, ...], float] = defaultdict(float)

    def add(self, *labels: str, by: float = 1) -> None:
        """Count; with `by=0` the series is there before its first event, so that no increase is missed."""
        self._values[labels] += by

    def family(self) -> Metric:
        """What is scraped."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels, unit=self._unit)
        for labels, value in self._values.items():
            family.add_metric((*self._fixed, *labels), value)
        return family


class Distribution:
    """A histogram. `bounds` are the buckets' upper ends, ascending, in the metric's unit."""

    def __init__(self, name: str, text: str, bounds: Sequence[float], *, unit: str = "seconds", **fixed: str) -> None:
        self._name = name
        self._text = text
        self._bounds = tuple(bounds)
        self._unit = unit
        self._fixed = fixed
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def observe_age(self, since_ms: int, now_s: float) -> None:
        """Count the time since then; nothing where it tells of footage that was played back."""
        age = max(0.0, now_s - since_ms / 1000)
        if age < _PLAYED_BACK_S:
            self.observe(age)

    def family(self) -> Metric:
        """What is scraped."""
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._fixed), unit=self._unit)
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*map(str, map(float, self._bounds)), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(list(self._fixed.values()), buckets, self.sum)
        return family


def gauge(
    name: str, text: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float], *, unit: str = ""
) -> Metric:
    """What is so now, by labels."""
    family = GaugeMetricFamily(name, text, labels=labels, unit=unit)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


class StageMetrics:
    """What one stage counts in one process, whatever its shape."""

    def __init__(self, stage: Any, clock: Callable[[], float] = time.time) -> None:
        name = stage.name
        self._clock = clock
        self._state_topic = getattr(stage, "state_topic", None)
        self.records = Counts(
            "rewatch_records",
            "Records that the stage was fed with, ticks too; after a rebalance some come again.",
            "topic",
            unit="records",
            stage=name,
        )
        self.results = Counts(
            "rewatch_results",
            "Records that the stage appended, in committed transactions; dead letters and its own state left out.",
            "topic",
            unit="results",
            stage=name,
        )
        self.dead_letters = Counts(
            "rewatch_dead_letters",
            "Dead letters that the stage committed, by kind: error, or gap where the log lost offsets.",
            "kind",
            unit="letters",
            stage=name,
        )
        self.acquires = Counts(
            "rewatch_acquires",
            "Partitions taken: after a rebalance, and again after an error of unknown outcome.",
            stage=name,
        )
        self.fenced = Counts(
            "rewatch_fenced",
            "Times that another owner took a partition, or a transaction was timed out.",
            stage=name,
        )
        self.handle_seconds = Distribution(
            "rewatch_handle_seconds",
            "The work on one record that gave its results, the model's call in it; for sink one range's inserts.",
            WORK_S,
            stage=name,
        )
        self.commit_seconds = Distribution(
            "rewatch_commit_seconds", "One transaction: results, state and position.", _COMMIT_S, stage=name
        )
        self.record_age_seconds = Distribution(
            "rewatch_record_age_seconds",
            "From the arrival of the frame (detect), or the last frame's event time in the window (batch, enrich, "
            "analyze), to the commit of what the stage made of it. Windows of footage over a day old are left out.",
            AGE_S,
            stage=name,
        )
        for topic in stage.inputs:
            self.records.add(topic, by=0)
        for topic in getattr(stage, "outputs", ()):
            self.results.add(topic, by=0)
        self.dead_letters.add("error", by=0)
        self.acquires.add(by=0)
        self.fenced.add(by=0)

    def committed(self, emits: Sequence[Emit], seconds: float) -> None:
        """A transaction went through: count what was in it, and log its dead letters."""
        self.commit_seconds.observe(seconds)
        now = self._clock()
        for emit in emits:
            if emit.topic == "dead_letters":
                self._dead_letter(emit)
            elif emit.topic not in {self._state_topic, "dead_letter_status"}:
                self.results.add(emit.topic)
                if emit.since is not None:
                    self.record_age_seconds.observe_age(emit.since, now)

    def _dead_letter(self, emit: Emit) -> None:
        # Rare, so decoding it costs nothing that counts; a header of its own would be on the log for ever.
        letter = codec.decode_bytes(emit.topic, emit.value, None, DeadLetter)
        self.dead_letters.add(letter.kind)
        place = ids.place(letter.origin)  # what a shadow failed in is named by its unit
        log.warning(
            "dead letter",
            origin=letter.origin,
            camera=letter.camera_id,
            **({} if place is None else {"topic": place.topic, "partition": place.partition, "offset": place.offset}),
            kind=letter.kind,
            error=letter.error,
            why=letter.message,
            attempt=letter.attempt,
        )

    def families(self) -> Iterator[Metric]:
        """What is scraped."""
        for one in (
            self.records,
            self.results,
            self.dead_letters,
            self.acquires,
            self.fenced,
            self.handle_seconds,
            self.commit_seconds,
            self.record_age_seconds,
        ):
            yield one.family()


class MeteredOwnership(Ownership):
    """An ownership whose acquires and commits are counted."""

    def __init__(self, *args: Any, metrics: StageMetrics, **options: Any) -> None:
        super().__init__(*args, **options)
        self._metrics = metrics

    async def acquire(self) -> None:
        """As `Ownership.acquire`."""
        await super().acquire()
        self._metrics.acquires.add()

    async def commit(self, emits: Sequence[Emit], position: int) -> None:
        """As `Ownership.commit`."""
        began = time.perf_counter()
        await super().commit(emits, position)
        self._metrics.committed(emits, time.perf_counter() - began)


class LivenessCollector(Collector):
    """What a process says of itself in its status file, as gauges."""

    def __init__(self, liveness: Liveness) -> None:
        self._liveness = liveness

    def collect(self) -> Iterator[Metric]:
        """What is scraped."""
        report = self._liveness.report()
        stage = report["stage"]
        # Ingest waits on several things at once, and names cameras: the first word is what it is.
        waits = {what.partition(" ")[0] for said in report["waiting_on"] for what in said.split(", ")}
        yield gauge(
            "rewatch_waiting_on",
            "Whether the stage, or a partition of it, waits on this: 1 or 0.",
            ("stage", "what"),
            {(stage, what): float(what in waits) for what in sorted({*WAITS, *waits})},
        )
        yield gauge(
            "rewatch_stalled",
            "Whether nothing moves and nothing explains it: 1 or 0. The supervisor restarts the process then.",
            ("stage",),
            {(stage,): float(report["stall"] is not None)},
        )


class StageCollector(Collector):
    """Everything that a stage's process tells, the stage's own metrics (`stage.metrics`) included."""

    def __init__(self, stage: Any, metrics: StageMetrics, liveness: Liveness) -> None:
        self._stage = stage
        self._metrics = metrics
        self._liveness = liveness
        self.consumer: AIOKafkaConsumer | None = None
        """Set by the host, as soon as there is one."""

    def collect(self) -> Iterator[Metric]:
        """What is scraped."""
        yield from self._metrics.families()
        yield from LivenessCollector(self._liveness).collect()
        in_hand: dict[tuple[str, ...], float] = {}
        for name, life in self._liveness.partitions.items():
            topic, _, partition = name.rpartition("-")
            in_hand[self._stage.name, topic, partition] = life.in_hand
        unread: dict[tuple[str, ...], float] = {
            (self._stage.name, tp.topic, str(tp.partition)): count for tp, count in unfetched(self.consumer).items()
        }
        labels = ("stage", "topic", "partition")
        yield gauge("rewatch_in_hand", "Records read and not yet committed.", labels, in_hand)
        yield gauge(
            "rewatch_lag_records",
            "What waits: records in hand, and offsets from what was fetched to the end that a read_committed reader "
            "sees, as the broker last told it. Transaction markers among those count, so it may be too high.",
            labels,
            {key: in_hand.get(key, 0) + unread.get(key, 0) for key in in_hand | unread},
            unit="records",
        )
        own = getattr(self._stage, "metrics", None)
        if own is not None:
            yield from own.collect()


class Together(Collector):
    """What several stages in one process tell: families of one name are one family."""

    def __init__(self) -> None:
        self.collectors: list[Collector] = []

    def collect(self) -> Iterator[Metric]:
        """What is scraped."""
        families: dict[str, Metric] = {}
        for collector in self.collectors:
            for family in collector.collect():
                first = families.setdefault(family.name, family)
                if first is not family:
                    first.samples.extend(family.samples)
        yield from families.values()


def unfetched(consumer: AIOKafkaConsumer | None) -> dict[TopicPartition, int]:
    """Offsets from the fetch position to the last stable one, of each assigned partition where both are known.

    It asks nobody: the broker tells its ends with each fetch. Faust's consumer lives in a thread of its own, so a
    rebalance may come in between; what is gone then is left out.
    """
    if consumer is None:
        return {}
    subscription = consumer._subscription.subscription  # noqa: SLF001 (its position() waits; aiokafka is pinned)
    assignment = subscription.assignment if subscription is not None else None
    if assignment is None:
        return {}
    found: dict[TopicPartition, int] = {}
    for tp in assignment.tps:
        state = assignment.state_value(tp)
        if state is not None and state.has_valid_position and state.lso is not None:
            found[tp] = max(0, state.lso - state.position)
    return found
