"""What an installation brings, and that a copied and changed folder is a recipe of its own."""

import ast
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from email import message_from_bytes
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launching import command_line, metrics
from programs import ROOT, start


def distributions(files: Iterable[Path]) -> set[str]:
    """What must be installed for the imports of these files, those in functions too."""
    modules = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module or "")
    providers = packages_distributions()
    names = {name.partition(".")[0] for name in modules} - {"utils"}
    return {canonicalize_name(name) for module in names for name in providers.get(module, [])}


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if "==" in line]
    return {canonicalize_name(pin.name): str(pin.specifier).lstrip("=") for pin in pinned}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """Built from a copy: setuptools writes beside what it builds."""
    source, folder = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "utils", source / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", *options, source], check=True)
    (file,) = folder.iterdir()
    with ZipFile(file) as opened:
        yield opened


@pytest.fixture(scope="module")
def requirements(wheel: ZipFile) -> list[Requirement]:
    (file,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    lines = message_from_bytes(wheel.read(file)).get_all("Requires-Dist")
    return [Requirement(line) for line in lines]


def test_the_wheel_holds_all_of_utils(wheel):
    files = {path.relative_to(ROOT) for path in ROOT.glob("utils/**/*") if path.is_file()}
    expected = {str(path) for path in files if "__pycache__" not in path.parts}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected
    assert "utils/__init__.py" in expected


def test_the_wheel_asks_for_what_utils_and_the_recipes_import(requirements):
    imported = distributions([*ROOT.glob("utils/**/*.py"), *ROOT.glob("recipes/**/*.py")])
    names = [canonicalize_name(requirement.name) for requirement in requirements]
    assert sorted(names) == sorted(imported)


def test_a_version_of_each_is_pinned_that_the_wheel_takes(requirements):
    for requirement in requirements:
        assert requirement.specifier
        assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_what_the_tests_import_is_pinned():
    assert distributions(ROOT.glob("tests/**/*.py")) <= set(pins())


def test_the_repository_itself_is_installed_last():
    assert (ROOT / "requirements.txt").read_text().splitlines()[-1] == "-e ."


def test_the_citation_is_of_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what it must have
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]


def launch_copy(recipe: str, edits: dict[str, tuple[str, str]], folder: Path) -> Path:
    """The output_dir of one step of a copy in which texts of files are replaced."""
    copy, output_dir = folder / "mine", folder / "run"
    shutil.copytree(ROOT / "recipes" / recipe, copy)
    for name, (old, new) in edits.items():
        text = (copy / name).read_text()
        assert old in text
        (copy / name).write_text(text.replace(old, new))
    settings = {"output_dir": str(output_dir), "max_steps": 1, "eval_steps": 1, "save_steps": 1}
    config = copy / "configs" / "finetune_smoke.yaml"
    done = start(copy / "finetune.py", config, *command_line(settings))
    assert done.returncode == 0, done.stdout + done.stderr
    return output_dir


def test_a_copy_has_a_part_and_a_chat_template_of_its_own(tmp_path):
    part = 'input_column: str = "input"', 'input_column: str = "context"'
    template = "### Question:", "### Mine:"
    edits = {"conversations.py": part, "chat_templates/plain.jinja": template}
    output_dir = launch_copy("causal_lm", edits, tmp_path)
    assert yaml.safe_load((output_dir / "config.yaml").read_text())["input_column"] == "context"
    assert "### Mine:" in (output_dir / "model" / "chat_template.jinja").read_text()


def test_a_copy_has_metrics_of_its_own(tmp_path):
    first = "CLASSIFICATION = {"
    edits = {"classification_metrics.py": (first, first + '"mine": lambda outputs: 0.125, ')}
    (evaluation,) = (
        record
        for record in metrics(launch_copy("classification", edits, tmp_path))
        if "eval_loss" in record
    )
    assert evaluation["eval_mine"] == 0.125
