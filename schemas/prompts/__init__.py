"""Prompt versions: what the LLM is told and what it must answer, immutable and named by content.

The files beside this module are the default version. `system.txt`, `user.txt` and `repair.txt` are Jinja2
templates; `output_schema.json` is the completion's JSON schema (its key order is the order in which the model
writes: reasoning before the score, which helps small models); `parameters.json` holds sampling parameters, sent as
they are; `sections.json` says which context sections stay longest when the context is full.

A folder below is another version that comes with the product, in force nowhere by itself: it holds the files in which
it differs, the others are the default's.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple, Self

import jsonschema
import msgspec
import referencing
from jinja2 import TemplateError
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from schemas import ids
from schemas.prompts import fence, sampling, sandbox
from schemas.records import PromptRecord

VERDICT_KEYS = ("reasoning", "risk_factors", "entities", "summary", "recommended_action", "risk_score")
"""What every completion must hold, whatever else a version's schema asks for."""

FILES = ("system.txt", "user.txt", "repair.txt", "output_schema.json", "parameters.json", "sections.json")
"""The files of a version, in the order in which people read them."""


# Regular expressions can take exponential time; other references than `$ref` are resolved where they are met.
_REFUSED = frozenset({"pattern", "patternProperties", "$dynamicRef", "$recursiveRef"})
_AT_THE_ROOT = frozenset({"$id", "$schema"})  # below it they change what references mean

_DATA = frozenset({"enum", "const", "default", "examples"})
_BY_NAME = frozenset({"properties", "$defs", "definitions", "dependentSchemas"})

_MAX_SCHEMAS = 1_000
"""Of an output schema, each reference followed each time: the default has some twenty."""


class PromptError(ValueError):
    """This prompt version cannot be used, or cannot be rendered; the message says which part and why."""


class Message(NamedTuple):
    """One message of a chat."""

    role: str
    content: str


