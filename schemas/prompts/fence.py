"""The fence around text that strangers wrote (camera names, labels, captions): it stays data wherever a prompt puts it.

llama.cpp's server tokenizes the whole chat with `parse_special`, the messages' content too: `</s>` or `<extra_id_1>`
in a caption *is* the token that ends the text or begins a turn (measured; vLLM's tokenizers do the same). So the
brackets that such marks need are replaced, line breaks never leave a line of the prompt, and longer text stands in
quotes that nothing in it can close.
"""

import re
import unicodedata

NAME_LIMIT = 64
"""Characters of a name or a label: longer than any that people read, too short to spend the context on."""

LABEL_WORDS = 3
"""Words that a label may have and stay as it is: COCO's longest have two (`traffic light`), Objects365's three."""

_QUOTES = str.maketrans(dict.fromkeys('"“”„‟«»', "'"))
_ZERO_WIDTH_JOINERS = "\u200c\u200d"
# Mistral's [INST], ChatGLM's [gMASK]: control tokens in square brackets are one word. Lists of numbers are none.
_BRACKETED = re.compile(r"\[(/?[^\W\d]\w*)\]")


class _Harmless(dict[int, str]):
    """What each character becomes, by `str.translate`."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        # Tokenizers that normalise first would make `<` of its wide and small forms.
        folded = unicodedata.normalize("NFKC", char)
        if any(bracket in folded for bracket in "<>[]"):  # angle brackets become single guillemets
            found = folded.replace("<", "\u2039").replace(">", "\u203a")
        elif (category := unicodedata.category(char)) == "Cc":
            found = " "
        elif category == "Cf" and char not in _ZERO_WIDTH_JOINERS:
            found = ""  # invisible: people do not see what the model would read, and text could run backwards
        elif category == "Cs":
            found = "\ufffd"  # half a surrogate pair, which no UTF-8 can hold
        else:
            found = char
        self[code] = found
        return found


_HARMLESS = _Harmless({ord("\n"): "\n"})


def harmless(text: str) -> str:
    """The text without anything that a tokenizer could take for a control token; its lines stay."""
    return _BRACKETED.sub(r"(\1)", text.translate(_HARMLESS))


def word(text: str) -> str:
    """One word in lower case, as ids are written: `Front door` becomes `front-door`. Empty if nothing is left."""
    return "-".join(harmless(" ".join(text.lower().split())).split())[:NAME_LIMIT]


def label(text: str) -> str:
    """A class's name, as detectors give it; a sentence in its place becomes one word."""
    words = harmless(" ".join(text.split())).split()
    joined = " " if len(words) <= LABEL_WORDS else "-"
    return joined.join(words)[:NAME_LIMIT]


def name(text: str) -> str:
    """A name for people, on one line, in quotes."""
    return quoted(" ".join(text.split())[:NAME_LIMIT])


def quoted(text: str) -> str:
    """Text of any length in quotes that none of its own closes; its further lines are indented, so none begins one."""
    lines = (harmless(line).strip() for line in text.splitlines())
    inside = "\n  ".join(line for line in lines if line)
    return f'"{inside.translate(_QUOTES)}"'
