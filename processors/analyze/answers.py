"""What a completion says: the verdict in a model's final answer, or why it has to be asked again.

Nothing is invented, clamped or guessed. What is forgiven can be read in one way only, and is named: a score is the
number that stands in the object taken, in one of the ways of writing it.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple, get_args

import jsonschema
import msgspec

from processors.analyze.reading import Piece, Reading, Real, read
from schemas.prompts import VERDICT_KEYS, PromptVersion

_LEVELS = ((85, "critical"), (60, "high"), (30, "medium"), (0, "low"))
_LEVEL_NAMES = frozenset(name for _, name in _LEVELS)

Action = Literal["none", "review", "notify", "call"]

FORGIVEN: Final = (
    *("reasoning", "fence", "prose", "earlier answer", "answer as text", "array", "envelope"),
    *("trailing comma", "comment", "quotes", "unquoted key", "unquoted value", "literal", "raw line break", "escape"),
    *("repeated key", "key's name", "extra key", "score as text", "score as decimal", "letter case"),
)
"""Every name that `Answer.forgiven` can hold: around the answer, in its JSON, in what it says."""

_ENVELOPES = frozenset(
    (
        *("verdict", "answer", "finalanswer", "final", "response", "result", "output", "json", "data"),
        *("assessment", "riskassessment", "event", "arguments", "parameters"),  # the last two: tool calls
    )
)
"""Keys, in letters alone, that may hold the whole answer. Not `example`, `draft` or `properties`."""

_SCORES = frozenset(("score", "risk", "finalscore", "totalscore", "overallscore", "adjustedscore", "overallrisk"))
_LEVEL_KEYS = frozenset(("risklevel", "level", "severity", "risk", "overallrisk", "riskcategory", "risklabel"))
"""Keys, in letters alone, that say the score or the level once more."""

_SCORE = re.compile(r"\+?(?P<whole>-?(?:0|[1-9][0-9]*+))(?P<zeros>\.0++)?\s*+(?P<of>%|/\s*+100)?")

_SCORE_BEHIND = re.compile(
    r"(?ai:risk[\s_-]*+score)[\"'*`\s]*+(?ai::|=|is|of|to|should\s++be)[\"'*`\s]*+(?P<score>[0-9]++(?:\.[0-9]++)?)"
)

_EXAMPLE = re.compile(r"(?ai:\b(?:example|e\.g\.|for instance|draft))\b")

_PLACEHOLDER = re.compile(r"\s*+(?:string|text|\.\.\.|…|<[^<>]*+>)\s*+", re.IGNORECASE)

_FENCE = re.compile(r"```[A-Za-z0-9]*+")


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the model said, checked."""

    reasoning: str
    risk_factors: tuple[str, ...]
    entities: tuple[str, ...]
    summary: str
    recommended_action: Action
    risk_score: int


class UnusableError(ValueError):
    """This completion is no verdict; the message is written for the model that is asked to repair it."""


class Answer(NamedTuple):
    """A verdict, and what of its completion was forgiven."""

    verdict: Verdict
    forgiven: tuple[str, ...]
    """Of `FORGIVEN`, in its order; empty for a completion that is the JSON asked for and nothing else."""


def risk_level(score: int) -> str:
    """The level of a score of 0..100: low, medium (from 30), high (from 60), critical (from 85)."""
    return next(level for least, level in _LEVELS if score >= least)


