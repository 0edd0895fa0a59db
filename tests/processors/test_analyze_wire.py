"""Answers as they come over the wire: whole, streamed, in pieces of any size, broken off."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processors.analyze.judge import Judge
from processors.analyze.llm import OpenAiLlm
from processors.analyze.port import AttemptError, Completion
from processors.analyze.settings import LlmSettings
from processors.analyze.wire import Answer
from schemas import prompts
from schemas.prompts import Message
from streams.errors import UnprocessableError
from tests.processors.analyze_samples import RudeServer, answer, completion, context

CHAT = (Message("system", "s"), Message("user", "u"))
SCHEMA = prompts.default().schema


def chunk(delta=None, finish=None, **more) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: " + json.dumps({"choices": choices, **more}).encode() + b"\n\n"


USAGE = {"prompt_tokens": 60, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 40}}
STREAM = (
    b": a comment\n\n"
    + chunk({"role": "assistant", "content": None})
    + chunk({"reasoning_content": "hm"})
    + chunk({"content": "Tür "})
    + chunk({"content": "🚪"}, usage=None)
    + chunk({}, "stop")
    + chunk(usage=USAGE, timings={"cache_n": 41})
    + b"data: [DONE]\n\n"
)
WHOLE = json.dumps(completion("Tür 🚪")).encode()


def read(data: bytes, *cuts: int) -> tuple[Completion, list[str]]:
    heard: list[str] = []
    taken = Answer(heard.append)
    for start, end in zip((0, *cuts), (*cuts, len(data)), strict=True):
        taken.feed(data[start:end])
    return taken.completion(1.0), heard


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_a_stream_says_the_same_however_it_is_cut(cuts):
    found, heard = read(STREAM, *sorted(cuts))
    assert found == Completion("Tür 🚪", False, 60, 5, 41, 1.0)
    assert heard == ["Tür ", "🚪"]


def test_lines_may_end_as_in_http_and_data_may_follow_at_once():
    assert read(STREAM.replace(b"\n", b"\r\n").replace(b"data: ", b"data:"))[0].text == "Tür 🚪"


@given(st.integers(0, len(WHOLE)))
def test_a_whole_answer_to_a_request_for_a_stream_is_read_too(cut):
    found, heard = read(WHOLE, cut)
    assert (found.text, found.cached_tokens, heard) == ("Tür 🚪", 40, ["Tür 🚪"])


def test_thoughts_are_writing_and_the_role_alone_is_not():
    taken = Answer(print)
    taken.feed(chunk({"role": "assistant", "content": None}))
    assert not taken.writing
    taken.feed(chunk({"reasoning_content": "hm"}))
    assert taken.writing


def test_the_limit_of_tokens_is_told():
    assert read(chunk({"content": "a"}) + chunk({}, "length"))[0].cut_off


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (STREAM[:-120][: STREAM.index(b'"stop"') - 60], "died", "ended before the answer did"),
        (chunk({"content": "a"}) + b'data: {"error": {"message": "boom"}}\n\n', "error", "boom"),
        (b"data: {oops\n\n", "garbage", "not a chat completion"),
        (b"data: 5\n\n", "garbage", "not a chat completion"),
        (b'data: {"choices": 5}\n\n', "garbage", "not a chat completion"),
        (chunk({"content": 5}), "garbage", "content is int"),
        (chunk({"content": "a"}, "stop", usage="many"), "garbage", "not a chat completion"),
        (b"data: " + b"[" * 100_000 + b"\n", "garbage", "not a chat completion"),
        (b"data:", "died", "ended before"),
        (b"", "garbage", "not a chat completion"),
    ],
)
def test_what_is_no_answer_is_an_attempt_of_a_kind(data, kind, words):
    with pytest.raises(AttemptError, match=words) as caught:
        read(data)
    assert caught.value.kind == kind


def settings(url: str, **changes) -> LlmSettings:
    return LlmSettings(**({"url": url, "deadline_s": 5.0, "connect_timeout_s": 1.0} | changes))


async def test_a_server_that_answers_quickly_is_asked_for_whole_answers_until_it_fails():
    replies = [(200, completion(answer()))] * 2 + [(500, b"boom")] + [(200, completion(answer()))]

    async def chat(_):
        return replies.pop(0)

    rude = RudeServer(chat)
    async with rude.running() as url:
        llm = OpenAiLlm(settings(url))
        for _ in range(4):
            try:
                await llm.complete(CHAT, SCHEMA, {})
            except AttemptError:
                continue
        await llm.close()
    assert [body["stream"] for body in rude.judged] == [True, False, False, True]


class Slow(RudeServer):
    """It begins to answer a window, and falls silent; canaries it answers."""

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split()[1].decode()
        length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
        body = json.loads(await reader.readexactly(int(length[0].split()[1]))) if length else {}
        if "camera: silent" not in json.dumps(body):
            status, content = await self._reply(path, body)
            data = json.dumps(content).encode()
            writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(data)) + data)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for text in ('{"reasoning": "so', " far"):
            writer.write(chunk({"content": text}))
        await reader.read()
        self.hung_up.set()


async def test_silence_in_the_middle_of_an_answer_is_noticed_and_what_was_said_is_in_the_dead_letter():
    async def chat(_):
        return 200, completion(answer())

    slow = Slow(chat)
    async with slow.running() as url:
        chosen = settings(url, deadline_s=60.0, silence_s=0.1)
        judge = Judge([OpenAiLlm(chosen)], chosen)
        with pytest.raises(UnprocessableError, match=r"not a byte for 0\.1 s \(llm\.silence_s\)") as caught:
            await asyncio.wait_for(judge.judge(context(camera="silent"), prompts.default(), key="k"), 30)
        await slow.hung_up.wait()
        await judge.close()
    attempts = json.loads(caught.value.detail)["attempts"]
    assert [attempt["kind"] for attempt in attempts] == ["hung"] * 3
    assert attempts[0]["raw"] == '{"reasoning": "so far'


async def test_what_was_said_until_the_deadline_is_kept_too():
    async def chat(_):
        return 200, completion(answer())

    slow = Slow(chat)
    async with slow.running() as url:
        chosen = settings(url, deadline_s=0.4)
        judge = Judge([OpenAiLlm(chosen)], chosen)
        with pytest.raises(UnprocessableError, match="no answer within") as caught:
            await asyncio.wait_for(judge.judge(context(camera="silent"), prompts.default(), key="k"), 30)
        await judge.close()
    assert json.loads(caught.value.detail)["attempts"][0]["raw"] == '{"reasoning": "so far'


@pytest.mark.parametrize("head", [b"{", b"data: {", b"data: {}\n"])
def test_an_answer_without_end_is_garbage_before_it_fills_the_memory(head):
    taken = Answer(lambda _: None)
    taken.feed(head)
    piece = chunk({"content": "x" * 60_000}) if head.endswith(b"\n") else b"x" * 60_000

    def go_on():
        for _ in range(100):
            taken.feed(piece)

    with pytest.raises(AttemptError, match="more than 4000000 bytes") as caught:
        go_on()
    assert caught.value.kind == "garbage"
    assert len(caught.value.raw) < 1000


def test_long_thoughts_are_no_long_answer():
    thoughts = chunk({"reasoning_content": "hm" * 30_000}) * 100
    assert read(thoughts + STREAM, *range(100_000, len(thoughts), 100_000))[0].text == "Tür 🚪"
