"""What a comparison of two sides says: every figure, list and doubt that `replay diff` and the report show.

A side is what live work said, or what a replay said, of the same stretch of history. Here are only the records that
hold the result; `pairs` and `statistics` compute them, `compare` reads what they are computed from.
Scores run from 0 to 100; a difference is side B's score less side A's. Times are milliseconds since the Unix epoch.
"""

from collections.abc import Mapping
from typing import Literal

from schemas.records import Record

LEVELS = ("low", "medium", "high", "critical")
"""Risk levels, the mildest first."""
ALARMS = frozenset({"high", "critical"})
"""Levels that are an alarm."""

FlipKind = Literal["alarm_lost", "alarm_new", "raised", "lowered"]
LabelVerdict = Literal["true_alarm", "false_alarm", "missed"]


class Verdict(Record, frozen=True, kw_only=True):
    """What one side said of one window."""

    event_id: str
    batch_id: str
    camera_id: str
    started_at: int
    ended_at: int
    frame_ids: tuple[str, ...]
    risk_score: int
    risk_level: str
    summary: str = ""
    reasoning: str = ""
    recommended_action: str = ""
    camera_name: str = ""
    """The camera's name for people, as it is now; its id where it has none."""
    time_zone: str = "UTC"
    """IANA time zone of the camera."""
    classes: tuple[str, ...] = ()
    """Classes of the boxes that matter in the window, sorted, each once."""
    completion_digest: str = ""
    """SHA-256 of the raw completion, hex."""
    rendered_digest: str = ""
    """SHA-256 of the rendered prompt, hex."""
    prompt_digest: str = ""
    verdict_digest: str = ""
    model: str = ""
    model_digest: str = ""
    reused: bool = False
    """Whether a recorded verdict was taken, not a new call made."""
    parameters: str = ""
    """Sampling parameters, JSON."""
    conditions: Mapping[str, str] = {}
    """Conditions of its making."""
    tokens: int = 0
    """Tokens of prompt and completion together."""

    @property
    def alarm(self) -> bool:
        """Whether it is one: level high or critical."""
        return self.risk_level in ALARMS


class Pair(Record, frozen=True, kw_only=True):
    """The verdicts of both sides on one window, or on two windows that are each other's nearest."""

    a: Verdict
    b: Verdict
    share: float = 1.0
    """Frames in both windows as a share of the frames in either, 0 to 1; 1 where the batch ids are equal."""

    @property
    def delta(self) -> int:
        """Score of B less score of A."""
        return self.b.risk_score - self.a.risk_score

    @property
    def identical(self) -> bool:
        """Whether the raw completions are equal byte for byte."""
        return self.a.completion_digest == self.b.completion_digest

    @property
    def flipped(self) -> bool:
        """Whether the risk level is another."""
        return self.a.risk_level != self.b.risk_level


class Flip(Record, frozen=True, kw_only=True):
    """A pair whose risk level is another, and how much harm that may do."""

    pair: Pair
    kind: FlipKind
    harm: int
    """Rank, 0 the worst: alarm lost on what a person called a true alarm; alarm lost; new alarm on what a person
    called a false one; new alarm; raised; lowered."""
    label: LabelVerdict | None = None
    """What a person said of the window; None where nobody did."""
    in_noise: bool | None = None
    """Whether the score moved no further than the same prompt and model move it; None where that is unknown."""


class Regrouping(Record, frozen=True, kw_only=True):
    """Windows of both sides that share frames and are no pair: one became several, several one, or some others."""

    a: tuple[Verdict, ...]
    b: tuple[Verdict, ...]

    @property
    def alarm_a(self) -> bool:
        """Whether side A had an alarm in them."""
        return any(verdict.alarm for verdict in self.a)

    @property
    def alarm_b(self) -> bool:
        """Whether side B had an alarm in them."""
        return any(verdict.alarm for verdict in self.b)


class Pairing(Record, frozen=True, kw_only=True):
    """All verdicts of two sides, each in exactly one of these lists; all in order of time, then of id."""

    pairs: tuple[Pair, ...] = ()
    split: tuple[Regrouping, ...] = ()
    """One window of A, several of B."""
    merged: tuple[Regrouping, ...] = ()
    """Several windows of A, one of B."""
    regrouped: tuple[Regrouping, ...] = ()
    """Several windows of A, several of B, which cannot be told apart."""
    appeared: tuple[Verdict, ...] = ()
    """Windows of B that share no frame with one of A."""
    vanished: tuple[Verdict, ...] = ()
    """Windows of A that share no frame with one of B."""


