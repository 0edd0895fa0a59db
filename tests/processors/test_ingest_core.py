"""What ingest decides: which images it takes, when they were captured, which it has seen."""

import io
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from processors.ingest import core
from tests.processors.ingest_kit import jpeg, png

UTC = ZoneInfo("UTC")
BERLIN = ZoneInfo("Europe/Berlin")
ORIGINAL, OFFSET, SUBSEC = 0x9003, 0x9011, 0x9291
WHOLE = jpeg(7)
PROGRESSIVE = jpeg(8, progressive=True)


def look(data, *, max_bytes=1_000_000, max_pixels=1_000_000, zone=UTC):
    return core.look(data, max_bytes=max_bytes, max_pixels=max_pixels, zone=zone)


def submission(**changes):
    return core.Submission("front", WHOLE, "folder", "a.jpg", 1000)._replace(**changes)


class TestLook:
    def test_a_whole_jpeg_says_its_size(self):
        assert look(WHOLE) == core.Picture(48, 32, None)

    def test_empty_could_still_come(self):
        with pytest.raises(core.RejectedError, match="empty") as error:
            look(b"")
        assert error.value.incomplete

    @pytest.mark.parametrize("data", [WHOLE, PROGRESSIVE], ids=["baseline", "progressive"])
    def test_cut_off_anywhere_is_rejected_as_incomplete(self, data):
        for end in range(1, len(data)):
            with pytest.raises(core.RejectedError) as error:
                look(data[:end])
            assert error.value.incomplete, end

    def test_a_length_set_before_the_bytes_is_incomplete(self):
        for filled in (0, 2, len(WHOLE) // 2, len(WHOLE) - 40):
            with pytest.raises(core.RejectedError) as error:
                look(WHOLE[:filled] + bytes(len(WHOLE) - filled))
            assert error.value.incomplete, filled

    def test_zeros_behind_the_image_do_no_harm(self):
        assert look(WHOLE + bytes(100)).width == 48

    def test_corrupt_inside_is_rejected_for_good(self):
        start = WHOLE.index(b"\xff\xc0")
        with pytest.raises(core.RejectedError, match="corrupt") as error:
            look(WHOLE[:start] + b"\xff\xc0\x00\x03" + WHOLE[start + 4 :])
        assert not error.value.incomplete

    def test_a_png_named_jpg_is_told_apart(self):
        with pytest.raises(core.RejectedError, match=r"PNG.*send JPEG") as error:
            look(png())
        assert not error.value.incomplete

    @pytest.mark.parametrize("data", [b"<html>no</html>", b"#!/bin/sh\n", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0junk"])
    def test_not_an_image(self, data):
        with pytest.raises(core.RejectedError):
            look(data)

    def test_too_long(self):
        with pytest.raises(core.RejectedError, match=r"ingest\.max_bytes"):
            look(WHOLE, max_bytes=len(WHOLE) - 1)
        assert look(WHOLE, max_bytes=len(WHOLE))

    def test_a_bomb_is_rejected_by_its_header_alone(self, monkeypatch):
        at = WHOLE.index(b"\xff\xc0") + 5
        bomb = WHOLE[:at] + b"\xff\xdc\xff\xdc" + WHOLE[at + 4 :]  # 65500 x 65500
        monkeypatch.setattr(core.JpegImagePlugin.JpegImageFile, "load", lambda _: pytest.fail("decoded"))
        with pytest.raises(core.RejectedError, match=r"65500x65500.*ingest\.max_pixels") as error:
            look(bomb, max_pixels=50_000_000)
        assert not error.value.incomplete

    def test_a_bomb_of_scans_is_rejected(self):
        at = PROGRESSIVE.rindex(b"\xff\xda")
        scan = PROGRESSIVE[at:-2]
        with pytest.raises(core.RejectedError, match="scans"):
            look(PROGRESSIVE[:-2] + scan * 200 + b"\xff\xd9")

    def test_grey_and_cmyk_are_pictures_too(self):
        for mode in ("L", "CMYK"):
            out = io.BytesIO()
            Image.new(mode, (9, 5)).save(out, "JPEG")
            assert look(out.getvalue())[:2] == (9, 5)

    @given(st.binary(max_size=300))
    def test_any_bytes_are_answered_with_a_reason(self, data):
        with pytest.raises(core.RejectedError):
            look(data)

    @given(st.binary(max_size=100))
    @pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the EXIF
    def test_bad_exif_does_not_make_a_bad_picture(self, junk):
        body = b"Exif\0\0" + junk
        data = WHOLE[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + WHOLE[2:]
        assert look(data)[:2] == (48, 32)


class TestCaptureTime:
    def test_exif_with_offset_and_fraction(self):
        data = jpeg(exif={ORIGINAL: "2026:11:01 12:00:00", OFFSET: "+02:00", SUBSEC: "25"})
        assert look(data, zone=BERLIN).exif_at == 1_793_527_200_250

    def test_exif_without_offset_is_the_cameras_local_time(self):
        data = jpeg(exif={ORIGINAL: "2026:11:01 12:00:00"})
        assert look(data, zone=UTC).exif_at == 1_793_534_400_000
        assert look(data, zone=BERLIN).exif_at == 1_793_530_800_000

    def test_the_head_alone_tells_exif(self):
        data = jpeg(exif={ORIGINAL: "2026:11:01 12:00:00"})
        assert core.read_exif(data[: data.index(b"\xff\xda") + 16], UTC) == 1_793_534_400_000
        assert core.read_exif(b"no", UTC) is None

    def test_of_an_hour_that_comes_twice_the_first(self):
        assert core.exif_time("2026:10:25 02:30:00", "", "", BERLIN) == 1_792_888_200_000

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "0000:00:00 00:00:00",
            "    :  :     :  :  ",
            "2026:13:01 00:00:00",
            "1969:12:31 23:59:59",
            "0001:01:01 00:00:00",
            "x",
        ],
    )
    def test_a_camera_without_a_clock_gives_none(self, text):
        assert core.exif_time(text, "", "", UTC) is None

    def test_odd_offset_and_fraction_are_left_out(self):
        assert core.exif_time("2026:11:01 12:00:00\0", "   :  ", "  ", UTC) == 1_793_534_400_000

    @pytest.mark.parametrize(
        ("pattern", "name", "at"),
        [
            ("%Y%m%d%H%M%S", "Front_00_20261101120000.jpg", 1_793_534_400_000),
            ("%Y%m%d%H%M%S%f", "192.168.1.64_01_20261101120000250_MOTION.jpg", 1_793_534_400_250),
            ("%Y-%m-%d/%H.%M.%S", "2026-11-01/12.00.00[M][0@0][0].jpg", 1_793_534_400_000),
            ("%s.%f", "front-1793534400.5-abc.jpg", 1_793_534_400_500),
            ("%Y%m%dT%H%M%S%z", "x20261101T130000+0100.jpg", 1_793_534_400_000),
            (r"(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d).(?P<hour>\d\d)(?P<minute>\d\d)", "2026-11-01_1200.jpg",
             1_793_534_400_000),
        ],
    )  # fmt: skip
    def test_file_names_of_recorders(self, pattern, name, at):
        assert core.NamePatterns([pattern]).find(name, UTC) == at

    def test_digits_that_are_no_time_give_none(self):
        patterns = core.NamePatterns(["%Y%m%d%H%M%S"])
        for name in ("20261301120000.jpg", "120261101120000.jpg", "a.jpg", ""):
            assert patterns.find(name, UTC) is None

    @pytest.mark.parametrize("pattern", ["%Y%m%d", "%Q", "(?P<year>", "%Y%Y%m%d%H%M", "x", "%"])
    def test_a_pattern_that_names_no_time_is_refused(self, pattern):
        with pytest.raises(ValueError, match="time pattern"):
            core.NamePatterns([pattern])

    @pytest.mark.parametrize(
        "text",
        [
            "2026-11-01T12:00:00Z",
            "2026-11-01T13:00:00+01:00",
            "2026-11-01T13:00:00 01:00",
            "2026-11-01 12:00:00",
            "1793534400000",
        ],
    )
    def test_clients_write_times_in_many_ways(self, text):
        assert core.client_time(text, UTC) == 1_793_534_400_000

    @pytest.mark.parametrize(
        "text", ["yesterday", "1793534400", "-1", "1e99", "9" * 40, "9" * 5000, "0001-01-01T00:00:00Z", "²"]
    )
    def test_a_client_time_that_is_none_is_refused(self, text):
        with pytest.raises(core.RejectedError, match="captured_at"):
            core.client_time(text, UTC)

    def test_client_before_exif_before_name(self):
        patterns = core.NamePatterns(["%Y%m%d%H%M%S"])
        named = submission(name="20261101120000.jpg")
        with_exif, without = core.Picture(1, 1, 5), core.Picture(1, 1, None)
        assert core.capture_time(with_exif, named._replace(client_at=3), patterns, UTC) == (3, "client")
        assert core.capture_time(with_exif, named, patterns, UTC) == (5, "exif")
        assert core.capture_time(without, named, patterns, UTC) == (1_793_534_400_000, "filename")
        assert core.capture_time(without, submission(file_at=9), patterns, UTC) == (None, "none")


class TestIdentity:
    def test_file_and_arrival_time_are_no_part_of_the_id(self):
        one = core.build_frame(submission(), look(WHOLE), (None, "none"), claim=None)
        two = core.build_frame(
            submission(arrived_at=2, file_at=3, name="b.jpg", source="upload"), look(WHOLE), (None, "none"), claim="c"
        )
        assert one.frame_id == two.frame_id
        assert (one.image, one.claim) == (WHOLE, None)
        assert (two.image, two.claim) == (None, "c")

    def test_another_capture_time_is_another_frame(self):
        ids = {core.build_frame(submission(), look(WHOLE), (at, "exif"), claim=None).frame_id for at in (None, 1, 2)}
        assert len(ids) == 3

    @pytest.mark.parametrize("camera_id", ["a", "front-door_2", "0", "a" * 63])
    def test_camera_ids(self, camera_id):
        assert core.check_camera_id(camera_id) == camera_id

    @pytest.mark.parametrize("camera_id", ["", "-a", "A", "a/b", "..", "a b", "é", "a" * 64, "a\n"])
    def test_what_is_no_camera_id(self, camera_id):
        with pytest.raises(core.RejectedError, match="camera id"):
            core.check_camera_id(camera_id)

    @pytest.mark.parametrize(
        ("name", "clean"),
        [
            ("../../etc/passwd.jpg", "etc/passwd.jpg"),
            ("/abs/x.jpg", "abs/x.jpg"),
            ("..\\..\\x.jpg", "x.jpg"),
            ("a\x00b\n.jpg", "a?b?.jpg"),
            ("\udcff.jpg", "?.jpg"),
            ("..", ""),
        ],
    )
    def test_names_lead_nowhere(self, name, clean):
        assert core.clean_name(name) == clean


class TestMemory:
    def test_remembers_across_a_restart(self):
        memory = core.Memory("front", core.Memory("front").state(["a", "b"], 2, 1))
        assert memory.knows("a")
        assert not memory.knows("c")
        assert (memory.frames, memory.unchanged) == (2, 1)

    def test_forgets_the_oldest_beyond_a_thousand(self):
        state = core.Memory("front").state([f"f{i}" for i in range(1000)], 1000)
        memory = core.Memory("front", state)
        assert memory.knows("f0")
        state = memory.state(["new"], 1)
        memory = core.Memory("front", state)
        assert not memory.knows("f0")
        assert memory.knows("f1")
        assert memory.knows("new")
        assert (len(state.digests), memory.frames) == (8000, 1001)

    def test_committed_it_is_what_a_successor_reads(self):
        memory = core.Memory("front")
        for start in range(0, 2500, 7):  # beyond the thousand that are remembered
            names = [f"f{n}" for n in range(start, start + 7)]
            state = memory.state(names, 7, 1)
            memory.committed(state, names)
            assert memory.state() == core.Memory("front", state).state() == state
        assert not memory.knows("f0")
        assert memory.knows("f2499")

    def test_nothing_changes_before_it_is_committed(self):
        memory = core.Memory("front")
        memory.state(["a"], 1)
        assert not memory.knows("a")
        assert memory.frames == 0
