"""Times that ClickHouse can hold and compare with: DateTime64(3), milliseconds since the Unix epoch, 1900 to 2299.

Python clients fail on rows beyond; EXIF can hold any year from 0 to 9999.
"""

FIRST_MS = -2_208_988_800_000
"""1900-01-01."""
LAST_MS = 10_413_791_999_999
"""2299-12-31 23:59:59.999."""
