"""What analyze needs of an LLM server."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from schemas.prompts import Message

Heard = Callable[[str], object]
"""Is given the text of an answer as it comes, in pieces, so that what was said is known also when no more comes."""


class Server(NamedTuple):
    """Who answers, as far as it tells."""

    model: str
    model_digest: str
    """SHA-256 of the weights, hex; empty where they cannot be read here."""
    context_size: int
    """Tokens that one request may have, prompt and answer."""
    slots: int
    """Requests that it works on at once; 0 where it does not say."""
    build: str


class Completion(NamedTuple):
    """One answer."""

    text: str
    cut_off: bool
    """Whether it ended at the limit of tokens."""
    prompt_tokens: int
    """With those cached; the others were evaluated."""
    completion_tokens: int
    cached_tokens: int
    inference_ms: float


class AttemptError(Exception):
    """The server took this request and gave no completion. Whose fault it is, a canary must tell.

    `kind` is `died` (the connection broke), `hung` (it fell silent), `error` (a 5xx), `refused` (a 4xx: the same again
    would be as well) or `garbage` (an answer that is not the protocol's). `raw` is what came back besides the text
    that was heard.
    """

    def __init__(self, kind: str, message: str, raw: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.raw = raw


class Llm(Protocol):
    """One server. Calls may be cancelled at any await; that frees the server's slot."""

    name: str
    """Its address, without what is secret in it."""

    async def server(self) -> Server:
        """Who answers now.

        Raises:
            UnavailableError: it is away.
        """

    async def count_tokens(self, messages: Sequence[Message], parameters: Mapping[str, Any]) -> int:
        """Tokens of this chat as a prompt of a request with these parameters, or more, never fewer.

        Raises:
            UnavailableError: the server is away.
            AttemptError: it took the request, and did not count, though others of its kind do.
        """

    async def complete(
        self,
        messages: Sequence[Message],
        schema: Mapping[str, Any],
        parameters: Mapping[str, Any],
        heard: Heard,
    ) -> Completion:
        """Ask for a completion that follows the JSON schema. It has no deadline of its own.

        Raises:
            UnavailableError: the server is away: it did not take the request.
            AttemptError: it took the request, and gave no completion.
        """

    async def close(self) -> None:
        """Let go of connections."""
