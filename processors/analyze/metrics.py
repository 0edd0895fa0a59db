"""What analyze counts besides what every stage does: the LLM's time, tokens and slots, and what it got wrong."""

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.registry import Collector

from processors.analyze.gate import SlotGate
from schemas.records import RiskEvent
from streams.metrics import WORK_S, Counts, Distribution, gauge


class AnalyzeMetrics(Collector):
    """Counts of one judge, and the state of its gate."""

    def __init__(self, gate: SlotGate) -> None:
        self._gate = gate
        self.events = Counts("rewatch_analyze_events", "Verdicts by risk level.", "level", unit="events")
        self.tokens = Counts(
            "rewatch_llm_tokens",
            "Tokens of verdicts' last requests: prompt (in, with those cached), completion (out), cached (in, reused).",
            "kind",
            unit="tokens",
        )
        self.seconds = Distribution("rewatch_llm_seconds", "The server's time on one verdict, a repair in it.", WORK_S)
        self.queued_seconds = Distribution("rewatch_llm_queued_seconds", "Waiting for a slot before it.", WORK_S)
        self.repairs = Counts("rewatch_llm_repairs", "Verdicts that took a second request to be usable.")
        self.failures = Counts(
            "rewatch_llm_failures",
            "Attempts that gave nothing usable, by kind: hung, died, error, refused, garbage, unusable, prompt.",
            "kind",
        )
        for kind in ("prompt", "completion", "cached"):
            self.tokens.add(kind, by=0)
        for level in ("low", "medium", "high", "critical"):
            self.events.add(level, by=0)
        self.repairs.add(by=0)

    def judged(self, event: RiskEvent) -> None:
        """A window has its verdict."""
        self.events.add(event.risk_level)
        self.tokens.add("prompt", by=event.prompt_tokens)
        self.tokens.add("completion", by=event.completion_tokens)
        self.tokens.add("cached", by=event.cached_tokens)
        self.seconds.observe(event.inference_ms / 1000)
        self.queued_seconds.observe(event.queued_ms / 1000)
        self.repairs.add(by=event.repaired)

    def collect(self) -> Iterator[Metric]:
        """What is scraped."""
        counted = (self.events, self.tokens, self.seconds, self.queued_seconds, self.repairs, self.failures)
        yield from (one.family() for one in counted)
        yield gauge(
            "rewatch_llm_slots", "Requests that go to the server at once (llm.slots).", (), {(): self._gate.slots}
        )
        yield gauge("rewatch_llm_slots_busy", "Slots that are held now, canaries' too.", (), {(): self._gate.busy})
