"""What the stage replay counts besides what every stage does: its verdicts and the LLM's tokens, by kind of run."""

from collections.abc import Iterator
from typing import get_args

from prometheus_client import Metric
from prometheus_client.registry import Collector

from processors.replay.plan import Kind
from schemas.records import RiskEvent
from streams.metrics import Counts


class ReplayMetrics(Collector):
    """Counts of one process. Live verdicts are analyze's to count: no alarm rests on these."""

    def __init__(self) -> None:
        self.events = Counts("rewatch_replay_verdicts", "Verdicts of replays and shadows.", "kind", unit="verdicts")
        self.tokens = Counts(
            "rewatch_replay_tokens", "Tokens that they took, prompts and answers.", "kind", unit="tokens"
        )
        for kind in get_args(Kind):
            self.events.add(kind, by=0)
            self.tokens.add(kind, by=0)

    def judged(self, kind: Kind, event: RiskEvent) -> None:
        """A window has its verdict in a run of this kind."""
        self.events.add(kind)
        self.tokens.add(kind, by=event.prompt_tokens + event.completion_tokens)

    def collect(self) -> Iterator[Metric]:
        """What is scraped."""
        yield self.events.family()
        yield self.tokens.family()
