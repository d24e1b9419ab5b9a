"""`transformers serve` on what finetune.py exports: the text is that of greedy `generate`."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.cli.transformers import app

from conftest import write_jsonl
from launching import TINY_RUN
from programs import ROOT
from recipes.causal_lm import finetune

README = (ROOT / "recipes/causal_lm/README.md").read_text().replace("\\\n", " ")
(COMMAND,) = re.findall(r"^    transformers (serve .*)$", README, re.M)
(CURL,) = re.findall(r"^    curl (.*)$", README, re.M)
LORA = ["--lora", "{r: 4, lora_alpha: 64}"]


@pytest.fixture
def train(call, tokenizer_folder, tmp_path):
    """train(name, word, *words): a run whose answers are the word over and over."""

    def turns(number: int, word: str) -> dict:
        said = {"user": f"Say {number}.", "assistant": word * 20}
        return {"messages": [{"role": role, "content": text} for role, text in said.items()]}

    def run(name: str, word: str, *words: str) -> tuple[Path, str]:
        folder = tmp_path / name
        data = write_jsonl(tmp_path / f"{name}.jsonl", [turns(i, word) for i in range(8)])
        model = json.dumps(TINY_RUN["model"] | {"max_position_embeddings": 256})
        start = ["--tokenizer", str(tokenizer_folder), "--model", model, "--chat_template", "plain"]
        words = words if "--model_name_or_path" in words else (*words, *start)
        words += "--max_steps", "3", "--global_batch_size", "8", "--per_device_batch_size", "8"
        words += "--sequence_length", "256", "--learning_rate", "5e-2", "--report_to", "none"
        words = ["--train_data", data, "--output_dir", str(folder), *words]
        ended = call(finetune.main, words, folder)
        assert ended.status == 0, ended.error
        return folder / "model", ended.output

    return run


@contextmanager
def served(log: Path, *folder: Path) -> Iterator[str]:
    """The address of a server that knows the folder alone, or any where none is given."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = [Path(sys.executable).with_name("transformers"), "serve", *folder]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*program, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    address, until = f"http://127.0.0.1:{port}/", time.monotonic() + 120
    try:
        while True:
            with suppress(OSError), urlopen(f"{address}health", timeout=10):
                break
            is_awaited = process.poll() is None and time.monotonic() < until
            assert is_awaited, log.read_text()
            time.sleep(0.1)
        yield address
    finally:
        process.kill()
        process.wait()


def ask(address: str, header: str, body: dict) -> str:
    request = Request(address, json.dumps(body).encode(), dict([header.split(": ")]))
    return urlopen(request, timeout=60).read().decode()


def greedy(model: PreTrainedModel, folder: Path, messages: list[dict], tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_model_and_an_adapter_answer_as_greedy_generate(train, tmp_path):
    log = tmp_path / "log.txt"
    whole, output = train("whole", "b")
    assert "--merge_adapter" not in output
    beside, output = train("beside", "d", *LORA)
    assert "--merge_adapter" not in output
    assert (beside / "adapter_config.json").exists()
    adapter = [*LORA, "--model_name_or_path", str(whole)]
    alone, output = train("alone", "p", *adapter)
    assert not (alone / "config.json").exists()
    with pytest.raises(AssertionError, match="Unrecognized model"), served(log, alone):
        pass
    (line,) = re.findall(r"^  serving: .* with (.*)$", output, re.M)
    assert (alone.parent / "README.md").read_text().count(line) == 1
    merged, output = train("alone", "p", *adapter, *line.split())
    assert "  serving:" not in output

    path, _, header, _, body = shlex.split(CURL)
    body, route = json.loads(body), path.partition("localhost:8000/")[2]
    texts, began = {}, {whole: None, beside: beside.parent / "base_model", merged: whole}
    for folder, base in began.items():
        expected = AutoModelForCausalLM.from_pretrained(folder)
        texts[folder] = greedy(expected, folder, body["messages"], body["max_tokens"])
        if base:
            model = AutoModelForCausalLM.from_pretrained(base)
            before = greedy(model, folder, body["messages"], body["max_tokens"])
            assert texts[folder] != before
    assert len({*texts.values()}) == 3
    with served(log, whole) as address:  # as the README does
        answer = json.loads(ask(address + route, header, body))
        assert answer["choices"][0]["message"]["content"] == texts[whole]
    with served(log) as address:
        for folder, text in texts.items():
            named = body | {"model": str(folder), "stream": True}
            events = re.findall("^data: (.*)$", ask(address + route, header, named), re.M)
            deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
            assert "".join(delta.get("content", "") for delta in deltas) == text


def test_the_documented_command_is_one_of_transformers():
    words = shlex.split(COMMAND)
    command = app.commands[words[0]]
    context = command.make_context("serve", words[1:])
    assert context.params["force_model"] == "runs/causal_lm/finetune_demo/model"
    assert context.params["port"] == 8000
