"""Text to sentences.

A sentence here is what BERT calls one: a stretch of text, cut where a sentence or a paragraph
ends. Stretches of more than 400 characters (tables, code) are cut at a line's end or a blank.
"""

import re

MAX_CHARACTERS = 400
# not before a small letter, which goes on after an abbreviation
_END = re.compile(
    r"""[.!?…]["'”’)\]]*(?=\s+[^\sa-z])|[。！？]["”』」）]*|\n(?=[^\S\n]*\n)"""  # noqa: RUF001
)


def cut_into_sentences(text: str) -> list[str]:
    """The sentences of a text; together they are the text. White space stands at their start."""
    sentences, start = [], 0
    for end in [*(match.end() for match in _END.finditer(text)), len(text)]:
        while end - start > MAX_CHARACTERS:
            limit = start + MAX_CHARACTERS
            line, blank = (text.rfind(mark, start + 1, limit) for mark in "\n ")
            cut = line if line > start else blank if blank > start else limit
            sentences.append(text[start:cut])
            start = cut
        sentences.append(text[start:end])
        start = end
    return sentences
