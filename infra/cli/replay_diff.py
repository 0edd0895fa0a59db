"""`rewatch replay diff`: two sides compared, and conditions on the figures for build servers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from infra.cli import complete
from infra.cli.errors import run
from infra.cli.help import examples
from infra.cli.output import (
    LEVEL_STYLES,
    NO,
    USAGE,
    JsonFlag,
    console,
    fail,
    print_json,
    print_table,
    printable,
    when,
)

if TYPE_CHECKING:
    from infra.config import Settings
    from processors.replay.comparison import Comparison, Estimate, Flip, Pair, Regrouping, Side, Slice, Verdict
    from processors.replay.figures import Condition

# A comparison reads some hundred thousand verdicts at once: seconds, on a busy machine a minute.
ASK_S = 600.0

_LIMIT = 20

# Characters of a digest that people are shown.
_DIGEST = 12

# Characters of the hash in an event's id: enough for `rewatch explain` to find one among millions.
_SHORT_ID = 10

_KINDS = {
    "alarm_lost": Text("alarm lost", style="bold red"),
    "alarm_new": Text("new alarm", style="red"),
    "raised": Text("raised", style="yellow"),
    "lowered": Text("lowered", style="green"),
}


def register(app: typer.Typer) -> None:
    """Add this command to the group `rewatch replay`."""
    app.command(
        epilog=examples(
            "rewatch replay diff live stricter",
            "rewatch replay diff live stricter --json | jq '.flip_list[0]'",
            "rewatch replay diff live stricter --fail-on 'flips>0.02' --fail-on 'recall<0.9'",
            "rewatch replay diff live again --strict   # byte for byte",
        )
    )(diff)


def _sides(ctx: typer.Context, incomplete: str) -> complete.Completions:
    """What can be compared."""
    if "live".startswith(incomplete):
        yield "live", "what was said live"
    yield from complete.replays(ctx, incomplete)


def diff(  # noqa: PLR0917 (typer makes options of parameters)
    ctx: typer.Context,
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", help="What B is compared with: live, or a replay's name or id.", autocompletion=_sides
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="What is compared with it: the same.", autocompletion=_sides)],
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Byte for byte, where both were judged under strict conditions; else exit 1."),
    ] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Exit 1 where it holds: FIGURE OPERATOR NUMBER, as flips>0.02. As often as you like. "
            "`--fail-on help` lists the figures.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=0, help=f"At most so many entries of each list; {_LIMIT}, with --json all.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare what two sides said of the same windows: live, or replays.

    Windows whose risk level is another come first, those that may do most harm at the top; then how scores moved, by
    camera, hour and class, what people's labels say of both sides, and what the noise alone would do.
    A replay that cannot be told from its baseline says nothing: see the p-value.
    """
    conditions = _conditions(fail_on or [])
    settings: Settings = ctx.obj
    found = run(settings, lambda: _compared(settings, a, b, strict=strict), doing="comparing ...")
    held = list(_held(conditions, found))
    if as_json:
        from processors.replay.figures import plain

        print_json(plain(found, limit=limit) | {"failed_on": held})
    else:
        _Printing(_LIMIT if limit is None else limit).comparison(found)
    for why in held:
        typer.echo(f"fails: {printable(why)}", err=True)
    if held or (found.strict is not None and found.strict.failed):
        raise typer.Exit(NO)


def _conditions(texts: Iterable[str]) -> "list[Condition]":
    from processors.replay.figures import FIGURES, ConditionError, condition

    found = []
    for text in texts:
        if text == "help":
            print_table(("figure", "what it is"), [(name, figure.words) for name, figure in FIGURES.items()])
            raise typer.Exit
        try:
            found.append(condition(text))
        except ConditionError as error:
            fail(f"--fail-on: {error}", USAGE)
    return found


def _held(conditions: "Iterable[Condition]", found: "Comparison") -> Iterator[str]:
    """The conditions that hold. One on a figure that is not known holds: nobody can say that all is well."""
    from processors.replay.figures import FIGURES

    for one in conditions:
        value = FIGURES[one.name].of(found)
        if value is None:
            yield f"{one.text}: {one.name} is not known ({FIGURES[one.name].words})"
        elif one.holds(found):
            yield f"{one.text}: {one.name} is {value:.6g} ({FIGURES[one.name].words})"


async def _compared(settings: "Settings", a: str, b: str, *, strict: bool) -> "Comparison":
    from infra.replaying import store
    from processors.replay.compare import compare
    from processors.replay.sides import SideError
    from processors.store.queries import Queries

    patient = settings.clickhouse.model_copy(update={"read_timeout_s": max(ASK_S, settings.clickhouse.read_timeout_s)})
    async with store(settings), aclosing(Queries(patient)) as queries:
        try:
            return await compare(queries, a, b, strictly=strict)
        except SideError as error:
            fail(str(error), NO)