class Bin(Record, frozen=True, kw_only=True):
    """One bar of a histogram: values from `least`, up to `most` inclusive (all are whole numbers)."""

    least: int
    most: int
    count: int


class Spread(Record, frozen=True, kw_only=True):
    """How whole numbers are spread; all figures are None where there are none."""

    count: int = 0
    mean: float | None = None
    mean_abs: float | None = None
    """Mean of the absolute values."""
    minimum: int | None = None
    p05: float | None = None
    p25: float | None = None
    median: float | None = None
    p75: float | None = None
    p95: float | None = None
    maximum: int | None = None
    histogram: tuple[Bin, ...] = ()


class Slice(Record, frozen=True, kw_only=True):
    """The pairs of one camera, hour of the day or class of object."""

    name: str
    """The camera's id, the hour 00 to 23 by the clock where the camera is, or the class."""
    title: str = ""
    """The camera's name for people; else as `name`."""
    compared: int
    flips: int
    alarms_a: int
    alarms_b: int
    alarms_lost: int
    alarms_new: int
    raised: int
    lowered: int
    mean_delta: float

    @property
    def flip_share(self) -> float:
        """Flips as a share of compared."""
        return self.flips / self.compared if self.compared else 0.0


class Estimate(Record, frozen=True, kw_only=True):
    """A share with its 95 % confidence interval, from labels."""

    value: float | None
    """0 to 1; None where no label tells."""
    low: float | None
    high: float | None
    count: int
    """Labels that it rests on."""
    effective: float
    """As many labels of equal weight as tell as much: Kish's effective sample size. Equal to `count` unweighted."""
    weighted: bool
    """Whether each label stands for 1 / chance events (an estimate for all events), or for itself alone (what was
    labelled, which need not be like the rest)."""


class Accuracy(Record, frozen=True, kw_only=True):
    """One side measured by the labels. An alarm is right on a true alarm and on what was missed, else wrong."""

    true_positives: int
    """Labelled true (or missed), and an alarm on this side."""
    false_negatives: int
    """Labelled true (or missed), and no alarm on this side."""
    false_positives: int
    """Labelled false, and an alarm on this side."""
    true_negatives: int
    """Labelled false, and no alarm on this side."""
    precision: Estimate
    """Of the alarms, how many were right."""
    recall: Estimate
    """Of what was worth an alarm, how much got one."""
    false_alarm_rate: Estimate
    """Of what was worth none, how much got one."""
    labelled: int
    """Verdicts of this side that a label applies to."""
    verdicts: int
    """Verdicts of this side."""
    labelled_alarms: int
    """Alarms of this side that a label applies to."""
    alarms: int
    """Alarms of this side."""


class Labelled(Record, frozen=True, kw_only=True):
    """What people's labels say of both sides."""

    labels: int
    """Labels that count: the newest of each event or span, within what is compared."""
    true_alarms: int
    false_alarms: int
    missed: int
    known_chance: int
    """Labels of which it is known with which probability they were chosen."""
    events: int
    """Windows that are compared: pairs, regroupings, appeared and vanished."""
    labelled_events: int
    """Those of them that a label applies to."""
    a: Accuracy
    b: Accuracy

    @property
    def coverage(self) -> float:
        """Share of the windows compared that a label applies to."""
        return self.labelled_events / self.events if self.events else 0.0


class Noise(Record, frozen=True, kw_only=True):
    """What the same prompt and model give when asked again: a baseline, compared with what was live."""

    replay_id: str
    name: str
    compared: int
    flips: int
    identical: int
    floor: float
    """Share of flips."""
    band: float
    """95th percentile of the absolute score difference: a flip that moves the score no further is in the noise."""
    itself: bool = False
    """Whether the baseline is a side of this very comparison."""


