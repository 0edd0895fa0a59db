"""How every process of the product logs: one line an event, to stderr, readable by people and by grep.

A line is about one thing and names it by its ids: `event`, `batch`, `frame`, `camera`; `topic`, `partition`, `offset`;
`origin` for dead letters; `stage` for the process. What happened is `msg`. `grep EVENT` finds the story of a verdict.
"""

import logging
import re
import sys
import warnings
from collections.abc import Iterable
from typing import Any, Literal, TextIO

import structlog
from aiokafka.errors import ProducerFenced
from pydantic import BaseModel, ConfigDict, Field
from structlog.typing import EventDict, Processor

from infra.masks import Masks

Style = Literal["auto", "console", "logfmt", "json"]

# C0 and C1 but the tab and the end of a line, which tracebacks have.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

# What a reader looks for first.
_ORDER = ("timestamp", "level", "msg", "stage", "event", "batch", "frame", "camera")


class LogSettings(BaseModel):
    """How processes log, to stderr; `rewatch up` keeps their lines below <data_dir>/logs."""

    model_config = ConfigDict(extra="forbid")

    format: Style = Field(
        "auto", description="`console` is for people, `logfmt` for grep, `json` for collectors; `auto` looks at stderr."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="`debug` has a line for every frame. Commands that only ask log warnings, or use -v."
    )


def to_stderr(level: int | str, style: Style = "auto", *, stage: str = "", secrets: Iterable[str] = ()) -> None:
    """Logs are for operators and go to stderr; what a command answers goes to stdout.

    Args:
        level: the least that is logged: logging's number, or its name as in `log.level`.
        style: as `log.format`.
        stage: what this process runs; every line of it says so.
        secrets: what no line may hold, wherever it comes from.
    """
    if isinstance(level, str):
        level = logging.getLevelNamesMapping()[level.upper()]
    # Pillow doubts an image's EXIF tag by tag, and a hostile image has 20,000: 4 MB of log. It is taken or rejected.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    chain = _chain(style, stage, Masks(secrets))
    _to_structlog(logging.getLogger(), level, chain)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # Looked up at each line: whoever calls a command from Python may have put another stream there.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, *chain],
    )


def _chain(style: Style, stage: str, masks: Masks) -> list[Processor]:
    """From an event to its line; shared by our own lines and those of libraries."""
    if style == "auto":
        style = "console" if sys.stderr.isatty() else "logfmt"

    def named(_logger: Any, _method: str, line: EventDict) -> EventDict:
        if stage:
            line.setdefault("stage", stage)
        return line

    def masked(_logger: Any, _method: str, line: EventDict) -> EventDict:
        known = ((key, masks.value(value)) for key, value in line.items())
        return {key: value if style == "json" else _harmless(value) for key, value in known}  # JSON has its own way

    def ordered(_logger: Any, _method: str, line: EventDict) -> EventDict:
        return {key: line[key] for key in (*(k for k in _ORDER if k in line), *(k for k in line if k not in _ORDER))}

    renderers: dict[str, Processor] = {
        "console": structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), sort_keys=False, event_key="msg"),
        "logfmt": _logfmt,
        "json": structlog.processors.JSONRenderer(ensure_ascii=False, default=str),
    }
    return [
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
        named,
        masked,
        # structlog's own `event` is what happened; ours is the id of a risk event, given as `_event`.
        structlog.processors.EventRenamer("msg", replace_by="_event"),
        ordered,
        renderers[style],
    ]


def _harmless(value: Any) -> Any:
    """Text without characters that steer a terminal: file names and cameras' words come from strangers."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], value) if isinstance(value, str) else value


def _logfmt(logger: Any, method: str, line: EventDict) -> str:
    """Logfmt; a traceback follows its line as people read it, since escaped it would be one line of pages."""
    traceback = line.pop("exception", None)
    text = structlog.processors.LogfmtRenderer(bool_as_flag=False)(logger, method, line)
    return text if traceback is None else f"{text}\n{traceback}"


class _Stderr(logging.StreamHandler[TextIO]):
    """Libraries' lines, to stderr as it is at each line."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def _to_structlog(root: logging.Logger, level: int, chain: list[Processor]) -> None:
    """Let libraries, and our modules that use logging itself, log in the same form."""
    ours = next((handler for handler in root.handlers if isinstance(handler, _Stderr)), None)
    if ours is None and not root.handlers:  # else whoever runs us has its own idea of logging
        ours = _Stderr()
        root.addHandler(ours)
    if ours is not None:
        # Libraries say what is wrong. What goes well (Faust's starts, each batch of changed files) only to debuggers.
        root.setLevel(level if level <= logging.DEBUG else max(level, logging.WARNING))
        for room in ("infra", "processors", "streams"):
            logging.getLogger(room).setLevel(level)
        ours.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name],
                processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *chain],
            )
        )
    # aiokafka reports each reconnection of each client as an error; the stages say what they wait on.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    # httpx tells each request with its whole address: cameras' hold passwords. httpcore tells headers.
    for library in ("httpx", "httpcore"):
        logging.getLogger(library).setLevel(logging.WARNING)
    fences = logging.getLogger("asyncio")
    if _not_fenced not in fences.filters:
        fences.addFilter(_not_fenced)


def _not_fenced(record: logging.LogRecord) -> bool:
    """A fenced aiokafka producer leaves a future behind that nobody asks for; who was fenced has logged it already."""
    return not (record.exc_info and isinstance(record.exc_info[1], ProducerFenced))
