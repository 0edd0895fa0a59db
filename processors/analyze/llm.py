"""The LLM over HTTP: any server of OpenAI's chat completions (llama.cpp's, vLLM, Ollama, LM Studio).

What each tells of itself:

| server | model | context | slots | build | counts tokens |
|---|---|---|---|---|---|
| llama-server | /v1/models | /props, per slot | /props | /props | /apply-template, /tokenize |
| vLLM | /v1/models | /v1/models (`max_model_len`) | no | /version | no |
| Ollama | /v1/models: all that it has | /api/ps, once the model is loaded | no | /api/version | no |
| LM Studio | /v1/models: all that it has | /api/v0/models, of those loaded | no | no | no |

What is not told is taken from the settings: `llm.model`, `llm.context_size`, `llm.slots`.
"""

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import structlog

from processors.analyze.core import token_bound
from processors.analyze.port import AttemptError, Completion, Heard, Server
from processors.analyze.settings import LlmSettings
from processors.analyze.weights import WeightsDigest
from processors.analyze.wire import Answer
from schemas.prompts import Message
from streams.errors import UnavailableError

log = structlog.get_logger(__name__)

_AWAY = frozenset({408, 409, 425, 429, 503})
"""Too busy, still loading the model, or not now: nothing was tried."""
_FORBIDDEN = frozenset({401, 403})
_NO_PAGE = frozenset({404, 405, 501})
"""It has no such page, now or later."""

_QUICK_S = 2.0
"""A server that answers within this is asked for whole answers. Reading a stream takes 0.2 ms of CPU a token here and
0.1 ms there (measured, llama.cpp's), which nobody notices at 100 tokens/s; a small model that makes thousands a second
would lose a third of them. What a stream is for, noticing silence, a quick answer shows as well: it does not come."""

_TEMPLATE = "chat_template_kwargs"
"""The parameter that the chat template reads, in requests of llama.cpp and vLLM."""


