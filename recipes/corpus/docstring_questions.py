"""What a docstring in numpy's style answers: questions, with the places of their answers in it.

The style: https://numpydoc.readthedocs.io/en/latest/format.html
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

SECTION = re.compile(r"^(\S[^\n]*)\n-{3,}[ \t]*$", re.MULTILINE)
ENTRY = re.compile(r"^\S.*(?:\n(?:[ \t].*)?(?=\n|\Z))*", re.MULTILINE)
NAMES = re.compile(r"(\*{0,2}[A-Za-z]\w*(?:, \*{0,2}[A-Za-z]\w*)*) ?: (?=\S)")
TYPE = re.compile(
    r"\S.*?(?=[.,;]?\s*$|(?:\s*[,;]\s*|\s*\(|\s+)(?:optional|[Dd]efaults?|keyword)\b)", re.MULTILINE
)
SHAPE = re.compile(r"\bshape *=? *(\([^()\n]*\)(?: or \([^()\n]*\))*)")
DEFAULT = re.compile(
    r"\b[Dd]efaults?(?::| to| is|=| value is)?[ =]*"
    r"(``[^`\n]+``|`[^`\n]+`|\"[^\"\n]*\"|'[^'\n]*'|None|True|False|-?\d[\w.+-]*(?<!\.))"
    r"(?=[.,;)]|\s*$|\s+\()",
    re.MULTILINE,
)
SENTENCE = re.compile(
    r"[A-Z`](?:[^\n]|\n(?![ \t]*\n)){4,250}?(?<=\S)(?=\.(?:\s+[A-Z`]|\s*\Z|\s*\n\n))"
)
VERSION = re.compile(r"\.\. versionadded:: ?(\d[\w.]*)")
NOUNS = {"Parameters": "parameter", "Other Parameters": "parameter", "Attributes": "attribute"}
EXCEPTIONS = ("ValueError", "TypeError", "KeyError", "IndexError", "RuntimeError", "OSError")
# what points to something else, and explains nothing
POINTER = re.compile(
    r"(see|refer to|deprecated|todo|fixme|alias|overrid\w+|internal|private|same as|wrapper)\b",
    re.IGNORECASE,
)
BRACKETS = ("()", "[]", "{}")
# kind → wordings; {owner} is a function or class, {noun} "parameter" or "attribute"
WORDINGS = {
    "type": (
        "What is the type of the {noun} `{name}` of `{owner}`?",
        "Which type does the {noun} `{name}` have?",
        "Of what type is `{name}`, the {noun} of `{owner}`?",
    ),
    "shape": (
        "What is the shape of the {noun} `{name}` of `{owner}`?",
        "Which shape does the {noun} `{name}` have?",
    ),
    "default": (
        "What is the default value of the {noun} `{name}` of `{owner}`?",
        "Which value does the {noun} `{name}` take when it is not given?",
        "What does `{name}` default to in `{owner}`?",
    ),
    "meaning": (
        "What is the {noun} `{name}` of `{owner}`?",
        "What does the {noun} `{name}` stand for?",
        "How is the {noun} `{name}` of `{owner}` described?",
    ),
    "version": (
        "In which version was the {noun} `{name}` added to `{owner}`?",
        "Since which version is there the {noun} `{name}`?",
    ),
    "returned_type": (
        "What is the type of what `{owner}` returns?",
        "Which type does `{owner}` return?",
    ),
    "returned": (
        "What does `{owner}` return?",
        "What is the value that `{owner}` returns?",
    ),
    "raised": (
        "When does `{owner}` raise `{name}`?",
        "In which case is `{name}` raised?",
    ),
}
Spans = tuple[tuple[int, int], ...]  # (start, end) in a context


class Question(NamedTuple):
    kind: str
    name: str = ""  # of what it asks for
    noun: str = "parameter"
    answers: Spans = ()  # none if it has no answer


def questions(context: str) -> Iterator[Question]:
    """What a docstring in numpy's style answers."""
    headers = list(SECTION.finditer(context))
    ends = [*(header.start() for header in headers[1:]), len(context)]
    for header, end in zip(headers, ends, strict=False):
        entries = list(ENTRY.finditer(context, header.end(), end))
        if header[1] in NOUNS:
            for entry in entries:
                yield from about_parameter(context, entry, NOUNS[header[1]])
        elif header[1] == "Returns" and len(entries) == 1:
            yield from about_returned(context, entries[0])
        elif header[1] == "Raises":
            for entry in entries:
                yield from about_raised(context, entry)


def about_parameter(context: str, entry: re.Match, noun: str) -> Iterator[Question]:
    names = NAMES.match(context, entry.start(), entry.end())
    if not names:
        return
    found = {
        "type": type_spans(context, names.end()),
        "shape": spans(SHAPE, context, names.end(), end_of_line(context, names.end())),
        "default": spans(DEFAULT, context, names.end(), entry.end()),
        "meaning": meaning(context, entry),
        "version": spans(VERSION, context, entry.start(), entry.end()),
    }
    for kind, answers in found.items():
        if answers:
            for name in names[1].split(", "):
                yield Question(kind, name, noun, answers)


def about_returned(context: str, entry: re.Match) -> Iterator[Question]:
    names = NAMES.match(context, entry.start(), entry.end())
    if answers := type_spans(context, names.end() if names else entry.start()):
        yield Question("returned_type", answers=answers)
    if answers := meaning(context, entry):
        yield Question("returned", answers=answers)


def about_raised(context: str, entry: re.Match) -> Iterator[Question]:
    name = entry[0].partition("\n")[0].strip()
    is_exception = re.fullmatch(r"[A-Z]\w+(Error|Exception|Warning)", name)
    if is_exception and context.count(name) == 1 and (answers := meaning(context, entry)):
        yield Question("raised", name, answers=answers)


def without_answer(kind: str, context: str, strangers: list[str]) -> list[Question]:
    """Questions about a name that does not occur in the docstring, or what it does not return."""
    if kind in ("returned", "returned_type"):
        return [] if re.search("return|yield", context, re.IGNORECASE) else [Question(kind)]
    words = set(re.findall(r"\w+", context))
    names = EXCEPTIONS if kind == "raised" else strangers
    return [Question(kind, name) for name in names if name not in words]


def type_spans(context: str, start: int) -> Spans:
    """The type that stands at `start`; as a second answer all that its line says."""
    end = end_of_line(context, start)
    found = TYPE.match(context, start, end)
    if (
        not found
        or len(found[0]) > 80
        or any(found[0].count(a) != found[0].count(b) for a, b in BRACKETS)
    ):
        return ()
    return tuple(dict.fromkeys([found.span(), (start, end)]))


def meaning(context: str, entry: re.Match) -> Spans:
    """The first sentence below the first line of an entry."""
    first_line = end_of_line(context, entry.start())
    text = re.compile(r"\s*").match(context, first_line, entry.end()).end()
    found = SENTENCE.match(context, text, entry.end())
    return (found.span(),) if found and not POINTER.match(found[0]) else ()


def spans(pattern: re.Pattern, context: str, start: int, end: int) -> Spans:
    """Where the group of a pattern is found; nowhere if that says different things."""
    found = list(pattern.finditer(context, start, end))
    return (
        tuple(match.span(1) for match in found) if len({match[1] for match in found}) == 1 else ()
    )


def end_of_line(text: str, start: int) -> int:
    """Where the line of `start` ends, blanks at its end left out."""
    return start + len(text[start:].partition("\n")[0].rstrip())
