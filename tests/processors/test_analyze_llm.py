"""The HTTP implementation against servers without manners, alone and under the whole stage."""

import asyncio
import hashlib
import socket

import pytest

from processors.analyze import core, endpoints
from processors.analyze.judge import Judge
from processors.analyze.llm import OpenAiLlm
from processors.analyze.port import AttemptError
from processors.analyze.settings import LlmSettings
from processors.analyze.stage import build
from processors.analyze.weights import WeightsDigest
from schemas import prompts
from schemas.prompts import Message
from schemas.records import RiskEvent
from streams import codec
from streams.errors import UnavailableError, UnprocessableError
from streams.messages import Incoming
from tests.processors.analyze_samples import Die, RudeServer, answer, completion, context, hang, seen

CHAT = (Message("system", "s"), Message("user", "u"))
SCHEMA = prompts.default().schema


async def good(_):
    return 200, completion(answer())


def settings(url: str, **changes) -> LlmSettings:
    return LlmSettings(**({"url": url, "deadline_s": 0.3, "connect_timeout_s": 1.0} | changes))


async def test_the_request_is_what_llama_cpp_and_vllm_read_and_the_answer_is_read_whole():
    rude = RudeServer(good)
    async with rude.running() as url:
        llm = OpenAiLlm(settings(url, api_key="secret"))
        found = await llm.complete(CHAT, SCHEMA, {"temperature": 0, "seed": 7, "max_tokens": 9, "messages": "mine"})
        await llm.close()
    assert found.text == answer()
    assert (found.cut_off, found.prompt_tokens, found.completion_tokens, found.cached_tokens) == (False, 60, 5, 40)
    assert found.inference_ms > 0
    (body,) = rude.judged
    assert body == {
        "model": "rude-1",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "temperature": 0,
        "seed": 7,
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA},
        },
    }
    assert list(body["response_format"]["json_schema"]["schema"]["properties"]) == list(prompts.VERDICT_KEYS)
    assert {headers["authorization"] for headers in rude.headers} == {"Bearer secret"}


async def test_who_answers_is_read_from_props_and_models():
    async with RudeServer(good).running() as url:
        llm = OpenAiLlm(settings(url))
        found = await llm.server()
        await llm.close()
    assert (found.model, found.build, found.slots, found.context_size) == ("rude-1", "b1-rude", 2, 2048)
    assert found.model_digest == ""


async def test_a_server_without_props_is_taken_as_the_settings_say():
    rude = RudeServer(good)
    del rude.pages["/props"]
    rude.pages["/v1/models"] = (200, {"data": [{"id": "served", "max_model_len": 3000}]})
    async with rude.running() as url:
        llm = OpenAiLlm(settings(f"{url}/v1/", model="mine"))
        found = await llm.server()
        assert await llm.count_tokens(CHAT, {}) >= 2
        await llm.close()
    assert (found.model, found.build, found.slots, found.context_size) == ("mine", "", 0, 3000)


@pytest.mark.parametrize("page", [b"<html>", b"[]", {"data": "no"}, {"data": [5]}, {}])
async def test_strange_pages_do_not_crash(page):
    rude = RudeServer(good)
    rude.pages = {"/v1/models": (200, page), "/props": (200, page)}
    async with rude.running() as url:
        llm = OpenAiLlm(settings(url))
        if page == b"<html>":
            with pytest.raises(UnavailableError, match="not JSON"):
                await llm.server()
        else:
            assert (await llm.server()).model == "unknown"
        await llm.close()


async def test_tokens_are_counted_by_the_server_with_the_chat_template():
    rude = RudeServer(good)
    rude.pages |= {"/apply-template": (200, {"prompt": "<s>su"}), "/tokenize": (200, {"tokens": [1, 2, 3]})}
    async with rude.running() as url:
        llm = OpenAiLlm(settings(url))
        assert await llm.count_tokens(CHAT, {}) == 3
        await llm.close()
    assert rude.requests[-1] == ("/tokenize", {"content": "<s>su", "add_special": True, "parse_special": True})
    assert rude.requests[-2][0] == "/apply-template"
    assert set(rude.requests[-2][1]) == {"messages"}


async def test_what_the_chat_template_is_told_is_told_when_tokens_are_counted():
    rude = RudeServer(good)
    rude.pages |= {"/apply-template": (200, {"prompt": "<s>su"}), "/tokenize": (200, {"tokens": [1, 2, 3]})}
    silent = {"chat_template_kwargs": {"enable_thinking": False}}
    async with rude.running() as url:
        llm = OpenAiLlm(settings(url))
        await llm.count_tokens(CHAT, {"seed": 1, **silent})
        await llm.close()
    assert rude.requests[-2] == ("/apply-template", {"messages": [m._asdict() for m in CHAT], **silent})


