"""What the tests need of the machine: podman, a base image made of Debian's packages, podman-compose, our images."""

import os
import shutil
import subprocess
import sys
import venv
from functools import cache
from pathlib import Path

import pytest

from tests.containers.podman import RUN, build, image, run, say

TREE = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
CACHE = Path.home() / ".cache" / "rewatch-containers"

# Another number where the packages change: the base of the last time is kept.
BASE = "localhost/rewatch-test/base:2"
STAND_IN = "localhost/rewatch-test/stand-in:1"
PROCESSORS = "localhost/rewatch-test/processors:1"
LLAMA = "localhost/rewatch-test/llama:1"

PACKAGES = "podman runc netavark aardvark-dns iptables iproute2 debootstrap openssl"

# curl and wget are what the health checks of compose.yaml ask with; the wheel of llama.cpp wants libgomp1.
_IN_BASE = "ca-certificates,curl,libgomp1,python3,python3-venv,wget"


def lacks() -> str | None:
    """Why the tests cannot run here, and the fix; None where they can."""
    if os.geteuid() != 0:
        return "podman runs as root here: the tests make networks, and cut them"
    tools = ("podman", "runc", "debootstrap", "iptables", "ip", "nsenter", "openssl")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        return f"there is no {', '.join(missing)}: apt-get install {PACKAGES}"
    return None


def make_base() -> None:
    """Debian's packages as an image, once; nothing is pulled."""
    if image(BASE):
        return
    root = CACHE / "base"
    if not (root / "usr/bin/wget").exists():
        shutil.rmtree(root, ignore_errors=True)
        root.parent.mkdir(parents=True, exist_ok=True)
        say("making the base image by debootstrap: two minutes, kept for later")
        run(["debootstrap", "--variant=minbase", f"--include={_IN_BASE}", "bookworm", str(root)], within=900)
    # Where the machine's way out has certificates of its own, pip needs them inside, too.
    bundle = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))
    inside = "/etc/ssl/certs/ca-certificates.crt"
    if bundle.is_file():
        shutil.copyfile(bundle, root / inside.lstrip("/"))
    (root / "root").chmod(0o755)  # the host's environment may lie below a folder of that name
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
        subprocess.run(
            [
                *("podman", "import", "--change", f"ENV SSL_CERT_FILE={inside}"),
                *("--change", f"ENV PIP_CERT={inside}", "-", BASE),
            ],
            stdin=tar.stdout,
            check=True,
            capture_output=True,
            timeout=300,
        )


@cache
def make_images() -> None:
    """The product's own images from its own files, and what the stand-ins run on; once a run."""
    images = TREE / "infra" / "images"
    say("building the image of the processors")
    build(PROCESSORS, images / "rewatch.Dockerfile", TREE, within=1200, target="processors", python_image=BASE)
    say("building the image of llama.cpp's server, on the base")
    build(LLAMA, images / "llama.Dockerfile", TREE, within=300, llama_image=BASE)
    build(STAND_IN, HERE / "stand-in.Dockerfile", HERE, within=300, base=BASE)


def make_tools() -> Path:
    """podman-compose and hadolint in an environment of their own, once a lock; returns where the programs lie."""
    root = CACHE / "tools"
    lock = (HERE / "tools.lock").read_bytes()
    done = root / "done.lock"
    if not done.exists() or done.read_bytes() != lock:
        say("installing podman-compose and hadolint")
        venv.create(root, clear=True, with_pip=True)
        pip = [str(root / "bin" / "python"), "-m", "pip", "install", "-q", "--only-binary", ":all:", "--require-hashes"]
        run([*pip, "-r", str(HERE / "tools.lock")], within=300)
        done.write_bytes(lock)
    return root / "bin"


def host_environment() -> dict[str, str]:
    """Where this interpreter and its packages lie, for containers that run on them."""
    base = Path(sys.base_prefix)
    return {
        "TEST_PYTHON": str(Path(sys.prefix) / "bin" / "python"),
        "TEST_TREE": str(TREE),
        "TEST_PREFIX": sys.prefix,
        # Debian's own interpreter is in the base image, too.
        "TEST_BASE_PREFIX": "/usr/share/zoneinfo" if base == Path("/usr") else str(base),
        "TEST_HOME": str(Path.home()),
    }


def cannot_run() -> str | None:
    """Why no container can be run here with a network of its own, or not with this interpreter; None where it can."""
    env = host_environment()
    mounts = [f"-v={env[name]}:{env[name]}:ro" for name in ("TEST_PREFIX", "TEST_BASE_PREFIX")]
    for what, argv in (
        ("a container with a network of its own", [*RUN, "--network", "bridge", BASE, "true"]),
        ("this Python in a container of Debian 12", [*RUN, *mounts, BASE, env["TEST_PYTHON"], "-c", "import ssl"]),
    ):
        done = subprocess.run(argv, check=False, capture_output=True, timeout=120)
        if done.returncode != 0:
            return f"this machine does not run {what}: {done.stderr.decode(errors='replace')[-500:]}"
    return None


def ready() -> None:
    """Make what the tests run on; where the machine cannot, skip with a line that says why."""
    why = lacks()
    if why is None:
        make_base()
        why = cannot_run()
    if why is not None:
        say(f"containers are not tested here: {why}")
        pytest.skip(why)
    make_images()
