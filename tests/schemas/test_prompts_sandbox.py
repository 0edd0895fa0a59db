"""Templates are somebody's program: whatever they are, rendering them ends soon, and small."""

import json
import time
import tracemalloc

import pytest

from processors.analyze import core
from schemas import prompts
from schemas.prompts import PromptError, PromptVersion, sandbox
from tests.processors.analyze_samples import context, section, seen

DEFAULT = prompts.default()


def version(user: str) -> PromptVersion:
    template = json.dumps({"system": "s", "user": user, "repair": "{{ error }}"})
    return PromptVersion(template=template, output_schema=DEFAULT.output_schema, parameters="{}", name="mine")


def rendered(user: str) -> str:
    return next(core.renderings(context(sections=(section("captions", "Rain."),)), version(user))).messages[1].content


def again(step: str, begin: str = "{% set a = 'x' %}") -> str:
    return begin + step * 40 + "{{ a }}"


HUGE = [
    ("{% for i in range(10 ** 9) %}x{% endfor %}", "call is not taken"),
    ("{{ 'x' * 10 ** 9 }}", "a value of more than"),
    ("{{ 10 ** 9 * 'x' }}", "a value of more than"),
    ("{{ ('x',) * 10 ** 9 }}", "a value of more than"),
    ("{{ 'x' | center(10 ** 9) }}", "No filter named 'center'"),
    ("{{ 'x'.ljust(10 ** 9) }}", "call is not taken"),
    ("{{ '%1000000000d' | format(1) }}", "a format pads"),
    ("{{ '%1000000000d' % 1 }}", "a format pads"),
    ("{{ '%*d' % (1, 2) }}", "a format pads"),
    ("{{ '{:1000000000d}'.format(1) }}", "call is not taken"),
    ("{{ 1.5 | round(10 ** 9, 'ceil') }}", "round takes at most"),
    ("{{ 9 ** 9 ** 9 }}", "a number of more than"),
    (again("{% set a = a * a %}", "{% set a = 7 %}"), "a number of more than"),
    (again("{% set a = a ~ a %}"), "a value of more than"),
    (again("{% set a = a + a %}"), "a value of more than"),
    (again("{% set a = [a, a] %}"), "constants only"),
    (again("{% set a = a | replace('x', 'xx') %}"), "a value of more than"),
    (again("{% set a = [1, 2, 3] | join(a) %}"), "a value of more than"),
    ("{% for a in 'x' * 1000 %}" * 3 + "{% endfor %}" * 3, "more than 20000 steps"),
    ("{% for i in 'x' * 10000 %}{{ 'y' * 1000 }}{% endfor %}", "more than"),
    ("{% set a = 'x' * 1999999 %}{% for i in 'x' * 100000 %}{% if 'z' in a %}{% endif %}{% endfor %}", "steps"),
    (
        "{% set a = 'a b ' * 499999 %}{% for i in 'x' * 2500 %}{% set y = a.title().title().title() %}{% endfor %}",
        "more than 20000 steps",
    ),
    ("{% set big = 'ab' * 999999 %}{% for i in 'x' * 9999 %}{% set y = 'ba' * 9 ~ 'x' in big %}{% endfor %}", "steps"),
    ("{% set big = 'ab' * 999999 %}{% for i in 'x' * 9999 %}{% set y = 'bb' is in(big) %}{% endfor %}", "steps"),
    ("{% set big = 'A' * 1999999 %}{% for i in 'x' * 9999 %}{% set y = big is upper %}{% endfor %}", "steps"),
    ("{{ ('a' * 999999).strip('b' * 900000 ~ 'a') }}", "at most 100 characters can be stripped off"),
    ("{{ ('a' * 1999999) | trim('b' * 999999 ~ 'a') }}", "at most 100 characters can be stripped off"),
    ("{{ ('a' * 1999999) | sort | length }}", "more than 20000 steps"),
    ("{{ ('a' * 1999999) | select('in', 'b' * 99999) | list }}", "more than"),
    ("{% for i in 'x' * 99 %}{{ ('b ' * 199999) | title | length }}{% endfor %}", "more than 20000 steps"),
    ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "not taken"),
    ("{% for a in seen recursive %}{{ loop(seen) }}{% endfor %}", "not taken"),
    ("{% filter upper %}x{% endfilter %}", "not taken"),
    ("{% set a %}x{% endset %}", "not taken"),
    ("{% include 'x' %}", "not taken"),
    ("{% for a in seen %}" * 25 + "{% endfor %}" * 25, "nested too deeply"),
    ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
    ("{{ " + "+".join(["1"] * 2_000) + " }}", "nested too deeply"),
    ("x" * (sandbox.MAX_SOURCE + 1), "at most 32768 are taken"),
    ("{{ seen }}", "is no text"),
    ("{{ seen | join }}", "is no text"),
    ("{{ seen | string }}", "is no text"),
    ("{{ lipsum }}", "undefined"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ (seen | first)['__class__'] }}", "unsafe|undefined|no text"),
]