class Side(Record, frozen=True, kw_only=True):
    """One side, and what it was made by."""

    id: str
    """`live`, or a replay's id."""
    name: str
    """For people."""
    kind: str = ""
    """change, baseline or shadow; empty for live."""
    mode: str = ""
    """fast or strict; empty for live."""
    state: str = ""
    """running, paused, done ...; empty for live."""
    change: str = ""
    """What the replay changes, in words; empty for live."""
    verdicts: int = 0
    """Verdicts that take part."""
    alarms: int = 0
    reused: int = 0
    """Verdicts that were taken from what was recorded."""
    tokens: int = 0
    """Tokens of the calls that were really made."""
    prompts: Mapping[str, int] = {}
    """Verdicts by prompt digest, the most first."""
    models: Mapping[str, int] = {}
    """Verdicts by model digest, the most first; an empty digest: weights that could not be read."""
    prompt_names: Mapping[str, str] = {}
    """Names for people of the prompts, by digest; those without one are missing."""
    model_names: Mapping[str, str] = {}
    """Names of the models, by digest."""


class Coverage(Record, frozen=True, kw_only=True):
    """How much of what was planned is there to be compared, of the replay on side B (else on side A)."""

    planned: int = 0
    """Windows to judge; 0 where that is not known."""
    units: int = 0
    """Windows given out to be judged."""
    judged: int = 0
    """Windows judged, whether by a call or by what was recorded."""
    failed: int = 0
    """Windows that could not be judged: dead letters."""
    complete: bool = False
    """Whether the replay is done."""
    unreached: int = 0
    """Windows of the other side left out, as the replay did not come so far, or looked at a sample only."""


class Difference(Record, frozen=True, kw_only=True):
    """Two texts that should be the same, byte for byte, and are not."""

    event_id: str
    """Of side A."""
    field: str
    """raw_completion or rendered_prompt."""
    position: int
    """The first byte that differs, from 0; where one text ends before, its length."""
    a: str
    """What side A has around it."""
    b: str
    """What side B has around it."""


class Ineligible(Record, frozen=True, kw_only=True):
    """Events that cannot be compared strictly, for one reason."""

    reason: str
    count: int
    examples: tuple[str, ...]
    """Ids of the first events of side A."""


class Strict(Record, frozen=True, kw_only=True):
    """The strict comparison: what was recorded under strict conditions must come again byte for byte."""

    eligible: int
    identical: int
    differences: tuple[Difference, ...] = ()
    """The first of those that differ."""
    ineligible: tuple[Ineligible, ...] = ()
    models: tuple[tuple[str, str], ...] = ()
    """Model digests, recorded and met again, where they are not the same ones: that alone fails it."""
    calls: int = 0
    """Verdicts of side B that come from a call really made."""

    @property
    def failed(self) -> bool:
        """Whether something differs that must not, or there was nothing to compare."""
        return bool(self.models) or self.identical < self.eligible or not self.eligible


class Comparison(Record, frozen=True, kw_only=True):
    """Two sides compared."""

    a: Side
    b: Side
    coverage: Coverage
    pairing: Pairing
    flips: tuple[Flip, ...]
    """By harm, the worst first."""
    deltas: Spread
    """Of the score differences; bars of 10."""
    scores_a: Spread
    """Of side A's scores in pairs; bars of 10."""
    scores_b: Spread
    transitions: Mapping[str, Mapping[str, int]]
    """Pairs by level on side A, then on side B; every level is there."""
    by_camera: tuple[Slice, ...]
    by_hour: tuple[Slice, ...]
    by_class: tuple[Slice, ...]
    labels: Labelled
    noise: Noise | None = None
    """None: no baseline was run over these windows, the noise is not known."""
    p_value: float | None = None
    """Probability of shares of flips so far apart from the baseline's if both were the same; None without one."""
    strict: Strict | None = None
    """None: not asked for."""
    notes: tuple[str, ...] = ()
    """Doubts, in sentences: what was left out and why."""

    @property
    def compared(self) -> int:
        """Pairs."""
        return len(self.pairing.pairs)

    @property
    def identical(self) -> int:
        """Pairs whose raw completions are equal byte for byte."""
        return sum(pair.identical for pair in self.pairing.pairs)

    @property
    def flips_in_noise(self) -> int | None:
        """Flips that the noise explains; None where it is not known."""
        return None if self.noise is None else sum(flip.in_noise is True for flip in self.flips)

    def flips_of(self, kind: FlipKind) -> int:
        """How many flips are of a kind."""
        return sum(flip.kind == kind for flip in self.flips)