class Templates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `PromptRecord.template` holds, as JSON."""

    system: str
    user: str
    repair: str
    sections: dict[str, int] = {}
    """Priority of context sections by name, over the priority that their enricher gave; the lowest go first."""


class PromptVersion:
    """One immutable prompt version.

    `template`, `output_schema` and `parameters` are JSON texts; the version's name is a digest of the three.

    Raises:
        PromptError: a template does not parse, or the schema is none, or checking by it might not end soon, or it does
            not require every verdict key, or a parameter is none (`sampling`).
    """

    def __init__(self, *, template: str, output_schema: str, parameters: str, name: str = "") -> None:
        self.template = template
        self.output_schema = output_schema
        self.parameters = parameters
        self.name = name
        self.digest = ids.digest(template, output_schema, parameters)
        try:
            self.templates = msgspec.json.decode(template, type=Templates)
            self.schema: Mapping[str, Any] = json.loads(output_schema)
            self.sampling: Mapping[str, Any] = json.loads(parameters)
            self._system, self._user, self._repair = (
                sandbox.compiled(text) for text in (self.templates.system, self.templates.user, self.templates.repair)
            )
            jsonschema.Draft202012Validator.check_schema(self.schema)
            _check_bounds(self.schema)
        except (ValueError, TemplateError, jsonschema.SchemaError, RecursionError, Unresolvable) as error:
            raise PromptError(f"prompt {name or self.digest}: {type(error).__name__}: {error}") from error
        if not isinstance(self.sampling, dict):
            raise PromptError(f"prompt {name or self.digest}: parameters are not a JSON object")
        if wrong := sampling.problem(self.sampling):
            raise PromptError(f"prompt {name or self.digest}: {wrong}")
        missing = set(VERDICT_KEYS) - set(self.schema.get("required", ()) if isinstance(self.schema, dict) else ())
        if missing:
            raise PromptError(f"prompt {name or self.digest}: the output schema must require {sorted(missing)}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptVersion) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def validator(self) -> jsonschema.Draft202012Validator:
        """Checks completions against the output schema."""
        return jsonschema.Draft202012Validator(self.schema)

    def messages(self, variables: Mapping[str, Any]) -> tuple[Message, ...]:
        """The chat that asks for a verdict; the constant part comes first, so that servers can cache it.

        Raises:
            PromptError: a template names what is not there, or fails on what is.
        """
        return (
            Message("system", self._render(self._system, variables)),
            Message("user", self._render(self._user, variables)),
        )

    def repair(self, asked: tuple[Message, ...], answer: str, error: str) -> tuple[Message, ...]:
        """The same chat, the unusable answer, and what was wrong with it, both fenced: they repeat what was read.

        Raises:
            PromptError: the repair template cannot be rendered.
        """
        told = self._render(self._repair, {"error": fence.harmless(error)})
        return (*asked, Message("assistant", fence.harmless(answer)), Message("user", told))

    def _render(self, template: Any, variables: Mapping[str, Any]) -> str:
        try:
            return sandbox.render(template, variables)
        # A template is somebody's program: what it raises is not ours to list.
        except Exception as error:
            raise PromptError(f"prompt {self.name or self.digest}: {type(error).__name__}: {error}") from error

    def to_files(self) -> dict[str, str]:
        """The version as the text of each of `FILES`, which `from_files` makes the same version of."""
        texts = {f"{part}.txt": str(getattr(self.templates, part)) + "\n" for part in ("system", "user", "repair")} | {
            "output_schema.json": _pretty(self.output_schema),
            "parameters.json": _pretty(self.parameters),
            "sections.json": _pretty(json.dumps(self.templates.sections)),
        }
        return {file: texts[file] for file in FILES}

    @classmethod
    def from_files(cls, folder: Traversable, name: str, base: Traversable | None = None) -> Self:
        """The version that the files in a folder make, laid out as the default's.

        What is not in the folder is taken from `base`, where there is one.

        Raises:
            PromptError: as the constructor.
            OSError: a file is missing.
        """
        texts = {}
        for file in FILES:
            path = folder / file
            if base is not None and not path.is_file():
                path = base / file
            texts[file] = path.read_text(encoding="utf-8")
        return cls.from_texts(texts, name)

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], name: str) -> Self:
        """The version that the texts of `FILES` make.

        Raises:
            PromptError: as the constructor.
        """

        def compact(file: str) -> str:
            try:
                return json.dumps(json.loads(texts[file]), separators=(",", ":"), ensure_ascii=False)
            except (ValueError, RecursionError) as error:
                raise PromptError(f"{file}: {error}") from error

        parts = {part: texts[f"{part}.txt"].removesuffix("\n") for part in ("system", "user", "repair")}
        template = json.dumps(
            {**parts, "sections": json.loads(compact("sections.json"))},
            separators=(",", ":"),
            ensure_ascii=False,
        )
        return cls(
            template=template,
            output_schema=compact("output_schema.json"),
            parameters=compact("parameters.json"),
            name=name,
        )

    @classmethod
    def from_record(cls, record: PromptRecord) -> Self:
        """The version that a record of `prompts` carries.

        Raises:
            PromptError: it is a pointer, or its content is not what its digest says, or as the constructor.
        """
        if record.kind != "version":
            raise PromptError(f"a record of kind {record.kind} holds no prompt")
        version = cls(
            template=record.template,
            output_schema=record.output_schema,
            parameters=record.parameters,
            name=record.name,
        )
        if version.digest != record.digest:
            raise PromptError(f"prompt {record.digest}: its content has digest {version.digest}")
        return version

    def to_record(self, created_at: int, comment: str = "") -> PromptRecord:
        """The record of `prompts` that carries this version; `created_at` in milliseconds since the Unix epoch."""
        return PromptRecord(
            kind="version",
            digest=self.digest,
            scope="",
            name=self.name,
            template=self.template,
            output_schema=self.output_schema,
            parameters=self.parameters,
            comment=comment,
            created_at=created_at,
        )


@lru_cache(maxsize=1)
def shipped() -> Mapping[str, PromptVersion]:
    """The versions that come with the product, by name: the default first."""
    here = files(__name__)
    others = sorted(folder.name for folder in here.iterdir() if (folder / "system.txt").is_file())
    return {"default": PromptVersion.from_files(here, "default")} | {
        name: PromptVersion.from_files(here / name, name, base=here) for name in others
    }


def default() -> PromptVersion:
    """The version in the tree, for every camera that has no other."""
    return shipped()["default"]


def deliveries_strict_nights() -> PromptVersion:
    """The demo's second version: deliveries are expected, and nights are judged more strictly."""
    return shipped()["deliveries-strict-nights"]


def _pretty(text: str) -> str:
    return json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"


def _check_bounds(schema: Any) -> None:
    """Refuse a schema that refers beyond itself, or with which checking what a model wrote might not end soon.

    What refers to another document would make a validator go and fetch it.

    Raises:
        ValueError: it does; says which keyword.
        Unresolvable: it refers to what is not there.
    """
    if not isinstance(schema, dict):
        return
    resolver = referencing.Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver()
    todo: list[tuple[Any, frozenset[int]]] = [(schema, frozenset())]
    seen = 0
    while todo:
        part, above = todo.pop()
        if not isinstance(part, dict):
            continue
        seen += 1
        if seen > _MAX_SCHEMAS:
            raise ValueError(f"the output schema has more than {_MAX_SCHEMAS} schemas in it, each `$ref` followed")
        if id(part) in above:
            raise ValueError("the output schema refers to itself (`$ref`): checking an answer might not end")
        above |= {id(part)}
        if refused := _REFUSED.intersection(part) or (_AT_THE_ROOT.intersection(part) if part is not schema else None):
            raise ValueError(
                f"the output schema has `{min(refused)}`, which is not taken: checking an answer might not end soon; "
                "say in the prompt what a text is like, or list the texts by `enum`"
            )
        if isinstance(reference := part.get("$ref"), str):
            todo.append((resolver.lookup(reference).contents, above))
        todo += [(inside, above) for inside in _inside(part)]


def _inside(schema: Mapping[str, Any]) -> Iterator[Any]:
    """What may be a schema in a schema."""
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, dict):
            yield from value.values()
        elif key not in _DATA:
            yield from value if isinstance(value, list) else [value]
