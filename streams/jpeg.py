"""What tells a JPEG's bytes before anything decodes them."""

START = b"\xff\xd8\xff"

# A baseline JPEG has one scan and libjpeg's progressive script ten. A few kilobytes can ask for thousands of
# passes over a large picture; libjpeg-turbo's own documentation names this attack.
_MAX_SCANS = 100
_START_OF_SCAN = b"\xff\xda"  # inside entropy-coded data 0xff is always followed by 0x00 or a restart marker


def scans_too_many(data: bytes) -> str | None:
    """Why decoding it could take minutes; None where it could not."""
    scans = data.count(_START_OF_SCAN)
    if scans > _MAX_SCANS:
        return f"a JPEG of {scans} scans: no camera makes that, and decoding it could take minutes"
    return None
