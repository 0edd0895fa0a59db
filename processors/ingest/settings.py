"""The `ingest:` section of rewatch.yaml."""

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from processors.ingest import core


class SettingsError(Exception):
    """A setting cannot be used here; the message names it and the fix."""


class FolderSettings(BaseModel):
    """The folder that cameras, FTP servers and people drop JPEG files into."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = True
    root: Path = Field(
        default=Path(".rewatch/inbox"),
        description="One sub-folder a camera, named by the camera's id; files may lie in folders below it.",
    )
    cameras: dict[str, str] = Field(
        default_factory=dict,
        description="Sub-folder to camera id, where the names differ; `.` is the root itself.",
    )
    auto_create: bool = Field(
        default=True,
        description="Make cameras that are not known: whoever can make a sub-folder means it.",
    )
    after: Literal["move", "delete", "leave"] = Field(
        default="move",
        description="What becomes of a file that was taken: it moves to .done/<date>/ in its camera's folder, is "
        "deleted, or stays and is noted in the cursor.",
    )
    cursor: Path | None = Field(
        default=None,
        description="With `after: leave`, the file that notes what was taken; by default .rewatch-cursor in the root.",
    )
    stable_s: float = Field(
        default=2.0, ge=0, description="A file is whole when size and time stood still this long, seconds."
    )
    incomplete_s: float = Field(
        default=60.0,
        ge=0,
        description="An empty or cut-off file is rejected only when it stood still this long: its sender may stall.",
    )
    polling: bool = Field(default=False, description="Look every poll_s instead of waiting for events: NFS, SMB, FUSE.")
    poll_s: float = Field(default=2.0, gt=0, description="How often to look where there are no events, seconds.")
    rescan_s: float = Field(
        default=60.0, gt=0, description="How often to look besides events, seconds: events can be lost."
    )
    ignore: tuple[str, ...] = Field(
        default=(
            *("*.tmp", "*.part", "*.partial", "*.filepart", "*.crdownload", "*.swp", "*~"),  # still being written
            *("*.mp4", "*.avi", "*.mkv", "*.mov", "*.264", "*.265", "*.dav"),  # recordings beside the stills
            *("*.txt", "*.log", "*.xml", "*.json", "*.idx", "*.db", "*.ini"),  # what recorders and systems leave
        ),
        description="File names (globs, case ignored) that are no images and stay where they are.",
    )

    @field_validator("cameras")
    @classmethod
    def _camera_ids(cls, cameras: dict[str, str]) -> dict[str, str]:
        for folder, camera_id in cameras.items():
            try:
                core.check_camera_id(camera_id)
            except core.RejectedError as error:
                raise ValueError(f"ingest.folder.cameras: {folder}: {error}") from error
        return cameras


class UploadSettings(BaseModel):
    """Ingest's own HTTP endpoint, `POST /api/upload?camera=ID`."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = True
    host: str = Field(default="127.0.0.1", description="Address to listen on; other than loopback needs an api_key.")
    port: int = Field(default=8100, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: SecretStr | None = Field(
        default=None,
        description="Asked for as `Authorization: Bearer` or `X-API-Key`. By environment: "
        "REWATCH_INGEST__UPLOAD__API_KEY.",
    )
    auto_create: bool = Field(
        default=False, description="Make cameras that are not known; else they are answered with 404."
    )
    max_waiting: int = Field(default=64, ge=1, description="Uploads in hand at once; more are answered with 429.")
    timeout_s: float = Field(default=60.0, gt=0, description="A body that takes longer to arrive is answered with 408.")
    tls: Literal["auto", "off"] = Field(
        default="auto", description="`auto` listens with TLS where a certificate is set."
    )
    tls_cert_path: Path | None = Field(default=None, description="PEM certificate chain: listen with TLS.")
    tls_key_path: Path | None = Field(default=None, description="PEM key of tls_cert_path.")
    tls_min_version: Literal["1.2", "1.3"] = Field(default="1.2", description="Oldest TLS that is spoken.")

    @model_validator(mode="after")
    def _open_to_others(self) -> "UploadSettings":
        if self.enabled and self.api_key is None and not _is_loopback(self.host):
            raise ValueError(
                f"ingest.upload.host {self.host} can be reached by others: set ingest.upload.api_key "
                "(REWATCH_INGEST__UPLOAD__API_KEY), or listen on 127.0.0.1",
            )
        if self.api_key is not None and not self.api_key.get_secret_value():
            raise ValueError("ingest.upload.api_key is empty: set one, or leave it out")
        if (self.tls_cert_path is None) != (self.tls_key_path is None):
            raise ValueError("ingest.upload.tls_cert_path and ingest.upload.tls_key_path belong together: set both")
        return self

    @property
    def with_tls(self) -> bool:
        """Whether it listens with TLS."""
        return self.tls == "auto" and self.tls_cert_path is not None

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host).strip("[]")  # noqa: S104 (looked up, not bound)
        scheme = "https" if self.with_tls else "http"
        return f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"


class IngestSettings(BaseModel):
    """What is taken, and from where."""

    model_config = ConfigDict(extra="forbid")

    # A 4K JPEG at high quality has 4 MB; the detector API that clients know refuses more than 10 MB too.
    max_bytes: int = Field(default=10_000_000, ge=1, description="Longest image file, bytes.")
    # 8K is 33 Mpx; decoding 50 Mpx for the detector takes 150 MB.
    max_pixels: int = Field(default=50_000_000, ge=1, description="Largest picture, width times height.")
    time_patterns: tuple[str, ...] = Field(
        default=(),
        description="Capture times in file names, as for strptime with %s for Unix seconds, or a regular expression "
        "with named groups (year month day hour minute second fraction offset, or epoch); the first that fits, "
        "searched in the name with its folders, local to the camera's time zone. Reolink: %Y%m%d%H%M%S. "
        "Hikvision: %Y%m%d%H%M%S%f. Frigate: %s.%f.",
    )
    idle_s: float = Field(
        default=60.0, gt=0, description="A camera's producer is closed after this long without a frame, s."
    )
    deadline_s: float = Field(
        default=30.0, gt=0, description="How long one append fights for its camera before it gives up, s."
    )
    folder: FolderSettings = Field(default_factory=FolderSettings)
    upload: UploadSettings = Field(default_factory=UploadSettings)

    @field_validator("time_patterns")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        core.NamePatterns(patterns)
        return patterns


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
