"""The commands of docs/walkthrough.md, one after the other, with two steps each."""

import re
import shlex

from launching import ROOT
from recipes.causal_lm import finetune, generate, pretrain
from recipes.corpus import train_tokenizer

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
