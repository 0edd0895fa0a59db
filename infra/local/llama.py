"""llama.cpp's own HTTP server in a process of its own: `python -m infra.local.llama --model PATH --port N`.

It comes with the `xllamacpp` wheel. Where LLAMA_SERVER_PATH (or `--server-path`) names a llama-server binary, say
one built for a GPU, that runs instead, with the equivalent flags. Either serves /health, /metrics, /completion and
/v1/chat/completions.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import httpx
import psutil

from infra.local.process import ProcessSpec, StartError, require_free_port

HOST = "127.0.0.1"

# How eagerly a thread that has nothing to do spins, 0 to 100 (50 by default): a core that spins is one that detect, the
# broker and the store could use.
_POLL = 0

# Where packages put it, and where people do.
_PLACES = (Path("/usr/bin/llama-server"), Path("/usr/local/bin/llama-server"))

# What ggml's CUDA backend prints where cudaMalloc or cuBLAS finds no memory (ggml-cuda.cu), and what llama.cpp makes of
# it while it loads; the number is the card's.
_NO_MEMORY = re.compile(
    r"cudaMalloc failed: out of memory"
    r"|CUDA error: out of memory"
    r"|CUDA error: (?:the resource allocation failed|CUBLAS_STATUS_ALLOC_FAILED)"
    r"|(?:failed|unable) to allocate CUDA\d+ buffer"
)


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """How the server runs; the events' "conditions of their making" are these.

    Attributes:
        model: A GGUF file.
        port: Where it listens.
        host: The address that it listens on.
        ctx: Context in tokens, shared by the slots.
        parallel: Slots: requests judged at the same time. One slot, no prompt cache and a fixed seed make
            completions repeatable; with 8 slots one prompt gave 5-8 different ones.
        threads: CPU threads; 0 takes all cores but one, see `threads_of`.
        gpu_layers: Layers kept on a GPU; -1 is as many as fit.
        prompt_cache: Reuse the work done for a common prefix of two prompts.
        seed: For requests that bring none; -1 is random.
        api_key: What clients must send as a bearer token; empty asks for none.
        alias: The model's name in answers; empty takes the file's name.
        server_path: A llama-server binary to run instead of the wheel's.
    """

    model: Path
    port: int = 8091
    host: str = HOST
    ctx: int = 4096
    parallel: int = 2
    threads: int = 0
    gpu_layers: int = -1
    prompt_cache: bool = True
    seed: int = -1
    api_key: str = ""
    alias: str = ""
    server_path: Path | None = None

    @property
    def url(self) -> str:
        """Where this machine reaches it, without a path."""
        return url_of(self.host, self.port)


def url_of(host: str, port: int) -> str:
    """The base address at which this machine reaches a server that listens on a host's address, without a path."""
    near = {"0.0.0.0": HOST, "::": "::1"}.get(host, host)  # noqa: S104 (looked up, not bound)
    return f"http://[{near}]:{port}" if ":" in near else f"http://{near}:{port}"


def find_server(setting: Path | None) -> Path | None:
    """The llama-server to run: that of the setting, else one that is installed; None for the wheel's.

    Raises:
        StartError: the setting names no program.
    """
    if setting is not None:
        if not (setting.is_file() and os.access(setting, os.X_OK)):
            raise StartError(f"{setting} is no program: set llm.server_path (LLAMA_SERVER_PATH) to a llama-server")
        return setting
    on_path = shutil.which("llama-server")
    found = (*_PLACES, *([Path(on_path)] if on_path else []))
    return next((path for path in found if path.is_file() and os.access(path, os.X_OK)), None)


def ran_out_of_gpu_memory(lines: Iterable[str]) -> bool:
    """Whether the server's log says that the GPU had no memory left."""
    return any(_NO_MEMORY.search(line) for line in lines)


def threads_of(threads: int) -> int:
    """How many CPU threads compute; 0 chooses: the physical cores that this process may use but one, at least one.

    The threads wait for each other after each step of each token. Where something else has one of their cores, all wait
    for the thread that waits for it: two threads on two cores, one of them busy, gave 4 tokens a second, one thread 45.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads or max(1, min(usable, psutil.cpu_count(logical=False) or usable) - 1)


def spec(settings: LlamaSettings, *, setting_name: str = "local.llama_port", allowance_s: float = 600.0) -> ProcessSpec:
    """The server as a supervisor's child. The API key travels by environment, not by the visible command line."""

    async def prepare() -> None:
        if not settings.model.is_file():
            raise StartError(
                f"No model at {settings.model}. Run `rewatch models pull`, or set NEMOTRON_MODEL_PATH to a GGUF file."
            )
        require_free_port(settings.host, settings.port, what="The LLM server", setting=setting_name)

    async def ready() -> bool:
        # 503 while the model loads: minutes for 30 GB from a slow disk.
        try:
            async with httpx.AsyncClient(trust_env=False) as client:
                return (await client.get(f"{settings.url}/health", timeout=2.0)).status_code == 200
        except httpx.HTTPError:
            return False

    env = {"LLAMA_API_KEY": settings.api_key}
    if settings.server_path is not None:
        env["LLAMA_SERVER_PATH"] = str(settings.server_path)
    return ProcessSpec(
        name="llama",
        argv=child_argv(settings),
        env=env,
        prepare=prepare,
        ready=ready,
        port=settings.port,
        ready_timeout=allowance_s,
        stop_timeout=5.0,
    )


