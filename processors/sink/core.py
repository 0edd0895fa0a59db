"""Records to rows: every one into `log` byte for byte, the decodable ones into their topic's typed table. Pure.

Columns follow a record's fields by rule, and the migrations have the same columns (a test compares them): a list of
records inside gives one array a field (`boxes.label`), a record inside gives columns with its field's name before
theirs (`window_threshold`), a time (`*_at`, milliseconds) stays the integer that ClickHouse's DateTime64(3) is made
of. What differs from the rule stands in `TABLES`. No row holds a wall time, so a range gives the same rows each time
it is tried.
"""

import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from types import UnionType
from typing import Any, NamedTuple

import msgspec

from processors.store.times import FIRST_MS, LAST_MS
from schemas.records import Context, Record, RiskEvent
from streams import codec
from streams.codec import DecodeError
from streams.messages import FINGERPRINT, SOURCE, Incoming, Tick
from streams.stages import Range
from streams.topics import STORED, TOPICS

Getter = Callable[[Any], Any]


class Block(NamedTuple):
    """Rows of one table, a list for each column."""

    table: str
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def part(self, start: int, stop: int) -> "Block":
        """The rows from `start` up to `stop`, exclusive."""
        return Block(self.table, {name: values[start:stop] for name, values in self.columns.items()})


class Rows(NamedTuple):
    """What one range becomes."""

    log: Block
    typed: Block
    progress: Block


POSITION = ("epoch", "partition", "offset")
"""The columns that find a row's original bytes in `log`."""


def rows(span: Range, records: Sequence[Incoming]) -> Rows:
    """The rows of a range of one topic, the same ones however often it is tried."""
    kind = TOPICS[span.topic].record
    errors: list[str] = []
    ticks: list[bool] = []
    typed: list[tuple[Incoming, Record]] = []
    for record in records:
        tick = Tick.of(record) is not None
        error = ""
        if not tick:
            try:
                typed.append((record, codec.decode(record, kind)))
            except DecodeError as failure:
                error = str(failure)
        ticks.append(tick)
        errors.append(error)
    return Rows(
        log_rows(records, errors, ticks),
        _typed_rows(span.topic, typed),
        progress_row(span, rows=len(records), ticks=sum(ticks), undecodable=sum(map(bool, errors))),
    )


def log_rows(records: Sequence[Incoming], errors: Sequence[str], ticks: Sequence[bool]) -> Block:
    """The records as they came; `errors` says of each why it has no typed row, or is empty."""
    return Block(
        "log",
        {
            "topic": [record.topic for record in records],
            "epoch": [record.epoch for record in records],
            "partition": [record.partition for record in records],
            "offset": [record.offset for record in records],
            "key": [record.key for record in records],
            "value": [record.value for record in records],
            "headers": [list(record.headers) for record in records],
            "fingerprint": [(record.header(FINGERPRINT) or b"").hex() for record in records],
            "source": [record.header(SOURCE) or b"" for record in records],
            "tick": list(ticks),
            "decode_error": list(errors),
        },
    )


def progress_row(span: Range, *, rows: int, ticks: int, undecodable: int) -> Block:
    """The row that says: this range is complete."""
    values = {**span._asdict(), "rows": rows, "ticks": ticks, "undecodable": undecodable}
    return Block("sink_progress", {name: [value] for name, value in values.items()})


def _typed_rows(topic: str, records: Sequence[tuple[Incoming, Record]]) -> Block:
    columns = {name: [get(record) for _, record in records] for name, get in TABLES[topic].items()}
    position = {name: list(map(attrgetter(name), (incoming for incoming, _ in records))) for name in POSITION}
    return Block(topic, columns | position)


def _columns(kind: type[Record], path: tuple[str, ...] = ()) -> dict[str, Getter]:
    """Columns of a record by the rule; `path` leads from the row's record to this one."""
    columns: dict[str, Getter] = {}
    for field, hint in typing.get_type_hints(kind).items():
        get = attrgetter(".".join((*path, field)))
        name = "_".join((*path, field))
        item = _item(hint)
        if _is_record(hint):
            columns |= _columns(hint, (*path, field))
        elif _is_record(item):
            for inner, take in _fields(item):
                columns[f"{name}.{inner}"] = _each(get, take)
        else:
            columns[name] = _value(field, hint, get)
    return columns


