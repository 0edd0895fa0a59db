"""Stands in for llama.cpp's binary: the wheel's server by the binary's flags.

The wheel is built without TLS, the images of the binary with it: where the entry point is given a certificate, TLS ends
here, before the wheel's server, which then listens to this container alone.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import ssl
import sys
from collections.abc import Sequence

_PART_BYTES = 64 * 1024


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while part := await reader.read(_PART_BYTES):
            writer.write(part)
            await writer.drain()
    writer.close()


async def _serve(server: Sequence[str], host: str, port: int, context: ssl.SSLContext) -> int:
    """Run the server beside a port of its own, and hand on what comes in TLS; its exit code."""
    inner = await asyncio.create_subprocess_exec(*server, "--host", "127.0.0.1", "--port", str(port + 1))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, inner.terminate)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, thither = await asyncio.open_connection("127.0.0.1", port + 1)
        except OSError:  # it still loads its model
            writer.close()
            return
        await asyncio.gather(_pass_on(reader, thither), _pass_on(there, writer))

    listener = await asyncio.start_server(connected, host, port, ssl=context)
    async with listener:
        return await inner.wait()


def main() -> int:
    """Parse the binary's flags, and run the wheel's server by its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in (
        "--model",
        "--host",
        "--ctx-size",
        "--parallel",
        "--n-gpu-layers",
        "--ssl-cert-file",
        "--ssl-key-file",
    ):
        parser.add_argument(flag)
    parser.add_argument("--port", type=int)
    parser.add_argument("--metrics", action="store_true")
    parser.add_argument("--jinja", action="store_true")
    given = parser.parse_args()
    # On a machine without a GPU: `auto` and `all` are words of the binary.
    argv = [sys.executable, "-m", "infra.local.llama", "--gpu-layers", "0", "--model", given.model]
    argv += ["--ctx", given.ctx_size, "--parallel", given.parallel]
    if given.ssl_cert_file is None:
        os.execv(argv[0], [*argv, "--host", given.host, "--port", str(given.port)])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(given.ssl_cert_file, given.ssl_key_file)
    return asyncio.run(_serve(argv, given.host, given.port, context))


if __name__ == "__main__":
    sys.exit(main())