def child_argv(settings: LlamaSettings) -> list[str]:
    """The command line of the process that serves these settings, by a binary or from the wheel."""
    return [
        *(sys.executable, "-m", "infra.local.llama", "--model", str(settings.model)),
        *("--host", settings.host, "--port", str(settings.port), "--ctx", str(settings.ctx)),
        *("--parallel", str(settings.parallel), "--threads", str(settings.threads)),
        *("--gpu-layers", str(settings.gpu_layers), "--seed", str(settings.seed), "--alias", settings.alias),
        "--prompt-cache" if settings.prompt_cache else "--no-prompt-cache",
    ]


def server_argv(settings: LlamaSettings) -> list[str]:
    """The command line of llama.cpp's `llama-server` for these settings (its default port is not ours)."""
    return [
        *(
            str(settings.server_path),
            "--model",
            str(settings.model),
            "--host",
            settings.host,
            "--port",
            str(settings.port),
        ),
        *("--ctx-size", str(settings.ctx), "--parallel", str(settings.parallel), "--seed", str(settings.seed)),
        *("--n-gpu-layers", "auto" if settings.gpu_layers < 0 else str(settings.gpu_layers), "--metrics"),
        # As the wheel has them; older builds of the binary had them off.
        *("--cont-batching", "--jinja"),
        *("--threads", str(threads_of(settings.threads)), "--poll", str(_POLL), "--poll-batch", str(_POLL)),
        *([] if settings.prompt_cache else ["--no-cache-prompt", "--cache-ram", "0", "--slot-prompt-similarity", "0"]),
        *(["--alias", settings.alias] if settings.alias else []),
    ]  # it reads LLAMA_API_KEY from the environment itself


def serve(settings: LlamaSettings) -> None:
    """Run the wheel's server until SIGTERM or SIGINT."""
    import xllamacpp  # noqa: PLC0415 - a binary start does not need it

    params = xllamacpp.CommonParams()
    params.model.path = str(settings.model)
    params.model_alias = {settings.alias or settings.model.stem}
    params.hostnames = [settings.host]
    params.port = settings.port
    params.n_ctx = settings.ctx
    params.n_parallel = settings.parallel
    params.n_gpu_layers = settings.gpu_layers
    params.sampling.seed = settings.seed % 2**32  # -1 is llama.cpp's own mark for a random one
    params.endpoint_metrics = True
    params.ui = False
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = threads_of(settings.threads)
        cpu.poll = _POLL
    if not settings.prompt_cache:
        params.cache_prompt = False
        params.cache_ram_mib = 0
        params.slot_prompt_similarity = 0.0
    if settings.api_key:
        params.api_keys = [settings.api_key]
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    server = xllamacpp.Server(params)
    print(f"serving {settings.model} on {server.listening_address}", flush=True)
    while not stop.wait(3600.0):  # in slices: an endless wait would not let Python run the signal's handler
        pass
    del server


def main() -> None:
    """Parse the flags, then become the binary or serve from the wheel."""
    parser = argparse.ArgumentParser(prog="python -m infra.local.llama", description=__doc__)
    defaults = {f.name: f.default for f in fields(LlamaSettings)}
    parser.add_argument("--model", type=Path, required=True)
    for name in ("port", "ctx", "parallel", "threads", "gpu_layers", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=defaults[name])
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--alias", default="")
    parser.add_argument("--prompt-cache", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--api-key", default=os.environ.get("LLAMA_API_KEY", ""))
    parser.add_argument("--server-path", type=Path, default=os.environ.get("LLAMA_SERVER_PATH") or None)
    settings = LlamaSettings(**vars(parser.parse_args()))
    if settings.server_path is None:
        serve(settings)
        return
    if settings.api_key:
        os.environ["LLAMA_API_KEY"] = settings.api_key
    else:
        os.environ.pop("LLAMA_API_KEY", None)
    argv = server_argv(settings)
    os.execv(argv[0], argv)  # noqa: S606 - the person's own binary


if __name__ == "__main__":
    main()
