"""A scripted LLM for tests: it says what it is told to say, and keeps what it was asked."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from processors.analyze.core import token_bound
from processors.analyze.port import Completion, Heard, Server
from schemas.prompts import Message

Script = Callable[[Sequence[Message]], Awaitable[str | Completion]]


class FakeLlm:
    """Answers by a coroutine function of the messages, which may raise or never return."""

    def __init__(
        self,
        script: Script,
        *,
        context_size: int = 4096,
        tokens_per_byte: float = 1.0,
        slots: int = 0,
        name: str = "fake",
    ) -> None:
        self.name = name
        self.slots = slots
        self._script = script
        self._context_size = context_size
        self._tokens_per_byte = tokens_per_byte
        self.asked: list[tuple[Message, ...]] = []
        self.parameters: list[Mapping[str, Any]] = []
        self.running = 0
        self.most_running = 0

    async def server(self) -> Server:
        """A server of one invented model."""
        return Server("fake", "f" * 64, self._context_size, self.slots, "fake-1")

    async def count_tokens(self, messages: Sequence[Message], parameters: Mapping[str, Any]) -> int:
        """So many tokens a byte."""
        del parameters
        return int(token_bound(messages) * self._tokens_per_byte)

    async def complete(
        self,
        messages: Sequence[Message],
        schema: Mapping[str, Any],
        parameters: Mapping[str, Any],
        heard: Heard = lambda _: None,
    ) -> Completion:
        """What the script says."""
        del schema
        self.asked.append(tuple(messages))
        self.parameters.append(parameters)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            said = await self._script(messages)
        finally:
            self.running -= 1
        heard(said.text if isinstance(said, Completion) else said)
        if isinstance(said, Completion):
            return said
        return Completion(
            said,
            cut_off=False,
            prompt_tokens=token_bound(messages),
            completion_tokens=len(said),
            cached_tokens=0,
            inference_ms=1.0,
        )

    async def close(self) -> None:
        """Nothing is held."""
