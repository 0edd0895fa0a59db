"""The LLM behind a port, and its implementation over an OpenAI-compatible HTTP server (llama.cpp's, vLLM's)."""

import asyncio
import hashlib
import json
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import httpx
import structlog

from processors.analyze.core import token_bound
from processors.analyze.settings import LlmSettings
from schemas.prompts import Message
from streams.errors import UnavailableError

log = structlog.get_logger(__name__)

_READ_CHUNK = 1 << 22
_AWAY = frozenset({429, 503})
"""Too busy, or still loading the model: nothing was tried."""
_FORBIDDEN = frozenset({401, 403})


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
    completion_tokens: int
    cached_tokens: int
    inference_ms: float


class AttemptError(Exception):
    """The server took this request and gave no completion. Whose fault it is, a canary must tell.

    `kind` is `died` (the connection broke), `error` (a 5xx), `refused` (a 4xx: the same again would be as well)
    or `garbage` (an answer that is not the protocol's). `raw` is what came back.
    """

    def __init__(self, kind: str, message: str, raw: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.raw = raw


class Llm(Protocol):
    """What analyze needs of an LLM server. Calls may be cancelled at any await; that frees the server's slot."""

    async def server(self) -> Server:
        """Who answers now.

        Raises:
            UnavailableError: it is away.
        """

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of this chat as a prompt, or more, never fewer."""

    async def complete(
        self,
        messages: Sequence[Message],
        schema: Mapping[str, Any],
        parameters: Mapping[str, Any],
    ) -> Completion:
        """Ask for a completion that follows the JSON schema. It has no deadline of its own.

        Raises:
            UnavailableError: the server is away: it did not take the request.
            AttemptError: it took the request, and gave no completion.
        """

    async def close(self) -> None:
        """Let go of connections."""


class OpenAiLlm:
    """An OpenAI-compatible server over HTTP.

    `weights` is the model's file where it can be read here. `clock` gives seconds, monotonic.
    """

    def __init__(
        self,
        settings: LlmSettings,
        weights: Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._settings = settings
        self._weights = WeightsDigest(weights) if weights is not None else None
        self._clock = clock
        key = settings.api_key.get_secret_value() if settings.api_key is not None else ""
        self._client = httpx.AsyncClient(
            base_url=settings.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # The answer comes at once, whole: reading waits as long as the caller's deadline does.
            timeout=httpx.Timeout(settings.deadline_s, connect=settings.connect_timeout_s),
            limits=httpx.Limits(max_connections=settings.slots + 2),
            # An address that a person set is the address: no proxy stands before it.
            trust_env=False,
            verify=ssl.create_default_context(cafile=settings.ca_path) if settings.ca_path else True,
            transport=transport,
        )
        self._known: Server | None = None
        self._told: Server | None = None
        self._model_path = ""

    async def server(self) -> Server:
        """Who answers now: /v1/models and /props, asked again after every failure."""
        known = self._known
        if known is None:
            known = self._known = await self._ask()
            if known != self._told:
                self._tell(known)
        if self._weights is None or (self._model_path and Path(self._model_path).name != self._weights.path.name):
            return known
        return known._replace(model_digest=await self._weights.get())

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        """By llama.cpp's own tokenizer and the model's chat template; of other servers a bound, a token a byte."""
        try:
            chat = await self._client.post("/apply-template", json={"messages": _plain(messages)})
            if chat.is_success:
                found = await self._client.post(
                    "/tokenize",
                    json={"content": chat.json()["prompt"], "add_special": True, "parse_special": True},
                )
                if found.is_success:
                    return len(found.json()["tokens"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            log.debug("the server does not count tokens", error=repr(error))
        return token_bound(messages)

    async def complete(
        self,
        messages: Sequence[Message],
        schema: Mapping[str, Any],
        parameters: Mapping[str, Any],
    ) -> Completion:
        """POST /v1/chat/completions with the schema where llama.cpp, vLLM and OpenAI all read it."""
        server = await self.server()
        body = {
            **parameters,
            "model": server.model,
            "messages": _plain(messages),
            "stream": False,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": schema},
            },
        }
        began = self._clock()
        try:
            answer = await self._client.post("/v1/chat/completions", json=body)
        except asyncio.CancelledError:
            self._known = None  # a deadline, perhaps: who hangs there must show itself before the next request
            raise
        except httpx.HTTPError as error:
            self._known = None
            if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
                raise self._away(f"{error!r}") from error
            raise AttemptError("died", f"the connection broke: {error!r}") from error
        took = (self._clock() - began) * 1000
        if not answer.is_success:
            self._known = None
            if answer.status_code in _AWAY | _FORBIDDEN:
                raise self._away(_said(answer))
            kind = "error" if answer.status_code >= 500 else "refused"
            raise AttemptError(kind, _said(answer), answer.text)
        return _completion(answer, took)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _ask(self) -> Server:
        models = await self._get("/v1/models")
        props = await self._get("/props")
        offered = models.get("data")
        first = offered[0] if isinstance(offered, list) and offered and isinstance(offered[0], dict) else {}
        self._model_path = str(props.get("model_path", ""))
        generation = props.get("default_generation_settings")
        context = _integer(generation.get("n_ctx")) if isinstance(generation, dict) else 0
        # vLLM tells the length under the model's name.
        context = context or _integer(first.get("max_model_len")) or self._settings.context_size
        return Server(
            model=self._settings.model or str(first.get("id", "")) or "unknown",
            model_digest="",
            context_size=min(context, self._settings.context_size),
            slots=_integer(props.get("total_slots")),
            build=str(props.get("build_info", "")),
        )

    async def _get(self, path: str) -> dict[str, Any]:
        """What the server tells; nothing where it has no such page."""
        try:
            answer = await self._client.get(path, timeout=self._settings.connect_timeout_s)
        except httpx.HTTPError as error:
            raise self._away(f"{error!r}") from error
        if answer.status_code in {404, 405, 501}:
            return {}
        if not answer.is_success:
            raise self._away(_said(answer))
        try:
            found = answer.json()
        except ValueError as error:
            raise self._away(f"{path} is not JSON: {answer.text[:100]!r}") from error
        return found if isinstance(found, dict) else {}

    def _tell(self, known: Server) -> None:
        self._told = known
        log.info("llm", **known._asdict())
        if 0 < known.slots < self._settings.slots:
            log.warning(
                "the llm server has fewer slots than are asked for; requests wait there, inside their deadline",
                server=known.slots,
                settings=self._settings.slots,
                fix="set llm.slots to the server's, or start it with --parallel",
            )

    def _away(self, why: str) -> UnavailableError:
        self._known = None
        return UnavailableError("llm", f"{self._settings.url} (llm.url, NEMOTRON_URL; llm.api_key): {why}")


class WeightsDigest:
    """SHA-256 of a file, computed in a thread, again only when the file is another one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._of: tuple[int, ...] = ()
        self._task: asyncio.Task[str] | None = None

    async def get(self) -> str:
        """The digest, hex; empty where the file cannot be read."""
        try:
            stat = self.path.stat()
            identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._task is None or identity != self._of:
                self._of = identity
                self._task = asyncio.create_task(asyncio.to_thread(_sha256, self.path))
            return await asyncio.shield(self._task)  # who waits may be cancelled; the work is not lost
        except OSError as error:
            log.warning("the weights cannot be read (llm.model_path): events name no digest", error=str(error))
            self._task = None
            return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        sha = hashlib.sha256()
        while chunk := file.read(_READ_CHUNK):
            sha.update(chunk)
        return sha.hexdigest()


def _completion(answer: httpx.Response, took: float) -> Completion:
    try:
        body = answer.json()
        choice = body["choices"][0]
        text = choice["message"]["content"]
        if text is not None and not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}")
        usage = body.get("usage") or {}
        timings = body.get("timings") or {}
        details = usage.get("prompt_tokens_details") or {}
        return Completion(
            # None: the model spent its tokens on thinking. Half a surrogate pair fits no record: write it out.
            text=(text or "").encode("utf-8", "backslashreplace").decode(),
            cut_off=choice.get("finish_reason") == "length",
            prompt_tokens=_integer(usage.get("prompt_tokens")),
            completion_tokens=_integer(usage.get("completion_tokens")),
            cached_tokens=_integer(timings.get("cache_n")) or _integer(details.get("cached_tokens")),
            inference_ms=took,
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise AttemptError(
            "garbage", f"not a chat completion: {error!r}: {answer.text[:200]!r}", answer.text
        ) from error


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [message._asdict() for message in messages]


def _integer(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _said(answer: httpx.Response) -> str:
    """The status and the server's own words."""
    try:
        error = answer.json()["error"]
        words = error["message"] if isinstance(error, dict) else error
    except (ValueError, LookupError, TypeError):
        words = answer.text
    return f"HTTP {answer.status_code}: {json.dumps(words, ensure_ascii=False)[:500]}"