class OpenAiLlm:
    """An OpenAI-compatible server over HTTP.

    `url` is its address, by default the first of the settings; `weights` the model's file where it can be read here;
    `clock` gives seconds, monotonic.
    """

    def __init__(
        self,
        settings: LlmSettings,
        weights: WeightsDigest | None = None,
        url: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._settings = settings
        self._weights = weights
        self._clock = clock
        base = httpx.URL(url or settings.urls[0])
        self.name = f"{base.scheme}://{base.netloc.decode()}{base.path.rstrip('/')}"
        key = settings.api_key.get_secret_value() if settings.api_key is not None else ""
        self._client = httpx.AsyncClient(
            base_url=base,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(settings.deadline_s, connect=settings.connect_timeout_s),
            limits=httpx.Limits(max_connections=None),  # the gate counts
            # An address that a person set is the address: no proxy stands before it.
            trust_env=False,
            verify=ssl.create_default_context(cafile=settings.ca_path) if settings.ca_path else True,
        )
        self._known: Server | None = None
        self._told: Server | None = None
        self._model_path = ""
        self._quick = False

    async def server(self) -> Server:
        """Who answers now; asked again after every failure."""
        known = self._known
        if known is None:
            known = self._known = await self._ask()
            if known != self._told:
                self._told = known
                log.info("llm", endpoint=self.name, **known._asdict())
        if self._weights is None or (self._model_path and Path(self._model_path).name != self._weights.path.name):
            return known
        return known._replace(model_digest=await self._weights.get())

    async def count_tokens(self, messages: Sequence[Message], parameters: Mapping[str, Any]) -> int:
        """By llama.cpp's own tokenizer and the model's chat template; of other servers a bound, a token a byte."""
        chat = {"messages": _plain(messages)}
        if _TEMPLATE in parameters:  # reasoning turned off, say, is some tokens of the prompt
            chat[_TEMPLATE] = parameters[_TEMPLATE]
        counted = False
        try:
            text = await self._post("/apply-template", chat, "prompt")
            asked = {"content": text, "add_special": True, "parse_special": True}
            tokens = await self._post("/tokenize", asked, "tokens") if isinstance(text, str) else None
            counted = True
        except httpx.HTTPError as error:
            raise self._broke(error) from error
        finally:
            if not counted:
                self._known = None
        return len(tokens) if isinstance(tokens, list) else token_bound(messages)

    async def complete(
        self,
        messages: Sequence[Message],
        schema: Mapping[str, Any],
        parameters: Mapping[str, Any],
        heard: Heard = lambda _: None,
    ) -> Completion:
        """POST /v1/chat/completions with the schema where llama.cpp, vLLM and OpenAI all read it."""
        server = await self.server()
        streamed = not self._quick
        body = {
            **parameters,
            "model": server.model,
            "messages": _plain(messages),
            "stream": streamed,
            **({"stream_options": {"include_usage": True}} if streamed else {}),
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": schema},
            },
        }
        began = self._clock()
        answer = Answer(heard)
        done: Completion | None = None
        try:
            await self._read(body, answer, streamed=streamed)
            done = answer.completion((self._clock() - began) * 1000)
        except TimeoutError as error:
            silence = f"not a byte for {self._settings.silence_s:g} s (llm.silence_s)"
            raise AttemptError("hung", silence, answer.unread) from error
        except httpx.HTTPError as error:
            raise self._broke(error, answer.unread) from error
        finally:
            if done is None:  # it failed, or was given up, at a deadline perhaps: it must show itself before the next
                self._known = None
            self._quick = done is not None and done.inference_ms < _QUICK_S * 1000
        return done

    async def _read(self, body: dict[str, Any], answer: Answer, *, streamed: bool) -> None:
        """Read the answer to its end.

        Silence is measured from the model's first word on: a long prompt has to be read before it. A quick server is
        asked for the whole, which is there long before.

        Raises:
            TimeoutError: it fell silent.
            httpx.HTTPError: it could not be reached, or the connection broke.
            AttemptError, UnavailableError: it said no.
        """
        loop, silence_s = asyncio.get_running_loop(), self._settings.silence_s
        async with (
            asyncio.timeout(None if streamed else silence_s) as quiet,
            self._client.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            if not response.is_success:
                await response.aread()
                raise self._refused(response)
            async for data in response.aiter_bytes():
                answer.feed(data)
                if answer.writing:
                    quiet.reschedule(loop.time() + silence_s)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _broke(self, error: httpx.HTTPError, unread: str = "") -> Exception:
        """What a request that had no answer, or no whole one, ended in."""
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return self._away(f"{error!r}")
        return AttemptError("died", f"the connection broke: {error!r}", unread)

    def _refused(self, answer: httpx.Response) -> Exception:
        if answer.status_code in _AWAY | _FORBIDDEN:
            return self._away(_said(answer))
        return AttemptError("error" if answer.status_code >= 500 else "refused", _said(answer), answer.text)

    async def _ask(self) -> Server:
        models = _entries(await self._get("/v1/models"))
        props = await self._get("/props")
        chosen = self._settings.model
        first = next((one for one in models if one.get("id") == chosen), models[0] if models else {})
        model = chosen or str(first.get("id", "")) or "unknown"
        self._model_path = str(props.get("model_path", ""))
        generation = props.get("default_generation_settings")
        context = _integer(generation.get("n_ctx")) if isinstance(generation, dict) else 0
        context = context or _integer(first.get("max_model_len"))
        build = str(props.get("build_info", ""))
        if not context:
            context = await self._loaded_context(model)
        if not build:
            version = (await self._get("/version")) or (await self._get("/api/version"))
            build = str(version.get("version", ""))
        return Server(
            model=model,
            model_digest="",
            context_size=min(context or self._settings.context_size, self._settings.context_size),
            slots=_integer(props.get("total_slots")),
            build=build,
        )

    async def _loaded_context(self, model: str) -> int:
        """The context that Ollama or LM Studio loaded the model with; 0 where neither tells."""
        ollama = _entries(await self._get("/api/ps"), "models")
        studio = _entries(await self._get("/api/v0/models"))
        told = [one.get("context_length") for one in ollama if one.get("name") == model]
        told += [one.get("loaded_context_length") for one in studio if one.get("id") == model]
        return _integer(told[0]) if told else 0

    async def _get(self, path: str) -> dict[str, Any]:
        """What the server tells; nothing where it has no such page."""
        try:
            answer = await self._client.get(path, timeout=self._settings.connect_timeout_s)
        except httpx.HTTPError as error:
            raise self._away(f"{error!r}") from error
        if answer.status_code in _NO_PAGE:
            return {}
        if not answer.is_success:
            raise self._away(_said(answer))
        try:
            found = answer.json()
        except ValueError as error:
            raise self._away(f"{path} is not JSON: {answer.text[:100]!r}") from error
        return found if isinstance(found, dict) else {}

    async def _post(self, path: str, body: Mapping[str, Any], name: str) -> object:
        """One value of a page's answer; None where the server has no such page, or another one there.

        Raises:
            httpx.HTTPError: it could not be reached, or the connection broke.
            AttemptError, UnavailableError: it said no.
        """
        answer = await self._client.post(path, json=body)
        if answer.status_code in _NO_PAGE:
            return None
        if not answer.is_success:
            raise self._refused(answer)
        try:
            return answer.json()[name]
        except (ValueError, LookupError, TypeError, RecursionError):
            return None

    def _away(self, why: str) -> UnavailableError:
        return UnavailableError("llm", f"{self.name} (llm.url, NEMOTRON_URL; llm.api_key): {why}")


def _entries(page: Mapping[str, Any], name: str = "data") -> list[dict[str, Any]]:
    found = page.get(name)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


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
