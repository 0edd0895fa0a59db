"""Records to bytes and back, whatever the bytes."""

import contextlib
import io

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import avro_schemas
from schemas.records import BatchState, Frame, Replay
from streams import codec
from streams.errors import UnprocessableError
from streams.messages import FINGERPRINT
from streams.topics import TOPICS
from tests.examples import RECORDS, incoming


@pytest.mark.parametrize("topic", sorted(RECORDS))
def test_each_topics_record_comes_back_as_it_was(topic: str) -> None:
    assert codec.decode(incoming(topic), TOPICS[topic].record) == RECORDS[topic]


@pytest.mark.parametrize("topic", sorted(RECORDS))
def test_each_topic_has_a_key(topic: str) -> None:
    assert codec.emit(topic, RECORDS[topic]).key


@given(st.sampled_from(sorted(RECORDS)), st.none() | st.binary(), st.none() | st.binary(max_size=9))
def test_any_bytes_are_a_record_or_a_decode_error(topic: str, value: bytes | None, fingerprint: bytes | None) -> None:
    with contextlib.suppress(codec.DecodeError):
        assert isinstance(codec.decode_bytes(topic, value, fingerprint, TOPICS[topic].record), TOPICS[topic].record)


@given(st.data())
def test_a_damaged_record_is_a_record_or_a_decode_error(data: st.DataObject) -> None:
    topic = data.draw(st.sampled_from(sorted(RECORDS)))
    value, fingerprint = codec.encode(topic, RECORDS[topic])
    at = data.draw(st.integers(0, len(value) - 1))
    damaged = value[:at] + data.draw(st.binary(max_size=12)) + value[data.draw(st.integers(at, len(value))) :]
    with contextlib.suppress(codec.DecodeError):
        codec.decode_bytes(topic, damaged, fingerprint, TOPICS[topic].record)


def test_bytes_behind_a_record_are_an_error() -> None:
    value, fingerprint = codec.encode("frames", RECORDS["frames"])
    with pytest.raises(codec.DecodeError, match="left over"):
        codec.decode_bytes("frames", value + b"\x00", fingerprint, Frame)


def test_an_unknown_schema_names_the_fix() -> None:
    value, _ = codec.encode("frames", RECORDS["frames"])
    with pytest.raises(codec.DecodeError, match="upgrade the reader first"):
        codec.decode_bytes("frames", value, b"8 bytes!", Frame)


def test_without_a_fingerprint_the_current_schema_is_assumed() -> None:
    value, _ = codec.encode("frames", RECORDS["frames"])
    assert codec.decode_bytes("frames", value, None, Frame) == RECORDS["frames"]


def test_a_record_inside_another_is_read_by_the_schema_that_its_frame_names() -> None:
    """A unit of a replay holds a window; the version that wrote it may be older than the one that judges it."""
    topic = "replays"
    old = avro_schemas.history(topic)[0]
    [fingerprint] = [one for one, schema in avro_schemas.by_fingerprint(topic).items() if schema == old]
    assert fingerprint != avro_schemas.fingerprint(topic)
    said = {"replay_id": "r1", "name": "n", "state": "done", "plan": "{}", "updated_at": 1}
    out = io.BytesIO(b"\0" + codec._framed(fingerprint))
    out.seek(5)
    fastavro.schemaless_writer(out, old, said)
    assert codec.decode_bytes(topic, out.getvalue(), None, Replay) == Replay(**said)


def test_a_stage_need_not_translate_a_decode_error() -> None:
    assert issubclass(codec.DecodeError, UnprocessableError)


@pytest.mark.parametrize("key", [None, b"", b"back-yard", b"\xff", b"k" * 2_000_000])
def test_a_record_under_another_key_is_none_of_its_topic(key: bytes | None) -> None:
    with pytest.raises(codec.DecodeError, match="and b'front-door' by what it says") as caught:
        codec.decode(incoming("frames")._replace(key=key), Frame)
    assert len(str(caught.value)) < 400


def test_a_fingerprint_of_any_length_makes_a_short_message() -> None:
    with pytest.raises(codec.DecodeError) as caught:
        codec.decode_bytes("frames", codec.encode("frames", RECORDS["frames"])[0], bytes(2_000_000), Frame)
    assert len(str(caught.value)) < 400


def test_a_stranger_s_record_is_no_state_and_a_newer_version_s_is_not_passed_over() -> None:
    good = incoming("batch_state", headers=())
    assert codec.decode_state(good, BatchState) == RECORDS["batch_state"]
    for stranger in (good._replace(value=None), good._replace(value=b"garbage"), good._replace(key=b"else")):
        assert codec.decode_state(stranger, BatchState) is None
    with pytest.raises(codec.UnknownSchemaError, match="upgrade the reader first"):
        codec.decode_state(good._replace(headers=((FINGERPRINT, b"8 bytes!"),)), BatchState)