def parse(text: str, prompt: PromptVersion, *, cut_off: bool = False) -> Answer:
    """The verdict in a completion's final answer: the last object with a verdict's keys, behind all reasoning.

    A draft in marked reasoning never counts, nor does what stands before an answer that is broken.

    Raises:
        UnusableError: there is no such object, or it is not what the schema asks for, or says two scores, or a level
            that is not its score's, or it was cut off.
    """
    if cut_off:
        raise UnusableError(f"it was cut off after {len(text)} characters; be much shorter.")
    forgiven: set[str] = set()
    text = _unquoted(text, forgiven)
    reading = read(text)
    if reading.unfinished:
        raise UnusableError("it is all reasoning, and no answer follows.")
    # What is no answer (a schema, a tool's header) is passed over; what is broken may have been one.
    answers = [piece for piece in reading.pieces if piece.broken or _is_answer(piece.value)]
    if not answers:
        raise UnusableError(
            f"it holds no JSON object with the keys {', '.join(VERDICT_KEYS)}."
            if reading.pieces
            else "it holds no JSON object."
        )
    last = next((piece for piece in answers if piece.lost), answers[-1])
    if last.broken:
        raise UnusableError(f"{last.broken}.")
    forgiven |= last.forgiven | _around(text, reading)
    if len(answers) < len(reading.pieces):
        forgiven.add("prose")
    value = _opened(last.value, forgiven)
    verdict = _verdict(value, prompt, forgiven)
    if len(answers) > 1:
        forgiven.add("earlier answer")
        _no_example(text[answers[-2].end : last.start], verdict, answers[-2])
    for other in _SCORE_BEHIND.finditer(text, last.end):
        if float(other["score"]) != verdict.risk_score:
            raise UnusableError(
                f"risk_score is {verdict.risk_score}, and the text behind the object says {other['score'][:20]}."
            )
    return Answer(verdict, tuple(name for name in FORGIVEN if name in forgiven))


def _unquoted(text: str, forgiven: set[str]) -> str:
    """The text in a completion that is one JSON string, as of models that escape what they were to write."""
    bare = text.strip()
    if not (bare.startswith('"') and bare.endswith('"')):
        return text
    try:
        inner: str = json.loads(bare, strict=False)
    except ValueError:
        return text
    forgiven.add("answer as text")
    return inner


def _letters(key: str) -> str:
    """A key as it is compared: riskScore, Risk Score and risk_score are one."""
    return "".join(char for char in key.casefold() if char.isalnum())


_VERDICT_KEYS = frozenset(map(_letters, VERDICT_KEYS))


def _is_answer(value: Any) -> bool:
    match value:
        case list():
            return any(map(_is_answer, value))
        case dict():
            if isinstance(value.get("properties"), dict) or "$schema" in value:
                return False  # the schema, said back
            return not _VERDICT_KEYS.isdisjoint(map(_letters, value)) or any(
                _letters(key) in _ENVELOPES and _is_answer(inner) for key, inner in value.items()
            )
        case _:
            return False


def _opened(value: Any, forgiven: set[str]) -> dict[str, Any]:
    """The object with a verdict's keys, out of an array of one and out of envelopes."""
    if isinstance(value, list):
        if len(value) != 1:
            raise UnusableError(f"it is an array of {len(value)}; answer with one object.")
        forgiven.add("array")
        return _opened(value[0], forgiven)
    if _VERDICT_KEYS.isdisjoint(map(_letters, value)):
        inner = [held for key, held in value.items() if _letters(key) in _ENVELOPES and _is_answer(held)]
        if len(inner) > 1 or any(_says_again(_letters(key)) for key in value):
            raise UnusableError("it holds several answers; answer with one object, its keys at the top.")
        forgiven.add("envelope")
        return _opened(inner[0], forgiven)
    return dict(value)


def _verdict(value: dict[str, Any], prompt: PromptVersion, forgiven: set[str]) -> Verdict:
    found = _named(value, prompt.schema, forgiven)
    score = found.get("risk_score")
    if score is not None:
        found["risk_score"] = score = _score(score, forgiven)
        if 0 <= score <= 100:
            _agree(score, value)
    action = found.get("recommended_action")
    if isinstance(action, str) and action not in get_args(Action) and action.strip().lower() in get_args(Action):
        forgiven.add("letter case")
        found["recommended_action"] = action.strip().lower()
    try:
        error = jsonschema.exceptions.best_match(prompt.validator.iter_errors(found))
        if error is not None:
            raise UnusableError(f"at {error.json_path}: {error.message[:300]}.")
        verdict = msgspec.convert(found, Verdict, strict=True)
        for part in (verdict.reasoning, verdict.summary, *verdict.risk_factors, *verdict.entities):
            part.encode()  # JSON can escape half a surrogate pair, which no UTF-8 can hold
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise UnusableError(f"{error}.") from error
    # Whatever a version's schema lets through.
    if not 0 <= verdict.risk_score <= 100:
        raise UnusableError(f"risk_score is {verdict.risk_score}, not between 0 and 100.")
    for name in ("reasoning", "summary"):
        if _PLACEHOLDER.fullmatch(getattr(verdict, name)):
            raise UnusableError(f"{name} is only a placeholder: {getattr(verdict, name)[:60]!r}.")
    return verdict


