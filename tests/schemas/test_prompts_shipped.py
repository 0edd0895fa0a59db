"""The prompt versions that come with the product: what the second one changes, and what it leaves alone."""

import json

from processors.analyze import core
from schemas import prompts
from tests.processors.analyze_samples import context


def test_the_second_version_differs_in_its_instruction_alone() -> None:
    first, second = prompts.default(), prompts.deliveries_strict_nights()
    assert second.name == "deliveries-strict-nights"
    assert second.digest != first.digest
    assert (second.output_schema, second.parameters) == (first.output_schema, first.parameters)
    old, new = json.loads(first.template), json.loads(second.template)
    assert new.pop("system") == f"{old.pop('system')} Deliveries are expected. Be stricter at night."
    assert new == old
    asked = [next(core.renderings(context(), version)).messages for version in (first, second)]
    assert asked[0][1] == asked[1][1]


def test_the_second_version_travels_the_log_as_any_other() -> None:
    second = prompts.deliveries_strict_nights()
    assert prompts.PromptVersion.from_record(second.to_record(1)) == second


def test_the_default_is_the_version_that_the_demo_analyst_was_trained_on() -> None:
    assert prompts.default().digest == "c2821da223b1e2fe5497efe5346d3eb7"
    assert list(prompts.shipped()) == ["default", "deliveries-strict-nights"]
