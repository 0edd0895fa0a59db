"""Where a model's answer stands in what it wrote: JSON as models write it, and their reasoning before it.

JSON's own grammar, and what can be read in one way only: trailing commas, comments, single and typographic quotes,
keys without quotes, Python's literals, raw line breaks in strings. Nothing is filled in or closed: an object that
breaks off, lacks a comma or holds a bare word is broken, and says where.

A reader of its own, since none at hand does only this [measured]. json-repair completes (`{"risk_score": 7`, cut off in
the middle of 72, becomes 7), lets the last of two scores win, and takes a draft in `<think>` for the answer;
`ast.literal_eval` knows no `true` and joins neighbouring strings; json5 takes 40 ms for 8 KB.

Linear in the length of the text, whatever it holds: no character is read twice by the same rule.
"""

import re
from typing import Any, NamedTuple

DEEPEST = 32
"""Levels of nesting. A verdict has two, in the envelope of a tool call five."""

_DIGITS = 300
"""The longest number, in characters: the largest double has 309 digits, and Python refuses integers above 4,300."""

_TAGS = ("think", "thinking", "thought", "thoughts", "reasoning", "reflection", "scratchpad", "analysis", "seed:think")

_REASONING = {
    **{f"<{tag}>": f"</{tag}>" for tag in _TAGS},
    "[think]": "[/think]",  # Magistral
    "◁think▷": "◁/think▷",  # Kimi
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|channel|>analysis<|message|>": "<|channel|>final<|message|>",  # gpt-oss
    "<|channel>thought": "<channel|>",  # Gemma
}
"""How models mark their reasoning: what begins it, and what ends it. Many chat templates write the beginning into the
prompt, so that an answer holds only the end."""

_END = {begin: re.compile(re.escape(end), re.IGNORECASE | re.ASCII) for begin, end in _REASONING.items()}

_BEGINS, _ENDS = ("|".join(map(re.escape, marks)) for marks in (_REASONING, _REASONING.values()))
# The first characters first: else every alternative is tried at every letter of prose. ASCII alone: in Unicode a long
# s is an s, too.
_MARK = re.compile(rf"(?=[\[<◁])(?ai:{_BEGINS}|{_ENDS})")
_LANDMARK = re.compile(
    rf"(?=[{{\[<◁])(?:(?ai:(?P<begin>{_BEGINS})|(?P<end>{_ENDS}))"
    # No {word}, and an array only where an object begins it: prose is full of [1] and [sic].
    r"|(?P<value>\{(?!\w++\})|\[(?=\s*+\{)))"
)

