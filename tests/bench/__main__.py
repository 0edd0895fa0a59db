"""`make bench`: every benchmark on one set of servers, a bar while it runs, a table and `bench.json` at the end."""

import argparse
import asyncio
import importlib
import json
import logging
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil
import structlog
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from infra.local import broker
from infra.local.llama import LlamaSettings
from infra.local.stack import LocalStack
from infra.models.library import DEMO
from tests.bench.figure import Figure, Pair

MODULES = (
    "hosts",
    "ingest",
    "sink",
    "cpu_runtime",
    "detect",
    "analyze",
    "replay",
    "parse",
    "prefix",
    "scale",
    "runtime",
    "latency",
)
"""The benchmarks of this folder, in the order in which they run."""

# Four windows judged at once, each with the context that the demo's analyst was trained for, tokens.
SLOTS = 4
CONTEXT = 2048


class Benchmark(Protocol):
    """What each module of `MODULES` has."""

    NAMES: tuple[str, ...]
    """The figures it makes."""

    async def measure(
        self, stack: LocalStack, progress: Callable[[float], None], *, quick: bool = False
    ) -> list[Figure]:
        """Measure; `progress` takes 0..1. `quick` only shows that it runs: its figures mean nothing."""


def benchmarks() -> dict[str, Benchmark]:
    """Every benchmark by its module's name, in order."""
    return {name: importlib.import_module(f"tests.bench.{name}") for name in MODULES}  # type: ignore[misc]


async def run(chosen: dict[str, Benchmark], console: Console, *, quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """Start the servers, measure, stop them; the figures and the machine they were taken on."""
    llama = LlamaSettings(model=DEMO / "analyst.gguf", port=0, ctx=SLOTS * CONTEXT, parallel=SLOTS)
    figures: list[Figure] = []
    columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with tempfile.TemporaryDirectory(prefix="rewatch-bench-") as directory:
        with console.status("starting Kafka, ClickHouse and llama.cpp ..."):
            stack = LocalStack(Path(directory), kafka_port=0, clickhouse_port=0, llama=llama)
            await stack.start()
        try:
            machine = await describe(stack)
            with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
                for name, benchmark in chosen.items():
                    task = bar.add_task(name, total=1.0)
                    figures += await benchmark.measure(
                        stack, lambda done, task=task: bar.update(task, completed=done), quick=quick
                    )
                    bar.update(task, completed=1.0)
        finally:
            await stack.stop()
    return figures, machine


async def describe(stack: LocalStack) -> dict[str, Any]:
    """The machine and the versions that the figures belong to."""
    async with httpx.AsyncClient(trust_env=False) as client:
        clickhouse = (await client.get(stack.clickhouse_url, params={"query": "SELECT version()"})).text.strip()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "kafka": broker.ARTIFACTS.split("+")[0].rpartition(":")[2],
        "clickhouse": clickhouse,
        "llama.cpp": f"xllamacpp {version('xllamacpp')}",
        "torch": version("torch"),
        "aiokafka": version("aiokafka"),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def show(figures: list[Figure], console: Console) -> None:
    """The table, and which aims were missed."""
    table = Table(Column("figure", no_wrap=True), "product", "baseline", "unit", "ratio", "its pairs", "aim")
    for figure in figures:
        low_high = f"{figure.spread[0]:.2f} .. {figure.spread[1]:.2f}" if figure.spread else ""
        table.add_row(
            figure.name,
            _number(figure.value),
            _number(figure.baseline),
            figure.unit,
            f"{figure.ratio:.2f}",
            low_high,
            f"{figure.aim:.2f}" if figure.aim is not None else "",
            style="yellow" if figure.missed else None,
        )
    console.print(table)
    missed = [figure.name for figure in figures if figure.missed]
    console.print(f"aims missed: {', '.join(missed)}" if missed else "every aim is met")


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def write(figures: list[Figure], machine: dict[str, Any], out: Path) -> tuple[Path, Path]:
    """The list of figures, and beside it, for whoever doubts them, the machine and every pair."""
    beside = out.with_name(f"{out.stem}-machine.json")
    out.write_text(json.dumps([figure.as_json() for figure in figures], indent=2) + "\n")
    pairs = {figure.name: [_short(pair) for pair in figure.pairs] for figure in figures if figure.pairs}
    # One pair a line.
    text = json.dumps({"machine": machine, "pairs": pairs}, indent=2)
    beside.write_text(re.sub(r"\[\s+([\d.]+),\s+([\d.]+)\s+\]", r"[\1, \2]", text) + "\n")
    return out, beside


def _short(pair: Pair) -> list[float]:
    return [round(rate, 3) for rate in pair]


def main() -> None:
    """Measure what was asked for."""
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    found = benchmarks()
    names = [name for benchmark in found.values() for name in benchmark.NAMES]
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="See tests/bench/README.md.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[*found, *names], help="modules or figures")
    parser.add_argument("--quick", action="store_true", help="only show that everything runs: the figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="default: bench.json")
    arguments = parser.parse_args()
    chosen = {
        module: benchmark
        for module, benchmark in found.items()
        if arguments.only is None or {module, *benchmark.NAMES} & set(arguments.only)
    }
    console = Console()
    began = time.monotonic()
    figures, machine = asyncio.run(run(chosen, console, quick=arguments.quick))
    machine["seconds"] = round(time.monotonic() - began)
    out, beside = write(figures, machine, arguments.out)
    show(figures, console)
    console.print(f"{machine['seconds']} s; written: {out}, {beside}")


if __name__ == "__main__":
    main()