class _Printing:
    """A comparison for people."""

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def comparison(self, found: "Comparison") -> None:
        """All of it, what matters most first."""
        from processors.replay.conclusion import conclude

        concluded = conclude(found)
        out = console()
        out.print(Text(printable(concluded.headline), style="bold"), soft_wrap=True)
        out.print(Text(printable(" ".join(filter(None, (concluded.verdict, concluded.because))))), soft_wrap=True)
        for letter, side in (("A", found.a), ("B", found.b)):
            out.print(_side(letter, side), soft_wrap=True)
        for doubt in concluded.doubts:
            out.print(Text(f"! {printable(doubt)}", style="yellow"), soft_wrap=True)
        self._flips(found)
        if found.compared:
            self._slices(found)
        self._windows(found)
        self._labels(found)
        self._strict(found)

    def _flips(self, found: "Comparison") -> None:
        if not found.flips or not self._limit:
            return
        shown = found.flips[: self._limit]
        print_table(
            ("when", "camera", "what", "was", "is", "noise", "label", "A said", "B says", "event"),
            [self._flip(flip) for flip in shown],
            title=f"Flips, the worst first{self._of(len(shown), len(found.flips))}",
        )

    def _flip(self, flip: "Flip") -> Sequence[object]:
        pair = flip.pair
        return (
            when(pair.a.started_at, pair.a.time_zone)[:16],
            pair.a.camera_name,
            _KINDS[flip.kind],
            *_scores(pair),
            {True: "in it", False: "beyond", None: None}[flip.in_noise],
            flip.label.replace("_", " ") if flip.label else None,
            pair.a.summary,
            pair.b.summary,
            _event(pair.a),
        )

    def _slices(self, found: "Comparison") -> None:
        print_table(
            ("A \\ B", *found.transitions),
            [
                (Text(level, style=LEVEL_STYLES.get(level, "")), *(row.get(other, 0) for other in found.transitions))
                for level, row in found.transitions.items()
            ],
            title="Risk levels: A down, B across",
        )
        spread = found.deltas
        print_table(
            ("score of B less A", "mean", "absolute", "least", "5 %", "25 %", "median", "75 %", "95 %", "most"),
            [
                (
                    f"{spread.count} windows",
                    *(_rounded(value) for value in (spread.mean, spread.mean_abs)),
                    *(spread.minimum, spread.p05, spread.p25, spread.median, spread.p75, spread.p95, spread.maximum),
                )
            ],
            title="How scores moved",
        )
        for title, first, slices in (
            ("By camera", "camera", found.by_camera),
            ("By hour of the day, where the camera is", "hour", found.by_hour),
            ("By class of what was seen", "class", found.by_class),
        ):
            self._slice(title, first, slices)

    def _slice(self, title: str, first: str, slices: "Sequence[Slice]") -> None:
        columns = ("windows", "flips", "share", "alarms A", "alarms B", "lost", "new", "raised", "lowered", "moved by")
        print_table(
            (first, *columns),
            [
                (
                    one.title,
                    *(one.compared, one.flips, _percent(one.flip_share), one.alarms_a, one.alarms_b),
                    *(one.alarms_lost, one.alarms_new, one.raised, one.lowered, _rounded(one.mean_delta)),
                )
                for one in slices
            ],
            title=title,
        )

    def _windows(self, found: "Comparison") -> None:
        paired = found.pairing
        groups = (
            ("Windows of A that are several in B", paired.split),
            ("Windows of A that are one in B", paired.merged),
            ("Windows of A that are others in B", paired.regrouped),
        )
        for title, of in groups:
            self._groups(title, of)
        for title, verdicts in (("Windows of A alone", paired.vanished), ("Windows of B alone", paired.appeared)):
            self._alone(title, verdicts)

    def _groups(self, title: str, groups: "Sequence[Regrouping]") -> None:
        shown = groups[: self._limit]
        if shown:
            print_table(
                ("when", "camera", "A", "B", "event"),
                [
                    (
                        when(group.a[0].started_at, group.a[0].time_zone)[:16],
                        group.a[0].camera_name,
                        _levels(group.a),
                        _levels(group.b),
                        _event(group.a[0]),
                    )
                    for group in shown
                ],
                title=f"{title}{self._of(len(shown), len(groups))}",
            )

    def _alone(self, title: str, verdicts: "Sequence[Verdict]") -> None:
        shown = verdicts[: self._limit]
        if shown:
            print_table(
                ("when", "camera", "risk", "what", "event"),
                [
                    (
                        when(verdict.started_at, verdict.time_zone)[:16],
                        verdict.camera_name,
                        _levels([verdict]),
                        verdict.summary,
                        _event(verdict),
                    )
                    for verdict in shown
                ],
                title=f"{title}{self._of(len(shown), len(verdicts))}",
            )

    def _labels(self, found: "Comparison") -> None:
        labels = found.labels
        if not labels.labels:
            typer.echo("No label is on these windows: `rewatch label session` asks for the most telling ones.")
            return
        sides = (labels.a, labels.b)
        print_table(
            ("by labels", "A", "B"),
            [
                ("precision", *(_estimate(side.precision) for side in sides)),
                ("recall", *(_estimate(side.recall) for side in sides)),
                ("false-alarm rate", *(_estimate(side.false_alarm_rate) for side in sides)),
                ("alarms, right : wrong", *(f"{side.true_positives} : {side.false_positives}" for side in sides)),
                ("none, right : wrong", *(f"{side.true_negatives} : {side.false_negatives}" for side in sides)),
                ("alarms labelled", *(f"{side.labelled_alarms} of {side.alarms}" for side in sides)),
                ("windows labelled", *(f"{side.labelled} of {side.verdicts}" for side in sides)),
            ],
            title="What labels say, with intervals of 95 %",
        )
        missed = f", {labels.missed} of something missed" if labels.missed else ""
        typer.echo(
            f"{labels.labels} labels ({labels.true_alarms} true, {labels.false_alarms} false{missed}) on "
            f"{labels.labelled_events} of {labels.events} windows ({_percent(labels.coverage)}). "
            + _which_estimate(labels.known_chance, labels.labels)
        )

    def _strict(self, found: "Comparison") -> None:
        strict = found.strict
        if strict is None:
            return
        share = strict.identical / strict.eligible if strict.eligible else 0.0
        typer.echo(
            f"Strict: {strict.identical} of {strict.eligible} identical ({_percent(share)}), {strict.calls} calls made."
        )
        for recorded, now in strict.models:
            typer.echo(f"Another model: recorded with {printable(recorded)}, judged again with {printable(now)}.")
        if strict.ineligible:
            print_table(
                ("not compared strictly", "events", "such as"),
                [(one.reason, one.count, ", ".join(one.examples[:2])) for one in strict.ineligible],
            )
        if strict.differences:
            print_table(
                ("event", "what", "first differs at byte", "A", "B"),
                [(one.event_id, one.field, one.position, one.a, one.b) for one in strict.differences[: self._limit]],
            )

    def _of(self, shown: int, all_of_them: int) -> str:
        return f" ({all_of_them})" if shown == all_of_them else f" ({shown} of {all_of_them}; --limit shows more)"


