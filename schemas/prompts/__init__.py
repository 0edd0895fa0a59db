"""Prompt versions: what the LLM is told and what it must answer, immutable and named by content.

The files beside this module are the default version. `system.txt`, `user.txt` and `repair.txt` are Jinja2
templates; `output_schema.json` is the completion's JSON schema (its key order is the order in which the model
writes: reasoning before the score, which helps small models); `parameters.json` holds sampling parameters, sent as
they are; `sections.json` says which context sections stay longest when the context is full.

A folder below is another version that comes with the product, in force nowhere by itself: it holds the files in which
it differs, the others are the default's.
"""

import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple, Self

import jsonschema
import msgspec
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from schemas import ids
from schemas.records import PromptRecord

VERDICT_KEYS = ("reasoning", "risk_factors", "entities", "summary", "recommended_action", "risk_score")
"""What every completion must hold, whatever else a version's schema asks for."""

# Prompts come over the log, from anyone who may write them: the sandbox keeps a template from reaching Python's
# internals. No HTML escaping: this is plain text.
_JINJA = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)


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
        PromptError: a template does not parse, or the schema is none, or it does not require every verdict key.
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
                _JINJA.from_string(text) for text in (self.templates.system, self.templates.user, self.templates.repair)
            )
            jsonschema.Draft202012Validator.check_schema(self.schema)
        except (ValueError, TemplateError, jsonschema.SchemaError) as error:
            raise PromptError(f"prompt {name or self.digest}: {type(error).__name__}: {error}") from error
        if not isinstance(self.sampling, dict):
            raise PromptError(f"prompt {name or self.digest}: parameters are not a JSON object")
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
        """The same chat, the unusable answer, and what was wrong with it.

        Raises:
            PromptError: the repair template cannot be rendered.
        """
        return (*asked, Message("assistant", answer), Message("user", self._render(self._repair, {"error": error})))

    def _render(self, template: Any, variables: Mapping[str, Any]) -> str:
        try:
            return str(template.render(variables))
        # A template is somebody's program: what it raises is not ours to list.
        except Exception as error:
            raise PromptError(f"prompt {self.name or self.digest}: {type(error).__name__}: {error}") from error

    @classmethod
    def from_files(cls, folder: Traversable, name: str, base: Traversable | None = None) -> Self:
        """The version that the files in a folder make, laid out as the default's.

        What is not in the folder is taken from `base`, where there is one.

        Raises:
            PromptError: as the constructor.
            OSError: a file is missing.
        """

        def text(file: str) -> str:
            path = folder / file
            if base is not None and not path.is_file():
                path = base / file
            return path.read_text(encoding="utf-8").removesuffix("\n")

        def compact(file: str) -> str:
            try:
                return json.dumps(json.loads(text(file)), separators=(",", ":"), ensure_ascii=False)
            except ValueError as error:
                raise PromptError(f"{file}: {error}") from error

        parts = {part: text(f"{part}.txt") for part in ("system", "user", "repair")}
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
def default() -> PromptVersion:
    """The version in the tree, for every camera that has no other."""
    return PromptVersion.from_files(files(__name__), "default")


@lru_cache(maxsize=1)
def deliveries_strict_nights() -> PromptVersion:
    """The demo's second version: deliveries are expected, and nights are judged more strictly."""
    name = "deliveries-strict-nights"
    return PromptVersion.from_files(files(__name__) / name, name, base=files(__name__))
