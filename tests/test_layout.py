"""Where a file belongs, how long it may be, and what it may import."""

import ast
import sys
from collections import Counter
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
UTILS_FILES = 35
UTILS_LINES = 9_621
FILE_LINES = 350

UTILS = [path for path in sorted(ROOT.glob("utils/**/*.py")) if path.name != "__init__.py"]
RECIPES = sorted(ROOT.glob("recipes/**/*.py"))
READERS = sorted([*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")])
TREES = {path: ast.parse(path.read_text()) for path in (*UTILS, *RECIPES, *READERS)}
CONFIGS = sorted(ROOT.glob("recipes/*/configs/*.yaml"))
INSTALLED = packages_distributions()


def is_script(path: Path) -> bool:
    tests = [node.test for node in TREES[path].body if isinstance(node, ast.If)]
    return any(ast.unparse(test) == "__name__ == '__main__'" for test in tests)


SCRIPTS = [path for path in RECIPES if is_script(path)]
PARTS = [path for path in RECIPES if path not in SCRIPTS]


def imports(tree: ast.AST) -> set[str]:
    """The modules that are imported, in functions too, and what is taken from them.

    `from a import b` gives `a` and `a.b`, `from . import b` gives `.` and `..b`; what only type
    checkers import is left out.
    """
    if isinstance(tree, ast.If) and ast.unparse(tree.test).endswith("TYPE_CHECKING"):
        return set().union(*map(imports, tree.orelse))
    if isinstance(tree, ast.Import):
        return {name.name for name in tree.names}
    if isinstance(tree, ast.ImportFrom):
        module = "." * tree.level + (tree.module or "")
        return {module, *(f"{module}.{name.name}" for name in tree.names)}
    return set().union(*map(imports, ast.iter_child_nodes(tree)))


IMPORTS = {path: imports(tree) for path, tree in TREES.items()}


def files(path: Path) -> set[Path]:
    """The parts and the files of utils that a file imports."""
    found = set()
    for name in IMPORTS[path]:
        above = ROOT if name.startswith(("utils.", "recipes.")) else path.parent
        found.add(above / f"{name.removeprefix('.').replace('.', '/')}.py")
    return found & {*UTILS, *RECIPES}


def reach(path: Path) -> set[Path]:
    """The file, and all that it imports directly and through others."""
    found, todo = set(), [path]
    while todo:
        path = todo.pop()
        todo += files(path) - found
        found.add(path)
    return found


def shown(paths: Iterable[Path]) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_utils_is_small():
    assert len(UTILS) <= UTILS_FILES
    assert sum(map(lines, UTILS)) <= UTILS_LINES


def test_no_file_is_long():
    assert shown(path for path in UTILS + RECIPES if lines(path) > FILE_LINES) == []


def test_utils_is_what_two_recipe_folders_use():
    folders = {path: set() for path in UTILS}
    for script in SCRIPTS:
        for path in reach(script) & {*UTILS}:
            folders[path].add(script.parent.name)
    assert {path.name: found for path, found in folders.items() if len(found) < 2} == {}


DEFINED = {path: {n.name for n in tree.body if hasattr(n, "name")} for path, tree in TREES.items()}


def definitions(path: Path) -> dict[tuple[Path, str], set[tuple[Path, str]]]:
    """(file, name) of its functions and classes → those, of any file, that each names."""
    known = {name: (path, name) for name in DEFINED[path]}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and node.module:
            above = ROOT if node.module.partition(".")[0] == "utils" else path.parent
            source = above / node.module.replace(".", "/")
            for name in node.names:
                alias, file = name.asname or name.name, source.with_suffix(".py")
                if name.name in DEFINED.get(file, ()):
                    known[alias] = (file, name.name)
                file = source / f"{name.name}.py"  # from utils import checkpoint
                known |= {f"{alias}.{inside}": (file, inside) for inside in DEFINED.get(file, ())}
    found: dict[tuple[Path, str], set[tuple[Path, str]]] = {}
    for node in TREES[path].body:
        places = (n for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute))
        names = {ast.unparse(place) for place in places}
        key = (path, getattr(node, "name", ""))  # "": what stands in no function
        found[key] = found.get(key, set()) | {known[name] for name in names & known.keys()}
    return found


def test_each_function_and_class_of_utils_is_what_two_recipe_folders_use():
    uses = {key: named for path in UTILS + RECIPES for key, named in definitions(path).items()}
    folders = {key: set() for key in uses if key[0] in UTILS and key[1]}
    for folder in {script.parent for script in SCRIPTS}:
        todo, seen = [key for key in uses if key[0].parent == folder], set()
        while todo:
            key = todo.pop()
            if key not in seen:
                seen.add(key)
                # a module that is imported runs what stands in none of its functions
                todo += [*uses.get(key, ()), (key[0], "")]
        for key in seen & folders.keys():
            folders[key].add(folder.name)
    alone = {f"{path.name}: {name}" for (path, name), found in folders.items() if len(found) < 2}
    assert alone == set()


def test_no_imports_go_in_a_circle():
    try:
        TopologicalSorter({path: files(path) for path in UTILS + RECIPES}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(str(path.relative_to(ROOT)) for path in error.args[1][::-1]))


@pytest.mark.parametrize("path", UTILS + RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipes_import_parts_beside_them_and_utils_and_utils_no_recipe(path):
    beside = {part.stem for part in PARTS if part.parent == path.parent}
    known = {*beside, "utils", *sys.stdlib_module_names, *INSTALLED}
    # `evaluate` loads a part as a module of a package, in which others are imported with a dot
    names = {name.removeprefix(".").partition(".")[0] for name in IMPORTS[path]}
    assert names - known == set()


def test_no_name_of_a_part_is_taken():
    names = Counter(path.stem for path in RECIPES)
    assert shown(part for part in PARTS if names[part.stem] > 1) == []
    # a script's folder leads the import path: it would hide these
    taken = {*sys.stdlib_module_names, *INSTALLED}
    assert shown(path for path in RECIPES if path.stem in taken) == []


@pytest.mark.parametrize("path", READERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_imported_by_their_path_and_parts_by_their_name(path):
    """Never both ways: a class would have two identities."""
    scripts = {script.stem for script in SCRIPTS}
    parts = {str(part.relative_to(ROOT).with_suffix("")).replace("/", ".") for part in PARTS}
    assert IMPORTS[path] & (scripts | parts) == set()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_named_after_its_script_and_its_run_after_the_config(config):
    folder = config.parent.parent
    scripts = [path.stem for path in SCRIPTS if path.parent == folder]
    (script,) = (script for script in scripts if config.stem.startswith(f"{script}_"))
    output_dir = yaml.safe_load(config.read_text()).get("output_dir")
    if script == "train_tokenizer":
        assert output_dir.startswith("data/tokenizers/")
    elif script == "generate":
        assert output_dir is None
    elif (folder.name, config.stem) == ("causal_lm", "pretrain_demo"):
        assert output_dir == "runs/demo"
    else:
        assert output_dir == f"runs/{folder.name}/{config.stem}"
