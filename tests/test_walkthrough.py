"""The commands of docs/walkthrough.md, one after the other, with two steps each; those of
docs/pretraining_7b.md as dry runs."""

import re
import shlex

import pytest

from launching import ROOT
from recipes.causal_lm import finetune, generate, pretrain
from recipes.corpus import train_tokenizer
from utils import plan
from utils.config import parse

# what takes longer than two steps
LESS = {
    "train_tokenizer": "--train_sources data/sample/validation.jsonl --vocab_size 2000 "
    "--validation_sources []",
    "pretrain": "--max_steps 2 --warmup_steps 0 --eval_documents 2 --sample_prompts [] "
    "--baselines false --validation_sources [] --report_to none",
    "finetune": "--max_steps 2 --train_data data/tasks/instruction/validation.jsonl "
    "--scored_answers 1 --sample_answers 0 --validation_data [] --report_to none",
    "generate": "--max_new_tokens 4",
}


def commands() -> dict[str, list[str]]:
    text = (ROOT / "docs/walkthrough.md").read_text()
    found = re.findall(r"^    python recipes/\w+/(\w+)\.py (.*)$", text, re.M)
    return {script: shlex.split(words) for script, words in found}


def test_the_road_from_raw_text_to_a_chat(call, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    test = tmp_path / "test.jsonl"
    rows = (ROOT / "data/tasks/instruction/test.jsonl").read_text().splitlines(keepends=True)
    test.write_text(min(rows, key=len))
    documents = tmp_path / "documents.jsonl"
    documents.write_text((ROOT / "data/sample/test.jsonl").read_text().partition("\n")[0])
    more = {"pretrain": ["--test_sources", str(documents)], "finetune": ["--test_data", str(test)]}
    modules = (train_tokenizer, pretrain, finetune, generate)
    scripts = {module.__name__.rpartition(".")[2]: module for module in modules}
    assert [*commands()] == [*scripts]
    lines = iter(["What does it do?"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or end_of_input())
    for name, words in commands().items():
        words = [word.replace("runs/walkthrough", str(tmp_path)) for word in words]
        words += [*shlex.split(LESS[name]), *more.get(name, ())]
        ended = call(scripts[name].main, words, tmp_path / name)
        assert ended.status == 0, (name, ended.error)
    assert (tmp_path / "tokenizer/tokenizer.json").exists()
    for folder in ("pretrain", "finetune"):
        assert (tmp_path / folder / "model/README.md").exists()


def end_of_input() -> str:
    raise EOFError


PAGE = (ROOT / "docs/pretraining_7b.md").read_text()
COMMANDS = re.findall(
    r"^    (?:python|(accelerate launch .*?)) recipes/(\S+)\.py (.*)$", PAGE, re.M
)
SCRIPTS = {"causal_lm/pretrain": pretrain, "corpus/train_tokenizer": train_tokenizer}


@pytest.mark.parametrize(("launch", "script", "words"), COMMANDS, ids=range(len(COMMANDS)))
def test_the_road_of_a_7b(launch, script, words, call, tmp_path, monkeypatch):
    """Each is understood, and what is planned is printed or, of GPUs of 40 GiB, refused."""
    monkeypatch.chdir(ROOT)
    module, words = SCRIPTS[script], shlex.split(words)
    if launch:
        file = re.search(r"--config_file (\S+)", launch)[1]
        assert (ROOT / file).exists()
        monkeypatch.setenv("WORLD_SIZE", re.search(r"--num_processes (\d+)", launch)[1])
    if module is train_tokenizer:
        monkeypatch.setattr("sys.argv", [f"{script}.py", *words])
        assert parse(train_tokenizer.Arguments).output_dir == "data/tokenizers/mine"
        return
    # how much is tested where it is computed, in seconds
    monkeypatch.setattr(plan, "activations", lambda *_: ACTIVATIONS)
    ended = call(module.main, [*words, "--dry_run"], tmp_path)
    assert ended.status == 0, ended.error
    assert "6,738,415,616 parameters" in ended.output
    assert not (tmp_path / "checkpoints").exists()


# of a 7B, GiB: as the plan counts them
ACTIVATIONS = {
    (way, half): plan.Activations((13 * 2**30, 2.3 * 2**30), (0, 3 * 2**30))
    for way in plan.WAYS
    for half in (False, True)
}


def test_the_page_has_all_its_commands():
    assert len(COMMANDS) == len(re.findall(r"^    \S", PAGE, re.M)) == 7