def _named(value: Mapping[str, Any], schema: Mapping[str, Any], forgiven: set[str]) -> dict[str, Any]:
    """The object under the schema's names, without keys that the schema rules out."""
    known = (*schema.get("properties", ()), *VERDICT_KEYS)
    names = {_letters(name): name for name in known}
    found: dict[str, Any] = {}
    for key, held in value.items():
        name = key if key in known else names.get(_letters(key))
        if name is None:
            if schema.get("additionalProperties", True) is False:
                forgiven.add("extra key")
                continue
            name = key
        elif name != key:
            forgiven.add("key's name")
        if name in found and repr(found[name]) != repr(held):
            raise UnusableError(f"{name} stands in it twice, with different values.")
        found[name] = held
    return found


def _score(said: Any, forgiven: set[str]) -> int:
    """The score, from the ways of writing one that leave no doubt.

    0.72 can be 72 % or less than 1, and 1.0 as well; high, 7/10, 60-70 and 7.2e1 are for the model to say again.
    """
    if isinstance(said, int) and not isinstance(said, bool):
        return said
    text = said.text if isinstance(said, Real) else said
    match = _SCORE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or len(match["whole"]) > 4 or (match["zeros"] and not match["of"] and match["whole"] == "1"):
        raise UnusableError(f"risk_score is {str(said)[:60]!r}, not an integer from 0 to 100.")
    forgiven.add("score as text" if isinstance(said, str) else "score as decimal")
    return int(match["whole"])


def _says_again(key: str) -> bool:
    return key in _SCORES or key in _LEVEL_KEYS or "riskscore" in key


def _agree(score: int, value: Mapping[str, Any]) -> None:
    """Refuse an object that says another score, or a level that is not the score's.

    Raises:
        UnusableError: it does.
    """
    for key, said in value.items():
        name = _letters(key)
        if not _says_again(name):
            continue
        level = _letters(said) if isinstance(said, str) else None
        if name in _LEVEL_KEYS and level is not None and (level in _LEVEL_NAMES or name == "risklevel"):
            if level != risk_level(score):
                raise UnusableError(
                    f"{key[:60]!r} is {said[:60]!r}, and risk_score is {score}: low is 0 to 29, medium 30 to 59, "
                    f"high 60 to 84, critical 85 to 100."
                )
        elif name in _SCORES or "riskscore" in name:
            _same_score(score, key, said)


def _same_score(score: int, key: str, said: Any) -> None:
    try:
        other = _score(said, set())
    except UnusableError:
        if isinstance(said, str) or said is None:
            return  # words about the score
        other = None
    if other != score:
        raise UnusableError(f"it says two scores: risk_score is {score}, and {key[:60]!r} is {str(said)[:60]!r}.")


def _no_example(between: str, verdict: Verdict, earlier: Piece) -> None:
    """Refuse an object that the words before it call an example, where another answer stood before it."""
    if not earlier.broken and _EXAMPLE.search(between) is not None:
        raise UnusableError(
            f"it is not clear whether the last object (risk_score {verdict.risk_score}) is the answer or an example."
        )


def _around(text: str, reading: Reading) -> set[str]:
    """What stands around the objects."""
    ends = (reading.start, *(piece.end for piece in reading.pieces))
    starts = (*(piece.start for piece in reading.pieces), len(text))
    outside = "\n".join(text[end:start] for end, start in zip(ends, starts, strict=True))
    return {
        name
        for name, there in (
            ("reasoning", reading.start > 0),
            ("fence", "```" in outside),
            ("prose", bool(_FENCE.sub("", outside).strip("\ufeff\u200b \t\r\n"))),
        )
        if there
    }
