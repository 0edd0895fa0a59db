"""The broker, the store and the LLM server of one machine, brought up together."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Self

from infra.local import clickhouse, llama
from infra.local.broker import Broker
from infra.local.llama import LlamaSettings
from infra.local.process import ProcessSpec, free_port
from infra.local.supervisor import Supervisor

SERVERS = ("kafka", "clickhouse", "llama")


class LocalStack:
    """An async context manager: inside it the three servers answer; after it nothing of them runs.

    `supervisor` takes more processes (`await stack.supervisor.add(...)`) that may need `kafka`, `clickhouse`, `llama`.
    """

    def __init__(
        self,
        data_dir: Path = Path(".rewatch"),
        *,
        kafka_port: int = 9092,
        kafka_secure: bool = False,
        clickhouse_port: int = 8123,
        llama: LlamaSettings | None = None,
        without: Iterable[str] = (),
    ) -> None:
        """Prepare; nothing starts yet.

        Args:
            data_dir: Everything they keep lies below it.
            kafka_port: 0 picks a free one, here and for the others.
            kafka_secure: Whether the broker asks for TLS and a password, which lie in `tls` below the directory.
            clickhouse_port: As above.
            llama: How the LLM server runs; None starts none.
            without: Names (`kafka`, `clickhouse`, `llama`) that run elsewhere and are not started.
        """
        self.data_dir = data_dir.resolve()
        self.supervisor = Supervisor(self.data_dir)
        self._without = {*without, *(() if llama else ("llama",))}
        self._broker = Broker(self.data_dir / "kafka", kafka_port, secure=self.data_dir if kafka_secure else None)
        self._clickhouse_port = clickhouse_port or free_port()
        self._llama = replace(llama, port=llama.port or free_port()) if llama else None

    @property
    def bootstrap_servers(self) -> str:
        """For Kafka clients: `host:port`."""
        return self._broker.bootstrap_servers

    @property
    def clickhouse_url(self) -> str:
        """For ClickHouse's HTTP clients: `http://host:port`."""
        return f"http://{clickhouse.HOST}:{self._clickhouse_port}"

    @property
    def llm_url(self) -> str:
        """The LLM server's base address, without `/v1`.

        Raises:
            ValueError: The stack runs no LLM server.
        """
        if self._llama is None:
            raise ValueError("this stack was made without an LLM server")
        return self._llama.url

    async def start(self, *more: ProcessSpec) -> None:
        """Start the servers, and whatever else, side by side; returns when all answer.

        Raises:
            AlreadyRunningError: This data directory is in use; the error carries what runs there.
            StartError: One of them cannot start; nothing is left running.
        """
        await self.supervisor.start()
        try:
            await self.supervisor.add(*(await self._specs()), *more)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop whatever the supervisor runs, in reverse order. The data stay."""
        await self.supervisor.stop()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _specs(self) -> list[ProcessSpec]:
        specs: list[ProcessSpec] = []
        if "kafka" not in self._without:
            specs.append(await self._broker.spec())
        if "clickhouse" not in self._without:
            specs.append(clickhouse.spec(self.data_dir / "clickhouse", self._clickhouse_port))
        if self._llama is not None and "llama" not in self._without:
            specs.append(llama.spec(self._llama))
        return specs
