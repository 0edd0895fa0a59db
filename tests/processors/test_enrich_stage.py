"""enrich: what a context says of its camera."""

import msgspec
import pytest

from processors.enrich.stage import build, context
from schemas import ids
from schemas.records import Batch, Camera, Context, WindowSettings
from streams import codec
from streams.errors import UnprocessableError
from streams.messages import FINGERPRINT, Incoming
from tests.processors import analyze_samples as samples


def camera(**changes) -> Camera:
    values = {
        "camera_id": "front-door",
        "name": "Front door",
        "time_zone": "America/New_York",
        "zones": (),
        "window": WindowSettings(
            open_on=("person",),
            threshold=0.5,
            idle_ms=30_000,
            max_ms=90_000,
            max_frames=50,
            fast_label="person",
            fast_score=0.9,
            fast_cooldown_ms=90_000,
            stationary_iou=0.85,
        ),
        "updated_at": 0,
    }
    return Camera(**(values | changes))


def incoming(batch: Batch) -> Incoming:
    value, fingerprint = codec.encode("batches", batch)
    return Incoming("batches", "e", 3, 7, b"front-door", value, ((FINGERPRINT, fingerprint),))


async def test_context_carries_the_batch_whole_and_the_cameras_name_and_zone():
    batch = samples.context().batch
    stage = build({"front-door": camera()}.get)
    (emit,) = await stage.handle(incoming(batch))
    assert emit.topic == "contexts"
    assert emit.key == b"front-door"
    found = codec.decode_bytes("contexts", emit.value, emit.headers[0][1], Context)
    # Boxes are 32-bit floats on the log: the batch is what the log gives back of it.
    assert found.batch == codec.decode(incoming(batch), Batch)
    assert (found.batch_id, found.camera_name, found.time_zone) == (batch.batch_id, "Front door", "America/New_York")
    assert found.sections == ()


def test_unknown_camera_goes_by_its_id_in_utc():
    found = context(samples.context().batch, None)
    assert (found.camera_name, found.time_zone) == ("front-door", "UTC")


@pytest.mark.parametrize("zone", ["", "Berlin", "../../etc/passwd", "Europe"])
def test_a_time_zone_that_is_none_is_a_dead_letter_which_names_the_fix(zone):
    with pytest.raises(UnprocessableError, match="rewatch camera set front-door --time-zone"):
        context(samples.context().batch, camera(time_zone=zone))


async def test_bytes_that_are_no_batch_are_a_dead_letter():
    with pytest.raises(UnprocessableError, match="Confluent"):
        await build(lambda _: None).handle(Incoming("batches", "e", 0, 0, b"k", b"nonsense", ()))


@pytest.mark.parametrize("batch_id", ["front-door:" + "0" * 32, "b" * 1_000_000])
def test_a_batch_under_another_name_is_a_dead_letter(batch_id):
    with pytest.raises(UnprocessableError, match="whose name is not theirs") as caught:
        context(msgspec.structs.replace(samples.context().batch, batch_id=batch_id), camera())
    assert len(str(caught.value)) < 400


def test_a_batch_without_frames_is_a_dead_letter():
    empty = msgspec.structs.replace(samples.context().batch, frames=(), batch_id=ids.batch_id("front-door", []))
    with pytest.raises(UnprocessableError, match="a batch of 0 frames"):
        context(empty, camera())