@pytest.mark.parametrize(("user", "why"), HUGE)
def test_what_would_not_end_or_would_fill_the_memory_is_refused_at_once(user: str, why: str) -> None:
    tracemalloc.start()
    began = time.thread_time()
    try:
        with pytest.raises(PromptError, match=why):
            rendered(user)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 64 << 20
    assert time.thread_time() - began < 10  # one second at most, when nothing traces the memory


@pytest.mark.parametrize(
    ("user", "text"),
    [
        ("{{ seen | map(attribute='label') | join(', ') }}", "person"),
        ("{{ 'night' if day_or_night == 'night' else 'day' }}", "night"),
        ("{% set n = seen | length %}{{ n }} kinds, {{ n * 2 + 1 }}", "1 kinds, 3"),
        ("{{ '%s at %02d' | format('a', 3) }}{{ '%.1f' % 1.25 }}", "a at 031.2"),
        ("{{ 'a' ~ 1 ~ camera.upper() }}", "a1FRONT-DOOR"),
        ("{% for s in sections if s.name %}{{ loop.index }}/{{ loop.length }} {{ s.text }}{% endfor %}", '1/1 "Rain."'),
        ("{{ 1.256 | round(1) }} {{ camera | replace('-', ' ') | title }}", "1.3 Front Door"),
        ("{{ 'yes' if camera in ['front-door', 'yard'] }}", "yes"),
        ("{% for s in sections | sort(attribute='name') %}{{ s['name'] }}{% else %}none{% endfor %}", "captions"),
    ],
)  # fmt: skip
def test_what_prompts_are_written_with_works(user: str, text: str) -> None:
    assert rendered(user) == text


def test_a_record_of_any_size_is_rendered_so_that_its_sections_can_be_dropped() -> None:
    found = context(sections=(section("captions", "x" * 1_000_000),))
    chat, without = core.renderings(found, DEFAULT)
    assert len(chat.messages[1].content) > 1_000_000
    assert without.dropped == ("captions",)


def test_the_steps_suffice_forty_times_over_for_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", sandbox.MAX_STEPS // 40)
    crowd = tuple(seen(f"kind{n}") for n in range(20))
    assert next(core.renderings(context(crowd, sections=(section("captions", "t" * 400),) * 10), DEFAULT))


@pytest.mark.parametrize("reference", ["https://example.org/schema.json", "file:///etc/passwd", "#/$defs/nowhere"])
def test_a_schema_refers_to_nothing_beyond_itself(reference: str) -> None:
    schema = json.loads(DEFAULT.output_schema)
    schema["properties"]["summary"] = {"$ref": reference}
    with pytest.raises(PromptError, match="mine: "):
        PromptVersion(template=DEFAULT.template, output_schema=json.dumps(schema), parameters="{}", name="mine")


DOUBLED = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(30)} | {"d30": {}}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"properties": {"summary": {"pattern": "^(a+)+$"}}}, "has `pattern`, which is not taken"),
        ({"default": {"pattern": "^(a+)+$"}, "allOf": [{"$ref": "#/default"}]}, "has `pattern`"),
        ({"patternProperties": {"^(a+)+$": {}}}, "has `patternProperties`"),
        ({"allOf": [{"$ref": "#"}]}, "refers to itself"),
        ({"$defs": {"a": {"not": {"$ref": "#/$defs/b"}}, "b": {"not": {"$ref": "#/$defs/a"}}}}, "refers to itself"),
        ({"allOf": [{"$dynamicRef": "#"}]}, "has `\\$dynamicRef`"),
        ({"allOf": [{"$id": "http://a/", "$ref": "#/$defs/b"}], "$defs": {"b": {}}}, "has `\\$id`"),
        ({"$defs": DOUBLED, "$ref": "#/$defs/d0"}, "more than 1000 schemas"),
    ],
)
def test_a_schema_with_which_checking_an_answer_might_not_end_is_refused(change: dict[str, object], why: str) -> None:
    schema = json.dumps(json.loads(DEFAULT.output_schema) | change)
    with pytest.raises(PromptError, match=f"mine: .*{why}"):
        PromptVersion(template=DEFAULT.template, output_schema=schema, parameters="{}", name="mine")


def test_a_schema_may_name_a_property_pattern_and_refer_to_a_part_twice() -> None:
    schema = json.loads(DEFAULT.output_schema)
    schema["properties"] |= {"pattern": {"$ref": "#/$defs/word"}, "$id": {"$ref": "#/$defs/word"}}
    schema["$defs"] = {"word": {"type": "string", "enum": ["pattern"]}}
    PromptVersion(template=DEFAULT.template, output_schema=json.dumps(schema), parameters="{}", name="mine")


def test_a_version_survives_its_files() -> None:
    for made in prompts.shipped().values():
        assert list(made.to_files()) == list(prompts.FILES)
        assert PromptVersion.from_texts(made.to_files(), made.name).digest == made.digest
