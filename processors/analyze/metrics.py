"""What analyze counts besides what every stage does: the LLM's time, tokens and slots, and what it got wrong."""

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.registry import Collector

from processors.analyze.endpoints import Endpoints
from schemas.records import RiskEvent
from streams.metrics import WORK_S, Counts, Distribution, gauge


class AnalyzeMetrics(Collector):
    """Counts of one judge, and the state of its servers and their gate."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints
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
        self.forgiven = Counts(
            "rewatch_llm_forgiven", "What was forgiven in completions that were read: fence, prose ...", "what"
        )
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
        counted = (self.events, self.tokens, self.seconds, self.queued_seconds, self.repairs)
        yield from (one.family() for one in (*counted, self.forgiven, self.failures))
        gate = self._endpoints.gate
        yield gauge("rewatch_llm_slots", "Requests that go to the servers at once.", (), {(): gate.slots})
        yield gauge("rewatch_llm_slots_busy", "Slots that are held now, canaries' too.", (), {(): gate.busy})
        yield gauge(
            "rewatch_llm_up",
            "Whether the server answers; it may still fail a prompt's canary.",
            ("endpoint",),
            {(endpoint.name,): endpoint.away is None for endpoint in self._endpoints.all},
        )