def _fields(kind: type[Record]) -> Iterable[tuple[str, Getter]]:
    """The fields of a record in a list. Records in lists inside it become tuples, in the order of their fields."""
    for field, hint in typing.get_type_hints(kind).items():
        get = attrgetter(field)
        yield field, _each(get, msgspec.structs.astuple) if _is_record(_item(hint)) else _value(field, hint, get)


def _item(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Record)


def _each(get: Getter, take: Getter) -> Getter:
    return lambda record: [take(item) for item in get(record)]


def _value(field: str, hint: Any, get: Getter) -> Getter:
    """The value of a plain field. Times are held within what ClickHouse can show."""
    if field == "at" or field.endswith("_at"):
        if isinstance(hint, UnionType):
            return lambda record: None if (time := get(record)) is None else min(max(time, FIRST_MS), LAST_MS)
        return lambda record: min(max(get(record), FIRST_MS), LAST_MS)
    return get


def _table(
    topic: str, *, without: Iterable[str] = (), renamed: Mapping[str, str] | None = None, **more: Getter
) -> Mapping[str, Getter]:
    """A topic's table: its record's columns by the rule, less some, some under other names, and some more."""
    columns = {(renamed or {}).get(name, name): get for name, get in _columns(TOPICS[topic].record).items()}
    for name in without:
        del columns[name]
    return columns | more


def _context() -> Mapping[str, Getter]:
    """The batch inside is a row of `batches`; what finds and dates it is enough here."""
    batch = {name: name.removeprefix("batch_") for name in _columns(Context) if name.startswith("batch_")}
    del batch["batch_id"]
    dates = {name: name.removeprefix("batch_") for name in ("batch_started_at", "batch_ended_at")}
    return _table(
        "contexts",
        without=batch.keys() - dates.keys(),
        renamed=dates,
        frame_ids=lambda context: [frame.frame_id for frame in context.batch.frames],
    )


def _gpu_metrics() -> Mapping[str, Getter]:
    """What a card does not tell is NULL here, also where the first version's numbers have a mark for it."""

    def told(name: str) -> Getter:
        """The value; None for the marks, which are NaN and -1."""
        get = attrgetter(name)
        return lambda metrics: value if (value := get(metrics)) >= 0 else None  # NaN is not

    numbers = ("utilization", "memory_used", "memory_total", "temperature", "power")
    return {**_table("gpu_metrics"), **{name: told(name) for name in numbers}}


TABLES: Mapping[str, Mapping[str, Getter]] = {
    # The image stays in `log`: typed rows are for questions.
    "frames": _table("frames", without=("image",), inline=lambda frame: frame.image is not None),
    "detections": _table("detections"),
    # Its own partition and epoch are those of `detections`; the row's are those of `batches`.
    "batches": _table("batches", renamed={"partition": "detections_partition", "epoch": "detections_epoch"}),
    "contexts": _context(),
    "risk_events": _table("risk_events"),
    "labels": _table("labels"),
    "alerts": _table("alerts"),
    "prompts": _table("prompts"),
    "cameras": _table("cameras", renamed={"partition": "partition_pin"}),
    "replays": _table("replays"),
    "replay_units": _table("replay_units", without=("payload",), payload_size=lambda unit: len(unit.payload)),
    # A verdict like those of `risk_events`, with the same columns.
    "replay_events": _table("replay_events", renamed={f"event_{name}": name for name in _columns(RiskEvent)}),
    "gpu_metrics": _gpu_metrics(),
    "dead_letters": _table("dead_letters", headers=lambda letter: list(letter.headers.items())),
    "dead_letter_status": _table("dead_letter_status"),
    "holds": _table("holds"),
}
"""The typed table of each stored topic: its columns and where their values come from."""
assert tuple(TABLES) == STORED, "every stored topic has a typed table, in the catalogue's order"
