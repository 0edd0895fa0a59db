"""An answer of the chat completions protocol as it comes in: one JSON body, or a stream of server-sent events.

Some servers, and proxies, answer whole what was asked for as a stream, so the first bytes tell which it is. A stream
is what OpenAI defined and llama.cpp, vLLM, Ollama and LM Studio send: `data: {...}` lines, each with a piece of text,
one with the finish reason, one with the usage (asked for by `stream_options`), and `data: [DONE]`.
"""

import json
import re
from typing import Any

from processors.analyze.port import AttemptError, Completion, Heard

_EVENT = re.compile(rb"(data|event|id|retry)?:")
_SHOWN = 200
_LONGEST_FIELD = 5
_MOST = 4_000_000
"""Bytes that are kept of one answer: ten times what 128 k tokens of text have, and no machine's memory."""


class Answer:
    """What has come of one answer. `heard` is given its text, piece by piece where it is streamed."""

    def __init__(self, heard: Heard) -> None:
        self._heard = heard
        self._streamed: bool | None = None
        self._rest = bytearray()
        self._pieces: list[str] = []
        self._said = 0
        self._finish: object = None
        self._usage: Any = None
        self._timings: Any = None
        self.writing = False
        """Whether the model has begun to write, thoughts included."""

    @property
    def unread(self) -> str:
        """What came and is no text of an answer yet."""
        return self._rest.decode("utf-8", "backslashreplace")

    def feed(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            AttemptError: the server says that it failed, the stream is none, or it is longer than any answer.
        """
        self._rest += data
        if self._said + len(self._rest) > _MOST:
            raise AttemptError("garbage", f"more than {_MOST} bytes of an answer", _shown(self._rest))
        if self._streamed is None:
            head = self._rest.lstrip()
            if len(head) < _LONGEST_FIELD:
                return
            self._streamed = _EVENT.match(head) is not None
        if self._streamed and (end := self._rest.rfind(b"\n") + 1):
            lines = bytes(self._rest[:end]).split(b"\n")
            del self._rest[:end]
            for line in lines:
                if line.startswith(b"data:") and (event := line[5:].strip()) not in {b"", b"[DONE]"}:
                    self._take(event)

    def completion(self, took_ms: float) -> Completion:
        """The whole answer, after the last byte.

        Raises:
            AttemptError: it is no chat completion, or its end is missing.
        """
        if not self._streamed:
            self._take_whole()
        elif self._finish is None:
            raise AttemptError("died", "the stream ended before the answer did", self.unread)
        try:
            usage, timings = self._usage or {}, self._timings or {}
            details = usage.get("prompt_tokens_details") or {}
            return Completion(
                text="".join(self._pieces),
                cut_off=self._finish == "length",
                prompt_tokens=_integer(usage.get("prompt_tokens")),
                completion_tokens=_integer(usage.get("completion_tokens")),
                cached_tokens=_integer(timings.get("cache_n")) or _integer(details.get("cached_tokens")),
                inference_ms=took_ms,
            )
        except (TypeError, AttributeError) as error:
            raise _garbage(error, self._rest) from error

    def _take(self, event: bytes) -> None:
        try:
            told = json.loads(event)
            if "error" in told:
                raise AttemptError("error", f"failed while it answered: {_shown(event)}", event.decode())
            self._usage = told.get("usage") or self._usage
            self._timings = told.get("timings") or self._timings
            for choice in told.get("choices") or ():
                delta = choice.get("delta") or {}
                self._say(delta.get("content"))
                self.writing = self.writing or bool(self._pieces or delta.get("reasoning_content"))
                self._finish = choice.get("finish_reason") or self._finish
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise _garbage(error, event) from error

    def _take_whole(self) -> None:
        try:
            body = json.loads(self._rest)
            choice = body["choices"][0]
            self._say(choice["message"]["content"])
            self._finish = choice.get("finish_reason")
            self._usage, self._timings = body.get("usage"), body.get("timings")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise _garbage(error, self._rest) from error

    def _say(self, text: object) -> None:
        """None: the model thinks, or spent all its tokens on it. Half a surrogate pair fits no record: write it out."""
        if text is not None and not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}")
        if text:
            piece = text.encode("utf-8", "backslashreplace").decode()
            self._pieces.append(piece)
            self._said += len(piece)
            self._heard(piece)


def _garbage(error: Exception, data: bytes | bytearray) -> AttemptError:
    text = data.decode("utf-8", "backslashreplace")
    return AttemptError("garbage", f"not a chat completion: {error!r}: {text[:_SHOWN]!r}", text)


def _shown(data: bytes | bytearray) -> str:
    return data[: 4 * _SHOWN].decode("utf-8", "backslashreplace")[:_SHOWN]


def _integer(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
