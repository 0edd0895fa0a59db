"""How every process of the product logs: one line an event, to stderr, readable by people and by grep."""

import logging
import sys

import structlog
from aiokafka.errors import ProducerFenced


def to_stderr(level: int) -> None:
    """Logs are for operators and go to stderr; what a command answers goes to stdout."""
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    # aiokafka reports each reconnection of each client as an error; the stages say what they wait on.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(_not_fenced)
    people = sys.stderr.isatty()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # Looked up at each line: whoever calls a command from Python may have put another stream there.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if people else structlog.processors.LogfmtRenderer(bool_as_flag=False),
        ],
    )


def _not_fenced(record: logging.LogRecord) -> bool:
    """A fenced aiokafka producer leaves a future behind that nobody asks for; who was fenced has logged it already."""
    return not (record.exc_info and isinstance(record.exc_info[1], ProducerFenced))
