"""Checks of this machine: versions, memory, open files, time zones, GPU, disks, folders, ports."""

import asyncio
import os
import resource
import shutil
import sys
import tempfile
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import fsspec
import psutil

from infra import gpus
from infra.checks.check import Check, Context, Status, gigabytes
from infra.local.process import PortTakenError, require_free_port
from infra.private import others_look_in
from processors.telemetry.core import report, sentence
from streams.topics import TOPICS

# ClickHouse, the log, images: a first run takes 1 GB; below it the demo does not fit.
DISK_LEAST = 1 * 1024**3
DISK_LITTLE = 10 * 1024**3
# ClickHouse writes some ten files a part, the broker four a segment: a day's work makes a few thousand.
INODES_LITTLE = 100_000
# Resident: broker 0.34 GB, ClickHouse 0.5 GB, torch with a detector 0.8 GB, five small stages 0.4 GB (measured).
MEMORY_LEAST = 2 * 1024**3
# A partition of the log is a segment with two indexes, and the broker holds some 300 of its own (jars, sockets).
FILES_A_PARTITION = 3
FILES_BESIDES = 300

_COMMAND = 80
"""Characters of a command line that are shown."""

# Others' writes make no event there, and what a database calls flushed may not be.
NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "9p", "ceph", "glusterfs", "afs", "sshfs"})


async def versions(_: Context) -> list[Check]:
    """What runs: an older Python could not have read this file, so there is nothing to fail."""
    names = ("rewatch", "aiokafka", "clickhouse-connect", "chdb", "torch", "transformers", "xllamacpp")
    python = ".".join(map(str, sys.version_info[:3]))
    return [Check("versions", "ok", f"Python {python}, " + ", ".join(f"{name} {_version(name)}" for name in names))]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


async def memory(context: Context) -> list[Check]:
    """Whether everything fits; a container's limit counts."""
    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    limit = _cgroup_limit()
    if limit is not None and limit < total:
        total, free = limit, min(free, limit)
    found = f"{gigabytes(free)} free of {gigabytes(total)}"
    if not context.running and free < MEMORY_LEAST:
        fix = "stop other programs, or set kafka.bootstrap_servers, clickhouse.url or llm.url to servers elsewhere"
        return [Check("memory", "warning", found, fix)]
    return [Check("memory", "ok", found)]


