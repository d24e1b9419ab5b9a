"""A program as people start it from the repository's folder, and the commands that they copy."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start(*words: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """`python` with these words, run to its end."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def documented_commands(program: str, *texts: str) -> list[list[str]]:
    """Of every `python PROGRAM …` in the texts, the words that follow the program."""
    text = "\n".join(texts).replace("\\\n", " ")
    found = re.findall(rf"^ *(?:\S*/)?python {re.escape(program)}(.*)$", text, re.MULTILINE)
    return [shlex.split(words, comments=True) for words in found]
