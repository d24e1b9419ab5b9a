"""CPU seconds from a command of the README to its first step, beside those of TRL.

    python -m benchmarks.first_step
    pip install --no-deps --target runs/trl trl==1.16.0
    python -m benchmarks.first_step --trl runs/trl

User and system, of all processes, on one thread, of models that are drawn tiny and files as people
have them; without `trl` the recipes stand alone. Results: benchmarks/results/first_step.md and
.json.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer

import psutil
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from benchmarks.measurement import describe, median_and_range, write_results
from utils.config import InputError, command, parse
from utils.report import markdown_table

ROOT = Path(__file__).parent.parent
RECIPES, TRL = "these recipes", "TRL"
FIRST_STEP = {RECIPES: "step 1/", TRL: "'loss'"}
LIMIT = 300  # seconds for a start
CPU = "--use_cpu --bf16 False --gradient_accumulation_steps 2 --logging_steps 1 --report_to none"
# by job and program: the words after the interpreter; causal models take 16 sequences a step
COMMANDS = {
    ("pretrain on texts", RECIPES): "recipes/causal_lm/pretrain.py "
    "recipes/causal_lm/configs/pretrain_own_text.yaml --train_sources {data}/texts",
    ("go on from GPT-2", RECIPES): "recipes/causal_lm/pretrain.py "
    "recipes/causal_lm/configs/pretrain_continued.yaml --train_sources {data}/texts "
    "--model_name_or_path {data}/gpt2",
    ("go on from GPT-2", TRL): "{trl}/bin/trl sft --model_name_or_path {data}/gpt2 "
    f"--dataset_name {{data}}/texts {CPU}",
    ("LoRA on conversations", RECIPES): "recipes/causal_lm/finetune.py "
    "recipes/causal_lm/configs/finetune_own_chats.yaml --train_data {data}/chats/chats.jsonl "
    "--model_name_or_path {data}/chat",
    ("LoRA on conversations", TRL): "{trl}/bin/trl sft --model_name_or_path {data}/chat "
    f"--dataset_name {{data}}/chats --use_peft {CPU}",
    ("classify a csv", RECIPES): "recipes/classification/finetune.py "
    "recipes/classification/configs/finetune_own_table.yaml --train_data {data}/my.csv "
    "--label_column y --model_name_or_path {data}/bert",
}


@dataclass
class Arguments:
    """Measure the CPU seconds from a command to its first step, beside those of TRL."""

    trl: str | None = None  # a folder that it is installed in; null: the recipes alone
    turns: int = 3
    results: str = "benchmarks/results/first_step"


def write_data(folder: Path) -> None:
    """200 texts, 300 conversations, a table of 200 rows, and three models of 64 dimensions."""
    lines = (ROOT / "data/sample/validation.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines[:200]]
    for name in ("texts", "chats"):
        (folder / name).mkdir()
    for number, text in enumerate(texts):
        (folder / f"texts/{number:03}.txt").write_text(text)
    chats = [json.loads(x) for x in (ROOT / "data/tasks/instruction/test.jsonl").open()]
    rows = (json.dumps({"messages": chat["messages"]}) + "\n" for chat in chats)
    (folder / "chats/chats.jsonl").write_text("".join(rows))
    with (folder / "my.csv").open("w") as file:
        table = [(text[:300], ("good", "bad")[n % 2]) for n, text in enumerate(texts)]
        csv.writer(file).writerows([("review", "y"), *table])
    bpe, wordpiece = (
        AutoTokenizer.from_pretrained(ROOT / f"data/tokenizers/{name}-8192")
        for name in ("bpe", "wordpiece")
    )
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    places = {"max_position_embeddings": 1024}
    write_model(folder / "gpt2", AutoModelForCausalLM, "gpt2", bpe, shape)
    template = ROOT / "recipes/causal_lm/chat_templates/plain.jinja"
    bpe.chat_template = template.read_text()
    write_model(folder / "chat", AutoModelForCausalLM, "llama", bpe, shape | places)
    write_model(folder / "bert", AutoModelForMaskedLM, "bert", wordpiece, shape)


def write_model(folder: Path, kind: type, model_type: str, tokenizer: object, shape: dict) -> None:
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **ends, **shape)
    kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def seconds_to(text: str, words: list[str], folder: Path, packages: str) -> float:
    """What its processes took until the text is printed; then they are ended."""
    environment = os.environ | {"PYTHONPATH": packages, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    printed, limit = b"", Timer(LIMIT, os.killpg, (process.pid, signal.SIGKILL))
    limit.start()
    try:
        while not re.search(text.encode(), printed):
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                raise InputError(f"{' '.join(words)}: {printed.decode(errors='replace')[-800:]}")
            printed += piece
        found = [psutil.Process(process.pid)]
        found += found[0].children(recursive=True)
        return sum(sum(each.cpu_times()[:4]) for each in found)  # and of children that ended
    finally:
        limit.cancel()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    args = parse(Arguments)
    if args.trl and not Path(args.trl, "bin", "trl").exists():
        raise InputError(f"trl: {args.trl} has no bin/trl: pip install --target {args.trl} trl")
    facts = describe("python -m benchmarks.first_step", ("torch", "transformers", "accelerate"))
    jobs = {key: words for key, words in COMMANDS.items() if args.trl or key[1] == RECIPES}
    seconds = {f"{job}, {program}": [] for job, program in jobs}
    trl = os.path.abspath(args.trl or "")
    for turn in range(args.turns):
        for (job, program), words in jobs.items():
            with TemporaryDirectory() as folder:
                data = Path(folder, "data")
                data.mkdir()
                write_data(data)
                words_of = words.format(data=data, trl=trl).split()
                words_of += ["--output_dir", f"{folder}/run"]
                place = ROOT if program == RECIPES else Path(folder)
                packages = str(ROOT) if program == RECIPES else trl
                found = seconds_to(FIRST_STEP[program], words_of, place, packages)
            seconds[f"{job}, {program}"].append(found)
            print(f"turn {turn + 1}: {job}, {program}: {found:.1f} s", flush=True)
    rows = [[name, median_and_range(found, ".1f")] for name, found in seconds.items()]
    text = markdown_table(["from a command to its first step", "CPU seconds"], rows, "lr")
    text += f"\n\nMedians (least to most) of {args.turns} turns, on one thread."
    write_results(args.results, text, facts, {"seconds": seconds})


if __name__ == "__main__":
    command(main)
