"""What is installed along with Python: the packages of the samples, and what their files define.

Packages are parsed, never imported.
"""

import ast
import platform
import warnings
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import decode_source
from typing import NamedTuple

from utils.config import InputError

# the domains of docstrings, each with the distribution that they are read from
DOCSTRING_DOMAINS = {
    "NumPy": "numpy",
    "SciPy": "scipy",
    "ScikitLearn": "scikit-learn",
    "Pandas": "pandas",
    "PyTorch": "torch",
    "Transformers": "transformers",
    "SymPy": "sympy",
    "NetworkX": "networkx",
}
# whose READMEs the sample corpus holds: another one here makes another corpus
PACKAGES = (
    "PyYAML",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "evaluate",
    "matplotlib",
    "networkx",
    "numpy",
    "pandas",
    "peft",
    "pyarrow",
    "pytest",
    "pytest-timeout",
    "rouge-score",
    "ruff",
    "sacrebleu",
    "scikit-learn",
    "scipy",
    "sympy",
    "tensorboard",
    "tokenizers",
    "torch",
    "transformers",
    "zstandard",
)
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "testing",
    "site-packages",
    "dist-packages",
    "encodings",  # tables of character codes
    "pydoc_data",  # in a domain of its own
}
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")  # where a statement holds others


class Definition(NamedTuple):
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    source: str  # file and name, "numpy/linalg/_linalg.py:norm"; of a module the file alone
    lines: list[str]  # of the whole file, without their ends


def installed(name: str) -> Distribution:
    """The distribution `name`.

    Raises:
        InputError: it is not installed.
    """
    try:
        return distribution(name)
    except PackageNotFoundError:
        raise InputError(f"the package {name} is not installed: run `make setup`") from None


def versions() -> str:
    """Of Python and the packages: "Python 3.11.9, accelerate 1.15.0, …"."""
    packages = [f"{name} {installed(name).version}" for name in PACKAGES]
    return ", ".join([f"Python {platform.python_version()}", *packages])


def definitions(package: Distribution) -> Iterator[Definition]:
    """The modules, classes and functions of a package; a file that cannot be parsed is named."""
    for path in sorted(package.files or [], key=str):
        if path.suffix != ".py" or SKIPPED_FOLDERS.intersection(path.parts):
            continue
        try:
            text = decode_source(path.locate().read_bytes())  # in the encoding that it declares
            with warnings.catch_warnings(action="ignore"):
                # one grammar, so that newer Pythons read the same
                tree = ast.parse(text, feature_version=(3, 11))
        except (SyntaxError, ValueError) as error:
            print(f"  skipped {path.as_posix()}: {error}", flush=True)
            continue
        lines = text.split("\n")
        nodes: list[tuple[ast.AST, str]] = [(tree, path.as_posix())]
        for node, source in nodes:  # the list grows as it is read
            if isinstance(node, DEFINITIONS):
                yield Definition(node, source, lines)
            for block in BLOCKS:
                for child in getattr(node, block, ()):
                    if isinstance(child, DEFINITIONS):
                        separator = "." if ":" in source else ":"
                        nodes.append((child, f"{source}{separator}{child.name}"))
                    else:
                        nodes.append((child, source))
