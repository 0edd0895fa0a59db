"""What is made of a completion: a table of what models send, and what holds whatever they send."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from processors.analyze.answers import FORGIVEN, UnusableError, parse, risk_level
from processors.analyze.reading import read
from schemas import prompts
from schemas.prompts import PromptVersion
from tests.processors.analyze_samples import answer

DEFAULT = prompts.default()

PLAIN = (
    '{"reasoning":"he waits","risk_factors":["night"],"entities":["1 person"],"summary":"a man at the door",'
    '"recommended_action":"notify","risk_score":72}'
)

TABLE: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("answers.yaml").read_text(encoding="utf-8"))
RAW = {row["case"]: row["raw"].replace("@@", PLAIN) for row in TABLE}


@pytest.mark.parametrize("row", TABLE, ids=[row["case"] for row in TABLE])
def test_the_table(row: dict[str, Any]) -> None:
    if "repair" in row:
        with pytest.raises(UnusableError, match=re.escape(row["repair"])):
            parse(RAW[row["case"]], DEFAULT)
    else:
        verdict, forgiven = parse(RAW[row["case"]], DEFAULT)
        assert verdict.risk_score == row["score"]
        assert set(forgiven) == set(row.get("forgiven", ()))
        assert list(forgiven) == sorted(forgiven, key=FORGIVEN.index)


def test_the_table_is_large_and_shows_everything_that_is_forgiven() -> None:
    assert len(RAW) == len(TABLE) >= 60
    assert {name for row in TABLE for name in row.get("forgiven", ())} == set(FORGIVEN)


def test_a_verdict_is_what_the_object_says() -> None:
    verdict, forgiven = parse(answer(), DEFAULT)
    assert forgiven == ()
    assert json.loads(answer()) == {
        **{name: getattr(verdict, name) for name in ("reasoning", "summary", "recommended_action", "risk_score")},
        "risk_factors": list(verdict.risk_factors),
        "entities": list(verdict.entities),
    }


def test_a_cut_off_answer_is_unusable_even_if_it_can_be_read() -> None:
    with pytest.raises(UnusableError, match="cut off"):
        parse(answer(), DEFAULT, cut_off=True)


@pytest.mark.parametrize("case", ["plain", "pretty-printed", "single quotes", "think", "fence", "a bare percentage"])
def test_no_beginning_of_an_answer_is_an_answer(case: str) -> None:
    raw = RAW[case]
    for length in range(raw.rindex("}")):
        with pytest.raises(UnusableError):
            parse(raw[:length], DEFAULT)


def _loose(**properties: Any) -> PromptVersion:
    """The default version with another schema: nothing is asked of the score."""
    schema = json.loads(DEFAULT.output_schema)
    schema["properties"] |= {"risk_score": {}, **properties}
    return PromptVersion(
        template=DEFAULT.template, output_schema=json.dumps(schema), parameters=DEFAULT.parameters, name="loose"
    )


@pytest.mark.parametrize("score", [101, -1, 10**200, "999"])
def test_a_score_out_of_range_is_unusable_whatever_a_versions_schema_allows(score: object) -> None:
    with pytest.raises(UnusableError, match=r"not between 0 and 100|not an integer"):
        parse(answer(score), _loose())


def test_a_key_that_a_versions_schema_has_is_checked_and_forgiven_nothing() -> None:
    prompt = _loose(risk_level={"type": "string"}, people={"type": "integer"})
    assert parse(answer(71, risk_level="high", people=2), prompt).forgiven == ()
    with pytest.raises(UnusableError, match="is not of type 'integer'"):
        parse(answer(71, people="2"), prompt)
    with pytest.raises(UnusableError, match="'risk_level' is 'low'"):
        parse(answer(71, risk_level="low"), prompt)


@given(st.integers(0, 100), st.sampled_from(["low", "medium", "high", "critical"]))
def test_a_level_is_the_scores_or_the_answer_is_unusable(score: int, level: str) -> None:
    raw = answer(score, risk_level=level)
    if level == risk_level(score):
        assert parse(raw, DEFAULT).verdict.risk_score == score
    else:
        with pytest.raises(UnusableError, match="'risk_level' is"):
            parse(raw, DEFAULT)


# What hostile and broken completions are made of: all that the reader knows, and whole answers, in any order.
PIECES = (
    *(*"{}[],:\"'\\#\n “”„\u2018\u2019", "//", "/*", "*/", "```json"),
    *("<think>", "</think>", "[THINK]", "[/THINK]", "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    *('"risk_score"', "risk_score", "'risk_score'", '"risk_level"', '"verdict"', '"reasoning":"', "risk score is 5"),
    *("72", "7", "2", "0.72", "1.0", "72%", "7/10", "-", "NaN", "None", "true", "null", "1e9", "\\u0037", "\\ud83d"),
    *("\x00", "\ufeff", "\ud800", "\u017f", "\u212a", PLAIN, PLAIN[:-1], PLAIN[1:], answer(13), answer("44%")),
    *(PLAIN.replace('"', "'"), PLAIN.replace('"', '\\"'), '{"type":"object","properties":{}}', '{"arguments":', "high"),
)


def _check(raw: str) -> None:
    why = ""
    try:
        verdict, forgiven = parse(raw, DEFAULT)
    except UnusableError as error:
        why = str(error)
        why.encode()  # it goes to the model
    assert len(why) < 1000
    if not why:
        assert re.search(rf"(?<![0-9]){verdict.risk_score}(?![0-9])", raw)
        assert set(forgiven) <= set(FORGIVEN)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=25).map("".join))
def test_whatever_comes_is_a_verdict_with_a_score_that_stands_there_or_a_repair(raw: str) -> None:
    _check(raw)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([raw for raw in RAW.values() if raw]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 6), st.sampled_from(("", *PIECES))), min_size=1, max_size=4),
)
def test_so_is_whatever_is_cut_from_real_answers_and_put_in_them(raw: str, changes: list[tuple[int, int, str]]) -> None:
    for at, length, new in changes:
        raw = raw[: at % (len(raw) + 1)] + new + raw[at % (len(raw) + 1) + length :]
    _check(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), JSON, min_size=1), st.booleans(), st.sampled_from([None, 2]))
def test_json_is_read_as_python_reads_it_and_nothing_is_forgiven(value: Any, ascii_only: bool, indent: int) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    (piece,) = read(raw).pieces
    assert piece.value == json.loads(raw)
    assert (piece.start, piece.end, piece.broken, piece.forgiven) == (0, len(raw), "", frozenset())


@given(st.integers(0, 100), st.integers(0, 100), st.sampled_from(["<think>", "", "[THINK]"]))
def test_a_draft_in_reasoning_never_counts(draft: int, final: int, begin: str) -> None:
    end = "[/THINK]" if begin == "[THINK]" else "</think>"
    assert parse(f"{begin}{answer(draft)}{end}{answer(final)}", DEFAULT).verdict.risk_score == final
    with pytest.raises(UnusableError):
        parse(f"{begin}{answer(draft)}{end}", DEFAULT)


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "{",
            "[{",
            '{"',
            '{"a":',
            '{"a":"',
            "{'a':'</think>",
            "{ //",
            "{/*",
            "{#",
            "{a:",
            "\\",
            "`",
            "<think>",
            "</think>",
        ),
        *(
            "[ ",
            "{ ",
            '{"a":1,',
            '{"a":[',
            "risk score",
            "risk ",
            "risk_score: 72 ",
            "</think><think>",
            '{"a":1}',
            "<",
            "“",
        ),
        *(f"{PLAIN} ", f"{PLAIN[:-1]} ", PLAIN[:-1] + ',"x":', '{"verdict":', "9", '"\\'),
    ],
)
def test_hostile_text_takes_linear_time(piece: str) -> None:
    many = piece * (60_000 // len(piece)) + "\nx"
    for raw in (many, PLAIN + many):
        began = time.process_time()
        _check(raw)
        assert time.process_time() - began < 2.5  # quadratic: minutes