@pytest.mark.parametrize("page", ["/apply-template", "/tokenize"])
@pytest.mark.parametrize(
    ("reply", "raised"),
    [
        ((503, {"error": {"message": "Loading model"}}), UnavailableError),
        ((429, b"busy"), UnavailableError),
        ((500, {"error": {"message": "boom"}}), AttemptError),
        ((400, {"error": {"message": "roles"}}), AttemptError),
    ],
)
async def test_a_server_that_could_not_count_just_now_is_no_server_that_does_not_count(page, reply, raised):
    rude = RudeServer(good)
    rude.pages |= {"/apply-template": (200, {"prompt": "<s>su"}), "/tokenize": (200, {"tokens": [1]}), page: reply}
    async with rude.running() as url:
        llm = OpenAiLlm(settings(url))
        await llm.server()
        with pytest.raises(raised, match=f"HTTP {reply[0]}"):
            await llm.count_tokens(CHAT, {})
        rude.pages["/v1/models"] = (200, {"data": [{"id": "rude-2"}]})
        assert (await llm.server()).model == "rude-2", "it is asked again who it is"
        await llm.close()


async def test_a_connection_that_breaks_while_tokens_are_counted_is_away_or_a_death():
    async def cut(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(cut, "127.0.0.1", 0)
    llm = OpenAiLlm(settings(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    with pytest.raises(AttemptError, match="the connection broke") as caught:
        await llm.count_tokens(CHAT, {})
    assert caught.value.kind == "died"
    server.close()
    await server.wait_closed()
    with pytest.raises(UnavailableError, match="ConnectError"):
        await llm.count_tokens(CHAT, {})
    await llm.close()


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_a_server_without_a_page_that_counts_has_its_bytes_counted(status):
    rude = RudeServer(good)
    rude.pages["/apply-template"] = (status, b"no")
    async with rude.running() as url:
        llm = OpenAiLlm(settings(url))
        assert await llm.count_tokens(CHAT, {}) == core.token_bound(CHAT)
        await llm.close()


async def test_connection_refused_is_away_and_names_the_setting():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        llm = OpenAiLlm(settings(f"http://127.0.0.1:{taken.getsockname()[1]}"))
        with pytest.raises(UnavailableError, match=r"llm\.url, NEMOTRON_URL") as caught:
            await llm.complete(CHAT, SCHEMA, {})
        await llm.close()
    assert caught.value.waiting_on == "llm"


@pytest.mark.parametrize("status", [503, 429, 408, 409, 425, 401, 403])
async def test_loading_busy_and_forbidden_are_away(status):
    async def chat(_):
        return status, {"error": {"message": "Loading model"}}

    async with RudeServer(chat).running() as url:
        llm = OpenAiLlm(settings(url))
        with pytest.raises(UnavailableError, match=f"HTTP {status}.*Loading model"):
            await llm.complete(CHAT, SCHEMA, {})
        await llm.close()


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        ((500, {"error": {"message": "no peg-native format"}}), "error", "HTTP 500.*peg-native"),
        ((502, b"bad gateway"), "error", "HTTP 502.*bad gateway"),
        ((400, {"error": {"message": "too long"}}), "refused", "HTTP 400.*too long"),
        ((404, {"error": "no such model"}), "refused", "HTTP 404.*no such model"),
        ((200, b"<html>hello</html>"), "garbage", "not a chat completion"),
        ((200, b""), "garbage", "not a chat completion"),
        ((200, b"\xff\xfe"), "garbage", "not a chat completion"),
        ((200, b"[" * 100_000), "garbage", "not a chat completion"),
        ((200, []), "garbage", "not a chat completion"),
        ((200, {"choices": []}), "garbage", "not a chat completion"),
        ((200, {"choices": [{"message": {"content": ["a"]}}]}), "garbage", "content is list"),
        ((200, {"choices": [{"message": {"content": "a"}}], "usage": "many"}), "garbage", "not a chat completion"),
    ],
)
async def test_bad_answers_are_attempts_of_a_kind(reply, kind, words):
    async def chat(_):
        return reply

    async with RudeServer(chat).running() as url:
        llm = OpenAiLlm(settings(url))
        with pytest.raises(AttemptError, match=words) as caught:
            await llm.complete(CHAT, SCHEMA, {})
        await llm.close()
    assert caught.value.kind == kind


async def test_a_connection_that_breaks_mid_request_is_a_death():
    async def chat(_):
        raise Die

    async with RudeServer(chat).running() as url:
        llm = OpenAiLlm(settings(url))
        with pytest.raises(AttemptError, match="the connection broke") as caught:
            await llm.complete(CHAT, SCHEMA, {})
        await llm.close()
    assert caught.value.kind == "died"


@pytest.mark.parametrize(("content", "text"), [(None, ""), ("half \ud83d pair", "half \\ud83d pair")])
async def test_text_that_no_record_can_hold_is_written_out(content, text):
    async def chat(_):
        return 200, completion(content)

    async with RudeServer(chat).running() as url:
        llm = OpenAiLlm(settings(url))
        assert (await llm.complete(CHAT, SCHEMA, {})).text == text
        await llm.close()


async def test_cancelling_hangs_up_so_that_the_servers_slot_is_free():
    rude = RudeServer(hang)
    async with rude.running() as url:
        llm = OpenAiLlm(settings(url))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await llm.complete(CHAT, SCHEMA, {})
        await rude.hung_up.wait()
        rude.pages["/v1/models"] = (200, {"data": [{"id": "rude-2"}]})
        assert (await llm.server()).model == "rude-2", "who let a request hang is asked again who it is"
        await llm.close()


async def test_weights_are_hashed_once_and_again_when_the_file_is_another(tmp_path, monkeypatch):
    path = tmp_path / "rude.gguf"
    path.write_bytes(b"weights")
    read: list[object] = []
    hashed = hashlib.sha256

    def sha256(*args):
        read.append(args)
        return hashed(*args)

    monkeypatch.setattr(hashlib, "sha256", sha256)
    digest = WeightsDigest(path)
    first = await asyncio.gather(digest.get(), digest.get())
    assert first == [hashed(b"weights").hexdigest()] * 2
    assert len(read) == 1
    path.write_bytes(b"weightz")
    assert await digest.get() == hashed(b"weightz").hexdigest()
    path.unlink()
    assert await digest.get() == ""


async def test_the_digest_is_of_the_file_that_the_server_says_it_runs(tmp_path):
    mine, other = tmp_path / "rude.gguf", tmp_path / "other.gguf"
    mine.write_bytes(b"mine")
    other.write_bytes(b"other")
    async with RudeServer(good).running() as url:
        for path, digest in ((mine, hashlib.sha256(b"mine").hexdigest()), (other, "")):
            llm = OpenAiLlm(settings(url), WeightsDigest(path))
            assert (await llm.server()).model_digest == digest
            await llm.close()


async def test_a_server_that_came_back_is_asked_again_who_it_is():
    async def chat(body):
        if body["messages"][-1]["content"] == "die":
            raise Die
        return await good(body)

    rude = RudeServer(chat)
    async with rude.running() as url:
        llm = OpenAiLlm(settings(url))
        await llm.complete(CHAT, SCHEMA, {})
        with pytest.raises(AttemptError):
            await llm.complete((Message("user", "die"),), SCHEMA, {})
        rude.pages["/v1/models"] = (200, {"data": [{"id": "rude-2"}]})
        assert (await llm.server()).model == "rude-2"
        await llm.close()


@pytest.mark.parametrize(("url", "said"), [("http://h:1/v1/", "http://h:1"), ("https://h", "https://h")])
def test_an_address_may_end_in_v1(url, said):
    assert LlmSettings(url=url).url == said


def test_an_address_without_a_scheme_is_refused():
    with pytest.raises(ValueError, match="begins with http"):
        LlmSettings(url="localhost:8091")


# The whole stage against the same server: the failure table's row of the LLM.

ITEMS = {name: context((seen("person"),), camera=name) for name in ("good", "bad")}


class Chat:
    """A server's manners towards the item `bad`, and towards everyone."""

    def __init__(self, bad=good, everyone=None):
        self.bad, self.everyone = bad, everyone

    async def __call__(self, body):
        if self.everyone is not None:
            return await self.everyone(body)
        return await (self.bad if "camera: bad" in body["messages"][1]["content"] else good)(body)


async def failing(_):
    return 500, {"error": {"message": "boom"}}


async def garbage(_):
    return 200, b"<html>"


async def gibberish(_):
    return 200, completion("all work and no play")


async def cut_off(_):
    return 200, completion(answer()[:40], "length")


async def dying(_):
    raise Die


async def handle(stage, name, tries=1):
    record = Incoming(
        "contexts", "e", 0, 5, ITEMS[name].camera_id.encode(), codec.encode("contexts", ITEMS[name])[0], ()
    )
    for attempt in range(tries):
        try:
            (emit,) = await stage.handle(record._replace(partition=sorted(ITEMS).index(name)))
            return codec.decode_bytes("risk_events", emit.value, None, RiskEvent)
        except UnavailableError:
            if attempt == tries - 1:
                raise
    raise AssertionError


@pytest.mark.parametrize("fault", [failing, garbage, gibberish, cut_off, dying, hang])
async def test_one_bad_item_is_one_dead_letter_and_the_others_go_on(fault):
    rude = RudeServer(Chat(bad=fault))
    async with rude.running() as url:
        stage = build(settings(url))
        bad, fine = await asyncio.gather(handle(stage, "bad", 9), handle(stage, "good", 9), return_exceptions=True)
        await stage.close()
    assert isinstance(bad, UnprocessableError)
    assert '"attempts"' in bad.detail
    assert isinstance(fine, RiskEvent)
    assert fine.risk_score == 71


@pytest.mark.parametrize("fault", [failing, garbage, gibberish, cut_off, dying, hang])
async def test_a_fault_for_everyone_is_waited_out_and_nothing_is_lost(fault, monkeypatch):
    monkeypatch.setattr(endpoints, "_RETRY_S", (0.0, 0.0))
    chat = Chat(everyone=fault)
    async with RudeServer(chat).running() as url:
        stage = build(settings(url, deadline_s=0.1))
        for _ in range(5):
            with pytest.raises(UnavailableError) as caught:
                await handle(stage, "good")
            assert caught.value.waiting_on == "llm"
        chat.everyone = None
        if fault in {gibberish, cut_off}:  # an answer twice unusable is final, whenever the server is found well
            with pytest.raises(UnprocessableError):
                await handle(stage, "good")
        else:
            assert (await handle(stage, "good")).risk_score == 71
        await stage.close()


async def test_a_first_boot_that_loads_for_long_is_waited_for():
    loading = {"error": {"message": "Loading model", "code": 503}}
    rude = RudeServer(good)
    pages, rude.pages = rude.pages, dict.fromkeys(rude.pages, (503, loading))
    async with rude.running() as url:
        stage = build(settings(url))
        for _ in range(5):
            with pytest.raises(UnavailableError, match="Loading model"):
                await handle(stage, "good")
        assert not rude.judged
        rude.pages = pages
        assert (await handle(stage, "good")).risk_score == 71
        await stage.close()


async def test_a_server_that_hangs_as_a_whole_is_found_out_before_the_next_deadline():
    """SIGSTOP: connections are taken by the kernel, and nothing is answered."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        chosen = settings(f"http://127.0.0.1:{silent.getsockname()[1]}", deadline_s=600, connect_timeout_s=0.1)
        llm = OpenAiLlm(chosen)
        with pytest.raises(UnavailableError, match="ReadTimeout"):
            await Judge([llm], chosen).judge(ITEMS["good"], prompts.default(), key="k")
        await llm.close()


@pytest.mark.parametrize(
    ("given", "urls"),
    [
        ("http://a:1, http://b:2/v1/", ("http://a:1", "http://b:2")),
        (["http://a:1/", "https://b", "http://a:1"], ("http://a:1", "https://b")),
    ],
)
def test_several_addresses_are_a_list_or_a_text_with_commas(given, urls):
    assert LlmSettings(url=given).urls == urls


@pytest.mark.parametrize("given", ["", [], ["localhost"], [5], None])
def test_addresses_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match="url"):
        LlmSettings(url=given)


async def test_what_is_secret_in_an_address_is_in_no_event():
    async with RudeServer(good).running() as url:
        llm = OpenAiLlm(settings(url.replace("http://", "http://me:hunter2@")))
        assert llm.name == url
        await llm.close()


@pytest.mark.parametrize(
    ("pages", "context_size", "build"),
    [
        (
            {
                "/api/ps": {"models": [{"name": "other", "context_length": 9}, {"name": "m", "context_length": 2048}]},
                "/api/version": {"version": "0.20.3"},
            },
            2048,
            "0.20.3",
        ),
        ({"/api/ps": {"models": []}}, 4096, ""),
        ({"/api/v0/models": {"data": [{"id": "m", "state": "loaded", "loaded_context_length": 3000}]}}, 3000, ""),
        ({"/api/v0/models": {"data": [{"id": "m", "state": "not-loaded", "max_context_length": 9000}]}}, 4096, ""),
        ({"/version": {"version": "0.15.0"}}, 4096, "0.15.0"),
    ],
    ids=["ollama", "ollama, not loaded", "lm studio", "lm studio, not loaded", "vllm"],
)
async def test_what_other_servers_tell_of_themselves_is_read(pages, context_size, build):
    rude = RudeServer(good)
    rude.pages = {"/v1/models": (200, {"data": [{"id": "m"}, {"id": "n"}]})}
    rude.pages |= {path: (200, page) for path, page in pages.items()}
    async with rude.running() as url:
        llm = OpenAiLlm(settings(url))
        found = await llm.server()
        await llm.close()
    assert (found.model, found.slots, found.context_size, found.build) == ("m", 0, context_size, build)