def _cgroup_limit(file: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


async def open_files(context: Context) -> list[Check]:
    """Whether the broker may open its files. A JVM raises its own soft limit to the hard one."""
    settings = context.settings
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    partitions = sum(1 if topic.single else settings.kafka.partitions for topic in TOPICS.values())
    needed = FILES_BESIDES + FILES_A_PARTITION * partitions
    shown = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    found = f"{soft} open files, {shown} at most"
    if settings.local_kafka and hard != resource.RLIM_INFINITY and hard < needed:
        fix = f"`ulimit -Hn {2 * needed}` before the start (LimitNOFILE= in a unit), or lower kafka.partitions"
        return [Check("files", "warning", f"{found}; the broker wants {needed}", fix)]
    return [Check("files", "ok", found)]


async def time_zone(context: Context) -> list[Check]:
    """Whether the time zone of cameras is known here."""
    name = context.settings.time_zone
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        fix = "set time_zone to an IANA name, as Europe/Berlin; `pip install tzdata` where every name is unknown"
        return [Check("time zone", "failed", f"{name!r} is not in the time zone database", fix)]
    return [Check("time zone", "ok", name)]


async def gpu(context: Context) -> list[Check]:
    """Which GPUs NVML sees, said plainly."""
    seen = await gpus.look()
    settings = context.settings
    found = sentence(report(seen))
    if seen.state != "cards":
        wants = [
            name
            for name, wanted in (
                ("detector.device: cuda", settings.detector.url is None and settings.detector.device == "cuda"),
                (f"llm.gpu_layers: {settings.llm.gpu_layers}", settings.local_llm and settings.llm.gpu_layers > 0),
            )
            if wanted
        ]
        if wants:
            fix = "install NVIDIA's driver (`nvidia-smi` must answer), or set detector.device and llm.gpu_layers back"
            return [Check("gpu", "failed", f"{found}, but the settings ask for one ({', '.join(wants)})", fix)]
        if seen.hung:
            return [Check("gpu", "failed", found, "restart the machine, or unload NVIDIA's driver")]
        return [Check("gpu", "ok", f"{found}: detector and LLM run on the CPU here")]
    if any(card.error for card in seen.cards):
        fix = "`dmesg | grep Xid` says why; a restart of the machine brings most cards back"
        return [Check("gpu", "failed", found, fix)]
    return [Check("gpu", "ok", found)]


async def data_dir(context: Context) -> list[Check]:
    """Whether there is a local disk with room, and the right to write on it."""
    path = context.settings.data_dir
    try:
        _probe(path)
    except OSError as error:
        return [Check("data_dir", "failed", f"{path.absolute()}: {error.strerror}", _owner_fix(path))]
    disk, inodes = shutil.disk_usage(_there(path)), os.statvfs(_there(path))
    found = f"{path.absolute()}, {gigabytes(disk.free)} free"
    fix = "make room, or set data_dir (REWATCH_DATA_DIR) to another disk"
    checks = [Check("data_dir", "ok", found)]
    if disk.free < DISK_LITTLE:
        checks = [Check("data_dir", "failed" if disk.free < DISK_LEAST else "warning", found, fix)]
    # Some file systems (btrfs, overlay on it) have no fixed number of them and say 0.
    if inodes.f_files and inodes.f_favail < INODES_LITTLE:
        status: Status = "failed" if inodes.f_favail < INODES_LITTLE // 10 else "warning"
        checks.append(Check("inodes", status, f"{path.absolute()}, room for {inodes.f_favail} more files", fix))
    if path.exists() and others_look_in(path):
        open_ = f"every user of this machine can look into {path.absolute()}: pictures, the log, keys"
        checks.append(Check("data_dir for others", "warning", open_, f"chmod o-rwx {path.absolute()}"))
    kind = _file_system(path)
    if kind in NETWORK and (context.settings.local_kafka or context.settings.local_clickhouse):
        fix = "set data_dir to a local disk: the broker's and ClickHouse's promises end at a network's cache"
        checks.append(Check("data_dir disk", "warning", f"{path.absolute()} lies on {kind}", fix))
    return checks


def _owner_fix(path: Path) -> str:
    """Who may write there, and what to do."""
    there = _there(path)
    move = "set data_dir (REWATCH_DATA_DIR) to a directory of yours"
    if there.stat().st_uid != os.geteuid():
        return f"run as its owner, `sudo chown -R $USER {there}`, or {move}"
    return f"give this user the right to write there, or {move}"


async def images(context: Context) -> list[Check]:
    """Whether the image store can be written."""
    root = context.settings.images_root
    try:
        if "://" in root:
            await asyncio.to_thread(_probe_url, root)
        else:
            _probe(Path(root))
    except Exception as error:  # noqa: BLE001 (each of fsspec's stores has its own errors)
        found = f"{root}: {type(error).__name__}: {error}"
        return [Check("images", "failed", found, "set images (REWATCH_IMAGES) to a store that can be written")]
    return [Check("images", "ok", root)]


async def inbox(context: Context) -> list[Check]:
    """Whether files can be taken from the inbox, and whether their coming is noticed."""
    folder = context.settings.ingest.folder
    if not folder.enabled:
        return [Check("inbox", "skipped", "ingest.folder.enabled is off")]
    root = folder.root
    if not root.exists():
        if os.access(_there(root), os.W_OK):
            return [Check("inbox", "ok", f"{root}: made when ingest starts")]
        return [Check("inbox", "failed", f"{root} is not there", f"`mkdir -p {root}`, or set ingest.folder.root")]
    needed = os.R_OK | os.X_OK | (0 if folder.after == "leave" else os.W_OK)
    if not root.is_dir() or not os.access(root, needed):
        fix = "let this user read and write it, set ingest.folder.after: leave for a read-only folder, or another root"
        return [Check("inbox", "failed", f"{root} cannot be used (ingest.folder.after: {folder.after})", fix)]
    kind = _file_system(root)
    if (kind in NETWORK or kind.startswith("fuse")) and not folder.polling:
        fix = "set ingest.folder.polling: true (REWATCH_INGEST__FOLDER__POLLING=true)"
        found = f"{root} lies on {kind}: files that other machines write there make no event"
        return [Check("inbox", "warning", found, fix)]
    return [Check("inbox", "ok", str(root))]


def _file_system(path: Path) -> str:
    """The type of the file system that holds the path; empty where it cannot be told."""
    there = path.resolve()
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((mounts[parent] for parent in (there, *there.parents) if parent in mounts), "")


async def ports(context: Context) -> list[Check]:
    """Whether everything that listens here can, and who has the port where it cannot."""
    settings = context.settings
    local, upload, page = settings.local, settings.ingest.upload, settings.gateway
    home = "127.0.0.1"
    wanted = [
        ("kafka", "The embedded Kafka", home, local.kafka_port, "local.kafka_port", settings.local_kafka),
        (
            "clickhouse",
            "The embedded ClickHouse",
            home,
            local.clickhouse_port,
            "local.clickhouse_port",
            settings.local_clickhouse,
        ),
        ("llama", "The embedded llama.cpp server", home, local.llama_port, "local.llama_port", settings.local_llm),
        ("ingest", "The upload endpoint", upload.host, upload.port, "ingest.upload.port", upload.enabled),
        ("gateway", "The page", page.host, page.port, "gateway.port", page.enabled),
    ]
    checks: list[Check] = []
    for process, what, host, port, setting, here in wanted:
        name = f"port {setting}"
        if not here or port == 0:
            checks.append(Check(name, "skipped", "not on this machine" if not here else "a free one is taken"))
        elif process in context.running:
            checks.append(Check(name, "ok", f"{port}, ours"))
        else:
            try:
                require_free_port(host, port, what=what, setting=setting)
                checks.append(Check(name, "ok", f"{port}, free"))
            except PortTakenError:
                variable = f"REWATCH_{setting.upper().replace('.', '__')}"
                checks.append(_taken(name, what, port, f"set {setting} ({variable}) to a free port"))
    return checks


def _taken(name: str, what: str, port: int, move: str) -> Check:
    holder = holder_of(port)
    found = f"{what} cannot listen on {port}: {'another program has it' if holder is None else f'{holder[1]} has it'}"
    if holder is None:
        return Check(name, "failed", found, f"`sudo ss -ltnp 'sport = :{port}'` names the program; stop it, or {move}")
    return Check(name, "failed", f"{found} (process {holder[0]})", f"`kill {holder[0]}`, or {move}")


def holder_of(port: int) -> tuple[int, str] | None:
    """Process id and command of whoever listens there; None where the kernel does not tell this user."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return None
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.pid and connection.laddr[1:] == (port,):
            try:
                return connection.pid, _command(psutil.Process(connection.pid))
            except psutil.Error:
                return connection.pid, "a program"
    return None


def _command(process: psutil.Process) -> str:
    """A command line short enough for a sentence: the program, and its last words where there are many."""
    program, *words = process.cmdline() or [process.name()]
    line = " ".join((Path(program).name, *words))
    return line if len(line) <= _COMMAND else f"{Path(program).name} ... {' '.join(words)[-_COMMAND // 2 :]}"


def _there(path: Path) -> Path:
    """The path, or the nearest directory above it that exists: doctor looks, and makes nothing."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _probe(directory: Path) -> None:
    """Write, flush and remove a file, as the stages will; in what holds the directory where it is not made yet.

    Raises:
        OSError: it cannot be done.
    """
    with tempfile.NamedTemporaryFile(dir=_there(directory), prefix=".doctor-") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())


def _probe_url(root: str) -> None:
    filesystem, path = fsspec.url_to_fs(f"{root.rstrip('/')}/.doctor-{uuid.uuid4().hex}")
    filesystem.pipe_file(path, b"x")
    filesystem.rm_file(path)
