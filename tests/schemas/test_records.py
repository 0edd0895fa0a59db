"""The typed records are what the Avro schemas say, and the gate that keeps versions compatible works."""

import json
import types
import typing
from typing import Any

import msgspec
import pytest

from schemas import avro_schemas, compatibility, records
from streams.topics import TOPICS

AVRO_TYPES = {str: "string", bool: "boolean", bytes: "bytes"}
NUMBERS = {int: {"int", "long"}, float: {"float", "double"}}


def raw_schema(topic: str) -> dict[str, Any]:
    return json.loads((avro_schemas.AVRO / f"{topic}.avsc").read_text())


def named_records(node: Any, found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    if isinstance(node, dict):
        if node.get("type") == "record":
            found[node["name"]] = node
        for value in node.values():
            named_records(value, found)
    elif isinstance(node, list):
        for value in node:
            named_records(value, found)
    return found


def matches(kind: Any, avro: Any) -> bool:
    if isinstance(avro, list):
        rest = [member for member in avro if member != "null"]
        arguments = [member for member in typing.get_args(kind) if member is not types.NoneType]
        return isinstance(kind, types.UnionType) and len(rest) == 1 and matches(arguments[0], rest[0])
    if isinstance(avro, dict):
        if avro["type"] == "array":
            item, ellipsis = typing.get_args(kind)
            return typing.get_origin(kind) is tuple and ellipsis is Ellipsis and matches(item, avro["items"])
        if avro["type"] == "map":
            return typing.get_origin(kind) is dict and matches(typing.get_args(kind)[1], avro["values"])
        return kind.__name__ == avro["name"]
    if kind in NUMBERS:
        return avro in NUMBERS[kind]
    return AVRO_TYPES.get(kind, getattr(kind, "__name__", None)) == avro


@pytest.mark.parametrize("topic", TOPICS)
def test_each_class_equals_its_schema(topic: str) -> None:
    schemas = named_records(raw_schema(topic), {})
    assert TOPICS[topic].record.__name__ == raw_schema(topic)["name"]
    for name, schema in schemas.items():
        kind = getattr(records, name)
        hints = typing.get_type_hints(kind)
        assert list(hints) == [field["name"] for field in schema["fields"]]
        for field in schema["fields"]:
            assert matches(hints[field["name"]], field["type"]), f"{name}.{field['name']}"


def test_the_catalogue_and_the_schemas_name_the_same_topics() -> None:
    assert set(TOPICS) == set(avro_schemas.topics())


@pytest.mark.parametrize("topic", TOPICS)
def test_every_field_is_documented(topic: str) -> None:
    for name, schema in named_records(raw_schema(topic), {}).items():
        assert schema["doc"].endswith("."), name
        for field in schema["fields"]:
            assert field["doc"].strip().endswith("."), f"{name}.{field['name']}"


def test_records_are_immutable() -> None:
    box = records.Box(label="cat", score=0.5, x=1, y=2, width=3, height=4)
    with pytest.raises(AttributeError):
        box.label = "dog"  # type: ignore[misc]
    assert msgspec.structs.replace(box, label="dog").label == "dog"


def test_the_tree_is_compatible_with_its_history() -> None:
    assert compatibility.problems() == []


def test_the_gate_finds_a_field_added_without_default(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = raw_schema("labels")
    changed["fields"].append({"name": "mood", "type": "string", "doc": "New."})
    now = avro_schemas.current
    monkeypatch.setattr(avro_schemas, "current", lambda topic: changed if topic == "labels" else now(topic))
    found = compatibility.problems()
    assert any("labels" in line and "cannot read version 1" in line for line in found)
    assert any("not the newest version" in line for line in found)
