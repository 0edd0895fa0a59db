"""The `retention:` section: what it takes, what it refuses, and that nothing goes without it."""

from datetime import timedelta

import pytest
from pydantic import ValidationError

from infra.retention.settings import CLASSES, RetentionSettings


def test_by_default_nothing_goes():
    settings = RetentionSettings()
    assert settings.kept == {}
    assert settings.topics_ms == {}


def test_spans_are_hours_days_weeks_or_years():
    settings = RetentionSettings(quiet="12h", low="30d", medium="8w", high="1y", topics={"frames": "3d"})
    assert settings.kept == {
        "low": timedelta(days=30),
        "medium": timedelta(days=56),
        "high": timedelta(days=365),
        "quiet": timedelta(hours=12),
    }
    assert settings.topics_ms == {"frames": 259_200_000}


@pytest.mark.parametrize("text", ["", "0d", "-1d", "30", "30 d", "1m", "forever", "1.5d", "9999999d"])
def test_what_is_no_span_is_refused_with_the_way_to_write_one(text):
    for name in CLASSES:
        with pytest.raises(ValidationError, match="write 12h, 30d, 8w or 1y"):
            RetentionSettings(**{name: text})


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ({"low": "90d", "medium": "30d"}, "retention.medium is 30d and retention.low is 90d"),
        ({"critical": "1y"}, "retention.critical is 1y and retention.high keeps for ever"),
    ],
)
def test_a_graver_level_never_goes_before_a_milder_one(keep, says):
    with pytest.raises(ValidationError, match=says):
        RetentionSettings(**keep)


@pytest.mark.parametrize(
    ("topic", "says"),
    [("labels", "kept for ever"), ("batch_state", "kept for ever"), ("frame", "there is no such topic")],
)
def test_the_broker_is_never_told_to_forget_what_is_the_product_or_a_memory(topic, says):
    with pytest.raises(ValidationError, match=says):
        RetentionSettings(topics={topic: "30d"})
