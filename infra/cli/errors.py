"""What a person can mend, as one line and an exit code; whatever nobody expects keeps its traceback."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

from infra.cli.output import AWAY, NO, USAGE, console, fail, working

if TYPE_CHECKING:
    from infra.config import Settings

T = TypeVar("T")


def run(settings: "Settings", main: Callable[[], Coroutine[Any, Any, T]], *, doing: str = "reading ...") -> T:
    """Run a command's work; a service that is away, or says no, is one clear line and an exit code."""

    def answer() -> T:
        with working(doing):
            return asyncio.run(main())

    return mendable(settings, answer)


def mendable(settings: "Settings", work: Callable[[], T]) -> T:
    """Do it; failures that a person can mend are one line and an exit code."""
    try:
        return work()
    except Exception as error:
        _say(settings, error)
        raise


def _say(settings: "Settings", error: Exception) -> None:
    """End the command if a person can mend the error. The classes are imported here: only an error is worth it."""
    from aiokafka.errors import KafkaError

    from infra import topology
    from infra.local.process import StartError
    from infra.local.supervisor import AlreadyRunningError, ProcessFailedError
    from infra.masks import Masks, secrets_of
    from processors.detect.settings import ModelError
    from processors.store.queries import QueryError
    from schemas.migrations import MigrationError
    from streams.admin import TopicsError
    from streams.errors import FencedError, UnavailableError, UncertainError
    from streams.kafka import Kafka
    from streams.registry import RegistryError
    from streams.serving import SettingsError

    def said(message: str, code: int) -> NoReturn:
        # Libraries' errors and a child's last lines may name what they were given.
        fail(Masks(secrets_of(settings)).text(message), code)

    match error:
        case AlreadyRunningError():
            console().print(str(error))
            raise typer.Exit(0) from None
        case SettingsError() | ModelError() | TopicsError() | MigrationError() | RegistryError():
            said(str(error), USAGE)
        case UnavailableError():
            fixes = topology.fixes(settings)
            fix = {"store": fixes["clickhouse"], "broker": f"; {fixes['broker']}"}.get(error.waiting_on, "")
            said(f"{error}{fix}", AWAY)
        case StartError() | ProcessFailedError():
            said(str(error), AWAY)
        case KafkaError() | TimeoutError() | FencedError() | UncertainError():
            said(Kafka(settings.kafka).away(error, topology.fixes(settings)["broker"]), AWAY)
        case QueryError():
            said(f"ClickHouse: {error}", NO)
        case PermissionError() if error.filename is not None:
            said(
                f"{error.filename}: {error.strerror}: data_dir ({settings.data_dir}) belongs to another user; "
                "run as that user, or set data_dir (REWATCH_DATA_DIR) to a directory of your own",
                USAGE,
            )