def _side(letter: str, side: "Side") -> Text:
    from processors.replay.conclusion import counted

    def named(counts: Iterable[str], names: Mapping[str, str]) -> str:
        return ", ".join(names.get(one) or one[:_DIGEST] or "unknown" for one in counts) or "none"

    about = "what was said live" if side.id == "live" else f"{side.kind or 'replay'} ({side.state}), {side.change}"
    reused = f", {side.reused} of them reused" if side.reused else ""
    prompts, models = named(side.prompts, side.prompt_names), named(side.models, side.model_names)
    said = f"{counted(side.verdicts, 'verdict')}, {counted(side.alarms, 'alarm')}{reused}"
    made = f"{said}; prompt {prompts}; model {models}"
    return Text.assemble((f"{letter}  {printable(side.name)}: ", "bold"), printable(f"{about}; {made}"))


def _scores(pair: "Pair") -> tuple[Text, Text]:
    return _level(pair.a), _level(pair.b)


def _level(verdict: "Verdict") -> Text:
    return Text(f"{verdict.risk_score} {verdict.risk_level}", style=LEVEL_STYLES.get(verdict.risk_level, ""))


def _levels(verdicts: "Iterable[Verdict]") -> Text:
    return Text(", ").join(_level(verdict) for verdict in verdicts)


def _event(verdict: "Verdict") -> str:
    camera, _, name = verdict.batch_id.rpartition(":")
    return f"{camera}:{name[:_SHORT_ID]}"


def _estimate(one: "Estimate") -> str:
    if one.value is None or one.low is None or one.high is None:
        return "not known"
    return f"{_percent(one.value)}  ({_percent(one.low)} to {_percent(one.high)}, of {one.count})"


def _which_estimate(known: int, labels: int) -> str:
    if known == labels:
        return "Weighed by the chance with which each was chosen: an estimate for all events that could have been."
    if known:
        return f"How {labels - known} of them were chosen is not known: the shares are those of what was labelled."
    return "Nobody knows how they were chosen: the shares are those of what was labelled, and may differ for the rest."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1) + 0.0  # no -0