_SPACE = re.compile(r"(?:[\s\ufeff\u200b]++|(?://|#)[^\n]*+|/\*(?:.*?\*/|.*+))*+", re.DOTALL)
_QUOTES = {'"': '"', "'": "'", "“": "“”", "”": "”", "„": "“”", "\u2018": "\u2019"}
"""What a string begins with, and which characters end it."""
_BODY = {begin: re.compile(rf"(?:[^{ends}\\]++|\\.)*+", re.DOTALL) for begin, ends in _QUOTES.items()}
# Nearly every string and every place of a token is one of these: twice as fast together.
_STRING = re.compile(r'"([^"\\\x00-\x1f]*+)"')
_PLAIN = frozenset('{}[],:"')
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "/": "/"}
_CONTROL = re.compile(r"[\x00-\x1f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_NAME = re.compile(r"[A-Za-z_$][A-Za-z0-9_$-]*+(?=[\s\ufeff\u200b]*+:)")
_BARE = re.compile(r"[-+]?[A-Za-z0-9.][A-Za-z0-9_.+%-]*+(?:/[0-9]++)?")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*+)(?P<real>(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?)")
_ALMOST_NUMBER = re.compile(r"[-+]?[0-9]++(?:\.[0-9]*+)?(?:%|/[0-9]++)?")
_LITERALS = {"true": True, "false": False, "null": None}
_ODD_LITERALS = {
    "True": True,
    "False": False,
    "None": None,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
}


class Real(float):
    """A number with a fraction or an exponent, and how it was written."""

    text: str


class Piece(NamedTuple):
    """An object, or an array of objects, in a text: its span, and its value or what is wrong with it."""

    start: int
    end: int
    """Behind it; of a broken one, where reading gave up."""
    value: Any = None
    forgiven: frozenset[str] = frozenset()
    """What JSON does not allow, and was read all the same."""
    broken: str = ""
    lost: bool = False
    """It broke off, and may have swallowed the beginning of another: nothing behind it can be trusted."""


class Reading(NamedTuple):
    """What stands in a text behind its last reasoning."""

    start: int
    """Where that begins."""
    pieces: tuple[Piece, ...]
    unfinished: bool
    """The reasoning never ends, or nothing follows it."""


def read(text: str) -> Reading:
    """Find every object that stands outside of marked reasoning and behind it, whole or broken, in order.

    Braces in prose, with no key in them, are none. Marks of reasoning inside of an object's strings are text.
    """
    start = at = 0
    pieces: list[Piece] = []
    while (found := _LANDMARK.search(text, at)) is not None:
        at = found.end()
        if found["value"] is None:
            if found["begin"] is not None:
                end = _END[found["begin"].lower()].search(text, at)
                if end is None:
                    return Reading(len(text), (), unfinished=True)
                at = end.end()
            start = at
            pieces.clear()
            continue
        piece = _piece(text, found.start())
        at = piece.end
        if piece.value is not None or piece.broken:
            pieces.append(piece)
    return Reading(start, tuple(pieces), unfinished=start > 0 and not text[start:].strip())


def _piece(text: str, start: int) -> Piece:
    """What begins here; neither a value nor broken if it is only a brace in prose."""
    reader = _Reader(text, start)
    try:
        value = reader.value(0)
    except _BrokenError as error:
        end = max(reader.at, start + 1)
        swallowed = text.count("{", start, end) > reader.opened or _MARK.search(text, start, end) is not None
        if not (reader.keyed or swallowed):
            return Piece(start, end)
        return Piece(start, end, broken=f"{error} {_place(text, reader.at)}", lost=swallowed)
    return Piece(start, reader.at, value, frozenset(reader.forgiven), reader.contradiction)


def _place(text: str, at: int) -> str:
    if at >= len(text):
        return "where it ends"
    return f"at character {at}, before {text[at : at + 20]!r}"


class _BrokenError(Exception):
    """It cannot be read further than the reader's place."""


class _Reader:
    """Reads one value. `at` is how far it came."""

    def __init__(self, text: str, at: int) -> None:
        self.text = text
        self.at = at
        self.forgiven: set[str] = set()
        self.opened = 0
        """Objects begun."""
        self.keyed = False
        """An object was begun in earnest: it has a key, or breaks off where one would stand."""
        self.contradiction = ""
        """A key that stands twice in an object, with two values."""

    def value(self, depth: int) -> Any:
        char = self._next()
        if depth >= DEEPEST:
            raise _BrokenError("it is nested too deeply")
        if char == "{":
            return self._object(depth)
        if char == "[":
            return self._array(depth)
        if char in _QUOTES:
            return self._string(char)
        return self._bare()

    def _object(self, depth: int) -> dict[str, Any]:
        self.at += 1
        self.opened += 1
        members: dict[str, Any] = {}
        while not self._closes("}", first=not members):
            key = self._key()
            if self._next() != ":":
                raise _BrokenError("it is not JSON: a colon is missing")
            self.at += 1
            value = self.value(depth + 1)
            if key in members:
                self.forgiven.add("repeated key")
                # By their text: 1, 1.0 and true are equal, and not the same answer.
                if repr(members[key]) != repr(value):
                    self.contradiction = f"the key {key[:60]!r} stands in it twice, with different values"
            members[key] = value
        return members

    def _array(self, depth: int) -> list[Any]:
        self.at += 1
        items: list[Any] = []
        while not self._closes("]", first=not items):
            items.append(self.value(depth + 1))
        return items

    def _closes(self, closer: str, *, first: bool) -> bool:
        """Whether the container ends here; past the closer, or past the comma before its next item."""
        char = self._next()
        if not first and char == ",":
            self.at += 1
            if self._next() != closer:
                return False
            self.forgiven.add("trailing comma")
        elif char != closer:
            if first:
                return False
            raise _BrokenError(f"it is not JSON: a comma or {closer} is missing")
        self.at += 1
        return True

    def _key(self) -> str:
        char = self._next()
        if char in _QUOTES:
            self.keyed = True
            return self._string(char)
        name = _NAME.match(self.text, self.at)
        if name is None:
            raise _BrokenError("it is not JSON: a key in quotes is missing")
        self.keyed = True
        self.at = name.end()
        self.forgiven.add("unquoted key")
        return name[0]

    def _next(self) -> str:
        """The next character that is neither space nor comment."""
        char = self.text[self.at : self.at + 1]
        if char in _PLAIN:
            return char
        space = _SPACE.match(self.text, self.at)
        if space is not None and space.end() > self.at:
            self.at = space.end()
            if "/" in space[0] or "#" in space[0]:
                self.forgiven.add("comment")
        if self.at >= len(self.text):
            self.keyed = True
            raise _BrokenError("it is not JSON: it breaks off")
        return self.text[self.at]

    def _string(self, quote: str) -> str:
        if quote != '"':
            self.forgiven.add("quotes")
        elif (plain := _STRING.match(self.text, self.at)) is not None:
            self.at = plain.end()
            return plain[1]
        begin = self.at + 1
        body = _BODY[quote].match(self.text, begin)
        self.at = end = body.end() if body is not None else begin
        if end >= len(self.text) or self.text[end] == "\\":
            self.at = len(self.text)
            raise _BrokenError("it is not JSON: it breaks off in a text")
        self.at = end + 1
        found = self.text[begin:end]
        if _CONTROL.search(found) is not None:
            self.forgiven.add("raw line break")
        if "\\" in found:
            found = _ESCAPE.sub(self._unescape, found)
            if _SURROGATE.search(found) is not None:  # JSON escapes what lies beyond U+FFFF as a pair
                found = found.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return found

    def _unescape(self, escape: re.Match[str]) -> str:
        what = escape[1]
        if len(what) > 1:
            return chr(int(what[1:], 16))
        if what in _ESCAPES:
            return _ESCAPES[what]
        if what.isalnum():
            raise _BrokenError(f"it is not JSON: a text before this holds the escape \\{what!a}, which JSON has not,")
        self.forgiven.add("escape")
        return what

    def _bare(self) -> Any:
        word = _BARE.match(self.text, self.at)
        if word is None:
            raise _BrokenError("it is not JSON: a value is missing")
        found = word[0]
        number = _NUMBER.fullmatch(found)
        if number is not None and len(found) <= _DIGITS:
            value: Any = int(found) if not number["real"] else Real(found)
            if number["real"]:
                value.text = found
        elif found in _LITERALS:
            value = _LITERALS[found]
        elif found in _ODD_LITERALS:
            value = _ODD_LITERALS[found]
            self.forgiven.add("literal")
        elif _ALMOST_NUMBER.fullmatch(found) is not None and len(found) <= _DIGITS:
            value = found  # as the text that it would be in quotes
            self.forgiven.add("unquoted value")
        else:
            raise _BrokenError("it is not JSON: this value needs quotes, or is no value")
        self.at = word.end()
        return value
