"""A program that stands where llama-server does: the same flags, the same words, and /health."""

import stat
import sys
from pathlib import Path

_CODE = """#!{python} -IS
import json, os, sys, threading, time
from http.server import BaseHTTPRequestHandler, HTTPServer

def flag(name):
    return sys.argv[sys.argv.index(name) + 1]

layers = flag("--n-gpu-layers")
layers = 999 if layers in ("auto", "all") else int(layers)
with open({notes!r}, "a") as notes:
    notes.write(json.dumps({{
        "layers": layers,
        "ctx": flag("--ctx-size"),
        "host": flag("--host"),
        "key": os.environ.get("LLAMA_API_KEY"),
        "cards": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "pid": os.getpid(),
    }}) + "\\n")

def no_memory():
    print("ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9216.00 MiB on device 0: "
          "cudaMalloc failed: out of memory", file=sys.stderr)
    print("llama_model_load: error loading model: unable to allocate CUDA0 buffer", file=sys.stderr)
    print("srv    load_model: failed to load model, '{{0}}'".format(flag("--model")), file=sys.stderr, flush=True)
    os._exit(1)

if layers > {fit}:
    no_memory()
if {dies!r} == "at once":
    print("error: unknown model architecture: 'martian'", file=sys.stderr)
    sys.exit(1)
if {dies!r} == "never answers":
    time.sleep(600)

class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{{"status": "ok"}}')
        if {dies!r} == "soon":
            threading.Timer(0.1, lambda: os._exit(7)).start()
        if {dies!r} == "of memory, later" and layers:
            threading.Timer(0.1, no_memory).start()
    def log_message(self, *_):
        pass

HTTPServer((flag("--host"), int(flag("--port"))), Health).serve_forever()
"""


def write_fake(folder: Path, *, fit: int = 10_000, dies: str = "") -> tuple[Path, Path]:
    """The program, and the file in which it notes each of its starts, a JSON object a line.

    Args:
        folder: where both lie.
        fit: layers for which its GPU has memory.
        dies: `at once`, `never answers`, `soon` (once it was healthy), `of memory, later` (the same, while it has
            layers there).
    """
    program, notes = folder / "llama-server", folder / "starts.jsonl"
    program.write_text(_CODE.format(python=sys.executable, notes=str(notes), fit=fit, dies=dies))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program, notes
