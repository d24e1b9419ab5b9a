"""The commands of the documentation: those of the smoke config are run, all are parsed."""

import ast
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from launching import BERT, CAUSAL_LM, ROOT, checkpoints, metrics, steps, tiny_run
from utils.config import InputError, parse

BIN = Path(sys.executable).parent
SMOKE = "recipes/causal_lm/configs/pretrain_smoke.yaml"
ZERO2 = ["--config_file", "accelerate_configs/zero2.yaml", "--num_processes", "2"]
RECIPES = [p for p in sorted(ROOT.glob("recipes/*/*.py")) if "__main__" in p.read_text()]
READMES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("recipes/*/README.md")])
LAUNCHERS = ("make ", "python ", "accelerate launch ", "sbatch ")


def launch(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [str(BIN / words[0]), *words[1:]],
        cwd=ROOT,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def zero2(*words: str) -> subprocess.Popen:
    return launch("accelerate", "launch", *ZERO2, *words)


def test_the_smoke_config_runs_as_it_stands_under_zero2_and_as_plain_python(tmp_path):
    folders = {"zero2": tmp_path / "zero2", "python": tmp_path / "python"}
    for name, start in {"zero2": zero2, "python": lambda *words: launch("python", *words)}.items():
        with start(CAUSAL_LM, SMOKE, "--output_dir", str(folders[name])) as process:
            output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
        assert output.count("saved ") == 4  # every 10 steps, and before the evaluation at 15
        assert "seconds from the command to the first step" in output
        for path in ("config.yaml", "README.md", "plots/loss.png", "plots/learning_rate.png"):
            assert (folders[name] / path).stat().st_size
    records = metrics(folders["zero2"])
    assert sum("eval_bits_per_byte" in record for record in records) >= 1
    assert any(record.get("samples") for record in records)
    losses = {name: [record["loss"] for record in steps(f)] for name, f in folders.items()}
    assert len(losses["zero2"]) >= 20
    np.testing.assert_allclose(losses["zero2"], losses["python"], rtol=1e-5)
    model, tokenizer = (
        kind.from_pretrained(folders["zero2"] / "model")
        for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    tokens = tokenizer("def parse(text):\n    return text\n", return_tensors="pt")
    with torch.no_grad():
        loss = model(**tokens, labels=tokens.input_ids).loss
    assert loss < 0.9 * math.log(len(tokenizer))  # it has learnt something


def test_the_smoke_config_of_bert_runs_as_it_stands(tmp_path):
    config = "recipes/bert/configs/pretrain_smoke.yaml"
    with zero2(BERT, config, "--output_dir", str(tmp_path)) as process:
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert output.count("saved ") == 4  # every 10 steps, and before the evaluation at 15
    for path in ("config.yaml", "README.md", "plots/loss.png", "plots/learning_rate.png"):
        assert (tmp_path / path).stat().st_size
    evaluations = [record for record in metrics(tmp_path) if "eval_mlm_loss" in record]
    assert [record["step"] for record in evaluations] == [15, 30]
    assert evaluations[-1]["eval_mlm_loss"] < 0.8 * math.log(8192)  # it has learnt something
    AutoModelForMaskedLM.from_pretrained(tmp_path / "model")


def test_a_wrong_key_is_said_once_by_the_launched_processes(tmp_path):
    """Also where rank 0 is the last to meet it: the launcher ends all with the first."""
    folder = tmp_path / "run"
    script = tmp_path / "late.py"
    script.write_text(f"""
import os, runpy, sys, time
time.sleep(2 * (os.environ["RANK"] == "0"))
sys.path[0] = {str(Path(CAUSAL_LM).parent)!r}
runpy.run_path({CAUSAL_LM!r}, run_name="__main__")
""")
    options = ["--output_dir", str(folder), "--learning_rat", "1"]
    with zero2(str(script), SMOKE, *options) as process:
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    message = "error: --learning_rat: unknown key 'learning_rat': the nearest valid one is"
    assert output.count(message) == 1
    assert "'learning_rate'" in output
    assert not folder.exists()


def test_sigterm_to_the_launcher_ends_with_a_checkpoint(tmp_path, corpus_folder, tokenizer_folder):
    data = corpus_folder / "train-*.jsonl", tokenizer_folder
    with zero2(CAUSAL_LM, *tiny_run(tmp_path / "run", *data, max_steps=10**6)) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1  # of the launcher's own making: its processes end with 0
    output = "".join(lines)
    ((step, command),) = re.findall(r"stopped after step (\d+); resume with: (.*)", output)
    assert checkpoints(tmp_path / "run")[-1].name == f"step-{int(step):08d}"
    words = shlex.split(command)
    assert Path(words[0]).name == "accelerate"
    assert words[2:7] == [*ZERO2, CAUSAL_LM]


def commands(text: str, indented: bool = True) -> list[str]:
    """The shell commands of indented or fenced blocks, each on one line; a copy is its original."""
    found, fenced = [], False
    text = text.replace("\\\n", " ")
    for original, copy in re.findall(r"^ +cp -r (\S+) (\S+)$", text, re.MULTILINE):
        text = text.replace(copy, original)
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if fenced or not indented or line.startswith("    "):
            command = re.sub(r"^([A-Z_]+=\S+ )*(\.venv/bin/)?", "", line.strip())
            if command.startswith(LAUNCHERS):
                found.append(command)
    return found


def documents() -> dict[str, list[str]]:
    """The commands of each README and of each docstring that shows how to run its file."""
    found = {path: commands(path.read_text()) for path in READMES}
    for path in (*RECIPES, *ROOT.glob("utils/*.py"), *ROOT.glob("benchmarks/*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[path] = commands(docstring, indented="utils" not in path.parts)
    return {str(path.relative_to(ROOT)): shown for path, shown in found.items()}


COMMANDS = [(path, command) for path, shown in documents().items() for command in shown]


def test_every_document_of_a_recipe_shows_commands():
    for path in (*RECIPES, ROOT / "README.md", *ROOT.glob("recipes/*/README.md")):
        assert documents()[str(path.relative_to(ROOT))]
    assert len(COMMANDS) > 25


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=lambda text: text[:40])
def test_what_the_command_names_exists_and_takes_its_settings(document, command, monkeypatch):
    words = shlex.split(command, comments=True)
    monkeypatch.chdir(ROOT)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", Path("Makefile").read_text(), re.M)
        return
    if words[0] == "accelerate":
        launcher = launch_command_parser().parse_args(words[2:])
        assert Path(launcher.config_file).is_file()
        monkeypatch.setenv("WORLD_SIZE", str(launcher.num_processes or 1))
        script, arguments = launcher.training_script, launcher.training_script_args
    elif words[0] == "sbatch":
        batch_script, script, *arguments = (w for w in words[1:] if not w.startswith("--"))
        assert Path(batch_script).is_file()
    elif words[1] == "-m":
        script, arguments = words[2].replace(".", "/") + ".py", words[3:]
    else:
        script, arguments = words[1], words[2:]
    parse(imported(Path(script)).Arguments, arguments)


def imported(path: Path) -> ModuleType:
    """The module of a file, without its folder in the import path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "config", sorted(ROOT.glob("recipes/*/configs/*.yaml")), ids=lambda c: c.stem
)
def test_a_recipe_beside_it_takes_the_config(config):
    refusals, own = [], []
    if "finetune_own" in config.stem:
        own = ["--train_data", "my.jsonl", "--model_name_or_path", "org/name"]
    if config.stem == "pretrain_continued":
        own = ["--model_name_or_path", "org/name"]
    recipes = [path for path in RECIPES if path.parent == config.parent.parent]
    for recipe in recipes:
        try:
            parse(imported(recipe).Arguments, [str(config), *own])
        except InputError as error:
            refusals.append(f"{recipe}: {error}")
    assert len(refusals) < len(recipes), refusals


def test_the_readme_says_how_the_soak_ended():
    rows = json.loads((ROOT / "benchmarks/results/soak.json").read_text())["rows"]
    tries = sum(row["tries"] for row in rows)
    missed = ("came to its end before", "nothing to damage", "nothing to continue")
    met = tries - sum(row["outcomes"].get(outcome, 0) for row in rows for outcome in missed)
    assert met >= 200
    assert all(row["tries"] for row in rows)
    assert not any(row["lost"] or row["twice"] or row["problems"] for row in rows)
    assert f"{tries} tries, {met} of which met a run under way" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_links_of_the_readme_lead_somewhere(readme):
    for link in re.findall(r"\]\(([^)#]+)", readme.read_text()):
        assert "://" in link or (readme.parent / link).exists(), link
