"""The `ingest:` section of rewatch.yaml."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Secret, SecretStr, field_validator, model_validator

from processors.ingest import core
from processors.ingest.address import Address, AddressError, parse
from processors.ingest.shed import ShedSettings
from streams.serving import EndpointSettings


class FolderSettings(BaseModel):
    """The folder that cameras, FTP servers and people drop JPEG files into."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = True
    root: Path = Field(
        default=Path(".rewatch/inbox"),
        description="One sub-folder a camera, named by the camera's id; files may lie in folders below it. By default "
        "<data_dir>/inbox.",
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


class UploadSettings(EndpointSettings):
    """Ingest's own HTTP endpoint, `POST /api/upload?camera=ID`."""

    section: ClassVar[str] = "ingest.upload"

    port: int = Field(default=8100, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    auto_create: bool = Field(
        default=False, description="Make cameras that are not known; else they are answered with 404."
    )
    max_waiting: int = Field(default=64, ge=1, description="Uploads in hand at once; more are answered with 429.")
    timeout_s: float = Field(default=60.0, gt=0, description="A body that takes longer to arrive is answered with 408.")

    @model_validator(mode="after")
    def _passes_on(self) -> Self:
        if self.jwt.enabled and self.api_key is None:
            raise ValueError(
                "ingest.upload.jwt alone shuts the gateway out, which passes uploads on by ingest.upload.api_key: set "
                "it too (REWATCH_INGEST__UPLOAD__API_KEY)"
            )
        return self


class CameraUrl(Secret[str]):
    """A camera's address, which may hold a password: shown without it, and without the query."""

    def _display(self) -> str:
        try:
            return parse(self.get_secret_value()).shown
        except AddressError:
            return "(not shown)"


class SnapshotSettings(BaseModel):
    """One camera whose newest picture is fetched by HTTP, again and again. An address alone means all defaults."""

    model_config = ConfigDict(extra="forbid")

    url: CameraUrl = Field(
        description="Address of the camera's JPEG, http or https. Frigate: http://frigate:5000/api/CAMERA/latest.jpg."
    )
    user: str = Field(default="", description="User that the camera asks for, by basic or digest authentication.")
    password: SecretStr = Field(
        default=SecretStr(""),
        description="Its password. By environment: REWATCH_INGEST__SNAPSHOTS__<CAMERA>__PASSWORD.",
    )
    every_s: float = Field(
        default=1.0, ge=0.05, le=86_400, description="How often to fetch, seconds; a slow camera is asked less often."
    )
    # A camera on a bad wireless line needs seconds for a 4K picture; one that hangs is noticed soon.
    timeout_s: float = Field(default=10.0, gt=0, description="A picture that takes longer is given up, seconds.")
    insecure: bool = Field(
        default=False, description="Take any TLS certificate, as of cameras that signed their own. Anyone can be it."
    )
    link_local: bool = Field(
        default=False,
        description="Ask it at a link-local address too (169.254.0.0/16, fe80::/10), as of a camera without DHCP: in "
        "clouds whoever is answered there hands out the machine's credentials.",
    )

    @model_validator(mode="before")
    @classmethod
    def _address_alone(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _is_address(self) -> "SnapshotSettings":
        self.address  # noqa: B018 (it raises)
        return self

    @property
    def address(self) -> Address:
        """The address, with the user and the password in force."""
        return parse(self.url.get_secret_value(), self.user, self.password.get_secret_value())


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
    shed: ShedSettings = Field(default_factory=ShedSettings)
    snapshots: dict[str, SnapshotSettings] = Field(
        default_factory=dict,
        description="Cameras whose pictures are fetched by HTTP: camera id to address, or to url, every_s and so on.",
    )

    @field_validator("snapshots")
    @classmethod
    def _camera_ids(cls, snapshots: dict[str, SnapshotSettings]) -> dict[str, SnapshotSettings]:
        for camera_id in snapshots:
            try:
                core.check_camera_id(camera_id)
            except core.RejectedError as error:
                raise ValueError(f"ingest.snapshots: {error}") from error
        return snapshots

    @field_validator("time_patterns")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        core.NamePatterns(patterns)
        return patterns
