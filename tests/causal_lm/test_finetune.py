"""Instruction tuning: what is learnt from, that the layout changes nothing, adapters, bad input."""

import importlib.util
import json
import math
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Barrier, Lock
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)
from xxhash import xxh3_64_hexdigest

import conversation_evaluation
from conftest import WORDS, Ended, write_jsonl
from conversation_rows import read_messages
from conversations import (
    ConversationArguments,
    collate,
    set_chat_template,
    to_examples,
)
from launching import (
    ROOT,
    TINY_RUN,
    Launch,
    checkpoints,
    command_line,
    metrics,
    predictions,
    run,
    steps,
)
from recipes.causal_lm import finetune as instruction
from utils.config import InputError, read_yaml
from utils.loss import IGNORE_INDEX
from utils.tables import TableRow

INSTRUCTION = "recipes/causal_lm/finetune.py"
TEMPLATES = ROOT / "recipes/causal_lm/chat_templates"
MODEL = TINY_RUN["model"] | {"max_position_embeddings": 256}
# matrices of less than 4,096 elements keep their moments in 32 bits
EIGHT_BITS = {
    "optim": "adamw_bnb_8bit",
    "model": MODEL | {"hidden_size": 64, "intermediate_size": 128},
}
RANK_0 = "rank-00000-of-00001.safetensors"
LORA = {"r": 4, "lora_alpha": 8}


def make_conversations(count: int, seed: int) -> list[dict]:
    draw = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(draw.choices(WORDS[:20], k=draw.randint(1, most)))

    rows = []
    for _ in range(count):
        turns = []
        for _ in range(draw.randint(1, 2)):
            turns += [
                {"role": "user", "content": text(6)},
                {"role": "assistant", "content": text(8)},
            ]
        rows.append({"messages": turns, "source": draw.choice(["a", "b"])})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    write_jsonl(folder / "train.jsonl", make_conversations(60, 0))
    write_jsonl(folder / "validation.jsonl", make_conversations(15, 1))
    return folder


def words_of(folder: Path, data: Path, tokenizer_folder: Path, **settings: Any) -> list[str]:
    given = {
        "train_data": [{"path": str(data / "train.jsonl")}],
        "validation_data": [{"path": str(data / "validation.jsonl")}],
        "tokenizer": str(tokenizer_folder),
        "chat_template": "plain",
        "source_column": "source",
        "model": MODEL,
        "sequence_length": 256,
        "global_batch_size": 12,
        "per_device_batch_size": 2,
        "learning_rate": 3e-3,
        "adam_epsilon": 1e-6,
        "max_steps": 6,
        "save_steps": 3,
        "sample_answers": 0,
        "report_to": [],
        **settings,
    }
    return command_line({"output_dir": folder, **given})


@pytest.fixture
def instruct(call: Callable, data: Path, tokenizer_folder: Path, tmp_path: Path) -> Callable:
    """instruct(name, **settings): the recipe, in this process."""

    def start(name: str = "run", **settings: Any) -> Ended:
        folder = tmp_path / name
        return call(instruction.main, words_of(folder, data, tokenizer_folder, **settings), folder)

    return start


def weights(folder: Path) -> dict[str, torch.Tensor]:
    file = min((folder / "model").glob("*model.safetensors"))  # an adapter before its base
    return load_file(file)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of all tensors together, relative to their norm."""
    assert one.keys() == other.keys()
    difference = sum((one[k].double() - other[k].double()).square().sum() for k in one)
    return math.sqrt(difference / sum(t.double().square().sum() for t in other.values()))


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in steps(folder)]


# what is learnt from


def row(values: dict) -> TableRow:
    return TableRow(values, "rows.jsonl", "line", 7)


def arguments(**settings: Any) -> ConversationArguments:
    made = ConversationArguments(**settings)
    made.sequence_length = settings.pop("sequence_length", 512)
    return made


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "Here."},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "Now, or\nlater."},
]


def learnt(tokenizer, template: str = "plain", turns=TURNS, **settings) -> list[str]:
    """What the loss falls on, piece by piece."""
    set_chat_template(tokenizer, arguments(chat_template=template, **settings))
    ((example,), _) = to_examples([row({"messages": turns})], tokenizer, arguments())
    labels = example["shift_labels"]
    pieces, ids = [], []
    for place, label in enumerate([*labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX:
            assert label == example["input_ids"][place + 1]
            ids.append(label)
        elif ids:
            pieces.append(tokenizer.decode(ids))
            ids = []
    return pieces


@pytest.fixture
def chat_tokenizer(tokenizer_folder: Path):
    """With the tokens of every shipped template, and none for padding."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(
        ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        special_tokens=True,
    )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "end"),
    [("plain", "<|end_of_text|>"), ("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")],
)
def test_the_loss_falls_on_what_the_assistant_says_and_on_its_end(chat_tokenizer, template, end):
    expected = [f"Here.{end}", f"Now, or\nlater.{end}"]
    assert learnt(chat_tokenizer, str(TEMPLATES / f"{template}.jinja")) == expected
    # also where padding is the end token itself
    chat_tokenizer.pad_token = end
    assert learnt(chat_tokenizer, template, eos_token=end) == expected


@pytest.mark.parametrize("template", ["plain", "chatml", "llama3"])
def test_an_answer_continues_the_prompt_it_is_generated_from(chat_tokenizer, template):
    set_chat_template(chat_tokenizer, arguments(chat_template=template))
    whole = chat_tokenizer.apply_chat_template(TURNS, tokenize=False)
    prompt = chat_tokenizer.apply_chat_template(
        TURNS[:-1], tokenize=False, add_generation_prompt=True
    )
    assert whole.startswith(prompt + "Now, or\nlater.")


def test_a_copied_folder_finds_its_own_templates(chat_tokenizer, tmp_path):
    shutil.copytree(TEMPLATES, tmp_path / "chat_templates")
    shutil.copy(TEMPLATES.parent / "conversations.py", tmp_path)
    own = (TEMPLATES / "chatml.jinja").read_text() + "{# mine #}"
    (tmp_path / "chat_templates" / "mine.jinja").write_text(own)
    spec = importlib.util.spec_from_file_location("copied", tmp_path / "conversations.py")
    copied = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "copied", copied)  # where dataclasses look for their types
        spec.loader.exec_module(copied)
    copied.set_chat_template(chat_tokenizer, arguments(chat_template="mine"))
    assert chat_tokenizer.chat_template == own


def test_a_tokenizer_without_padding_pads_with_its_end(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.pad_token = None
    assert learnt(tokenizer)[0] == "Here.<|end_of_text|>"
    assert tokenizer.pad_token == "<|end_of_text|>"


def test_three_ways_to_write_the_same_conversation():
    a = arguments()
    expected = [
        {"role": "user", "content": "Add.\n\n1 and 2"},
        {"role": "assistant", "content": "3"},
    ]
    rows = [
        {"messages": [turn | {"weight": 1} for turn in expected]},
        {"prompt": "Add.\n\n1 and 2", "completion": "3"},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    ]
    assert [read_messages(row(values), a) for values in rows] == [expected] * 3
    no_input = {"instruction": "Add.", "input": "", "output": "3"}
    assert read_messages(row(no_input), a)[0]["content"] == "Add."
    named = arguments(prompt_column="question", completion_column="answer")
    assert read_messages(row({"question": "Add.\n\n1 and 2", "answer": "3"}), named) == expected


USER, ASSISTANT = TURNS[1:3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "turn 3: 'assistant' cannot follow 'assist"),
        ({"messages": [USER, USER, ASSISTANT]}, "turn 2: 'user' cannot follow 'user'"),
        ({"messages": [ASSISTANT]}, "turn 1: 'assistant' cannot come first"),
        ({"messages": [USER, TURNS[0]]}, "turn 2: 'system' cannot follow 'user'"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "turn 1: unknown role 'bot': there are"),
        ({"messages": [USER]}, "the last turn is that of 'user': nothing to learn from it"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "turn 2: the content of"),
        ({"messages": [USER, {"role": "assistant"}]}, "turn 2 must have a role and a content"),
        ({"messages": []}, "messages must be a list of turns, not []"),
        ({"messages": "Hi"}, "messages must be a list of turns, not 'Hi'"),
        ({"prompt": "x"}, "no column 'completion'; there are: prompt"),
        ({"prompt": "x", "completion": ""}, "completion is empty"),
        (
            {"text": "x"},
            "none of the columns 'messages', 'conversations', 'prompt' and 'instruction'; t",
        ),
    ],
)
def test_rows_that_are_no_conversations(values, message):
    with pytest.raises(InputError) as error:
        read_messages(row(values), arguments())
    assert str(error.value).startswith("rows.jsonl, line 7: ")
    assert message in str(error.value)


def test_long_examples(tokenizer):
    rows = [row({"messages": TURNS}), row({"messages": TURNS[1:3]})]
    set_chat_template(tokenizer, arguments(chat_template="plain"))
    ((whole, short), _) = to_examples(rows, tokenizer, arguments())
    length = len(whole["input_ids"])

    def examples(length: int, on_long_example: str) -> tuple[list, dict]:
        a = arguments(on_long_example=on_long_example)
        a.sequence_length = length
        return to_examples(rows, tokenizer, a)

    assert len(examples(length, "fail")[0]) == 2
    with pytest.raises(InputError, match=f"line 7: {length} tokens are more than sequence_length"):
        examples(length - 1, "fail")
    kept, counts = examples(length - 1, "skip")
    assert [len(e["input_ids"]) for e in kept] == [len(short["input_ids"])]
    assert counts == {"skipped": 1, "truncated": 0}
    kept, counts = examples(length - 3, "truncate")
    assert counts == {"skipped": 0, "truncated": 1}
    assert np.array_equal(kept[0]["input_ids"], whole["input_ids"][: length - 3])
    assert np.array_equal(kept[0]["shift_labels"][:-1], whole["shift_labels"][: length - 4])
    assert kept[0]["shift_labels"][-1] == IGNORE_INDEX
    # what is cut before the assistant speaks is nothing to learn from
    assert examples(len(short["input_ids"]), "truncate")[1]["skipped"] <= 1
    with pytest.raises(InputError, match=r"every conversation of rows.jsonl is longer than seq"):
        examples(4, "truncate")


def test_rows_of_a_batch():
    one = {"input_ids": np.array([5, 6, 7]), "shift_labels": np.array([-100, 7, -100])}
    two = {"input_ids": np.array([8, 9]), "shift_labels": np.array([9, -100])}
    batch = collate([[one, two], [two], []])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [8, 9, 0, 0, 0], [0] * 5]
    assert batch["shift_labels"].tolist() == [
        [-100, 7, -100, 9, -100],
        [9, -100, -100, -100, -100],
        [-100] * 5,
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]


# the objective


@pytest.fixture(scope="module")
def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = TINY_RUN["model"] | {"vocab_size": 100, "initializer_range": 0.5}
    settings.pop("model_type")
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def some_examples(count: int = 5, seed: int = 0) -> list[dict]:
    draw = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        ids = draw.integers(0, 100, draw.integers(3, 20)).astype(np.int32)
        labels = np.append(ids[1:], IGNORE_INDEX).astype(np.int32)
        labels[: len(ids) // 2] = IGNORE_INDEX
        examples.append({"input_ids": ids, "shift_labels": labels, "source": "a"})
    return examples


def test_packed_padded_and_alone_are_the_same_loss_and_gradient(tiny_llama):
    examples = some_examples()
    total = 0.0
    for example in examples:
        ids = torch.from_numpy(example["input_ids"]).long()[None]
        labels = torch.from_numpy(example["shift_labels"]).long()
        logits = tiny_llama(ids).logits[0]
        total = total + cross_entropy(logits, labels, reduction="sum")
    names = [name for name, _ in tiny_llama.named_parameters()]
    expected = dict(
        zip(names, torch.autograd.grad(total, list(tiny_llama.parameters())), strict=True)
    )
    for packing, rows in ((True, [examples[:2], examples[2:]]), (False, [[e] for e in examples])):
        objective = instruction.AnswerLoss(tiny_llama, packing)
        loss = objective(**collate(rows))["loss"]
        assert torch.allclose(loss, total, rtol=1e-6)
        found = torch.autograd.grad(loss, list(tiny_llama.parameters()))
        assert distance(dict(zip(names, found, strict=True)), expected) < 1e-5
        tokens = sum((e["shift_labels"] != IGNORE_INDEX).sum() for e in examples)
        assert objective.counts(collate(rows)) == {"loss": tokens}


def test_an_adapter_that_trains_the_output_layer_as_a_whole(instruct):
    lora = {**LORA, "modules_to_save": ["lm_head"]}
    ended = instruct(lora=lora, max_steps=2)
    assert ended.status == 0, ended.error
    weights = load_file(ended.folder / "model" / "adapter_model.safetensors")
    assert any("lm_head" in name for name in weights)


def test_neftune_noise_has_the_size_of_the_paper_and_is_not_there_in_evaluation():
    torch.manual_seed(0)
    settings = TINY_RUN["model"] | {"vocab_size": 100}
    settings.pop("model_type")
    model = LlamaForCausalLM(LlamaConfig(**settings))
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    objective = instruction.AnswerLoss(model, True, neftune_noise_alpha=5.0)
    examples = some_examples(3)
    batch = collate([examples[:2], examples[2:]])
    objective.train()(**batch)
    objective.eval()(**batch)
    *_, noisy, plain = seen  # before them the logits were looked at
    assert torch.equal(plain, model.model.embed_tokens(batch["input_ids"]))
    start = 0
    for example in examples[:2]:
        length = len(example["input_ids"])
        noise = (noisy - plain)[0, start : start + length]
        bound = 5.0 / math.sqrt(length * 32)
        assert 0.9 * bound < noise.abs().max() <= 1.0001 * bound
        # of a uniform distribution; the mean of n draws of |x| has deviation bound / √(12 n)
        assert abs(noise.abs().mean() - bound / 2) < 4 * bound / math.sqrt(12 * noise.numel())
        start += length


def test_evaluation_is_that_of_each_example_alone(tiny_llama):
    from conversation_evaluation import evaluate_answers

    examples = some_examples(9)
    for index, example in enumerate(examples):
        example |= {"source": "ab"[index % 2], "place": f"row {index}"}
    sums = {}
    for example in examples:
        logits = tiny_llama(torch.from_numpy(example["input_ids"]).long()[None]).logits[0].detach()
        labels = torch.from_numpy(example["shift_labels"]).long()
        counted = labels != IGNORE_INDEX
        values = torch.tensor(
            [
                cross_entropy(logits, labels, reduction="sum"),
                (logits.argmax(1) == labels)[counted].sum(),
                counted.sum(),
            ]
        )
        sums[example["source"]] = sums.get(example["source"], 0) + values
    loss, right, count = sum(sums.values()).tolist()
    objective = instruction.AnswerLoss(tiny_llama, False).eval()

    one_at_a_time = Lock()  # ranks have a model each

    def scores(batch):
        with one_at_a_time, torch.no_grad():
            return objective(**batch, per_token=True)

    def evaluate(rank: int, kept: list[list], barrier: Barrier) -> dict[str, Any]:
        def gather(mine: list) -> list:
            kept[rank] = mine
            barrier.wait()
            return [part for parts in kept for part in parts]

        ranks = SimpleNamespace(
            rank=rank,
            world_size=len(kept),
            stopped=False,
            any_rank=lambda mine: mine,
            gather=gather,
        )
        accelerator = SimpleNamespace(autocast=nullcontext)
        arguments = SimpleNamespace(per_device_batch_size=1, row_length=40)
        training = SimpleNamespace(
            ranks=ranks, accelerator=accelerator, objective=objective, arguments=arguments
        )
        return evaluate_answers(training, examples, scores)

    for world_size in (1, 2):
        kept, barrier = [[] for _ in range(world_size)], Barrier(world_size)
        with ThreadPoolExecutor(world_size) as pool:
            found, *others = pool.map(
                partial(evaluate, kept=kept, barrier=barrier), range(world_size)
            )
        assert others == [found] * (world_size - 1)
        results, each = found
        assert [one["row"] for one in each] == [f"row {index}" for index in range(9)]
        assert results["eval_loss"] == pytest.approx(loss / count, rel=1e-6)
        assert results["eval_token_accuracy"] == right / count
        assert results["eval_tokens"] == count
        for source, (part, hits, tokens) in sums.items():
            found = results["eval_loss_by_domain"][source]
            assert found == pytest.approx(float(part / tokens), rel=1e-6)
            assert results["eval_token_accuracy_by_domain"][source] == float(hits) / float(tokens)


# runs


def test_layout_changes_nothing_but_the_speed(instruct):
    first = instruct("packed", per_device_batch_size=2)
    assert first.status == 0, first.error
    for name, settings in {
        "padded": {"packing": False},
        "one by one": {"per_device_batch_size": 1},
        "all at once": {"per_device_batch_size": 12, "packing": False},
    }.items():
        other = instruct(name, **settings)
        assert losses(other.folder) == pytest.approx(losses(first.folder), rel=1e-5)
        assert distance(weights(other.folder), weights(first.folder)) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"lora": LORA}], ids=["full", "LoRA"])
def test_ranks_and_zero_stages_change_nothing(instruct, data, tokenizer_folder, tmp_path, settings):
    alone = instruct("alone", **settings)
    assert alone.status == 0, alone.error
    for config in ("multi_cpu", "zero1", "zero2", "zero3"):
        folder = tmp_path / config
        words = words_of(folder, data, tokenizer_folder, **settings)
        run(config, 2, words, tmp_path / f"{config}.log", script=INSTRUCTION)
        assert losses(folder) == pytest.approx(losses(alone.folder), rel=1e-5)
        assert distance(weights(folder), weights(alone.folder)) < 1e-5
        evaluations = [
            [r["eval_loss"] for r in metrics(f) if "eval_loss" in r] for f in (folder, alone.folder)
        ]
        assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": LORA}, EIGHT_BITS],
    ids=["full", "LoRA", "8 bits"],
)
def test_a_resumed_run_is_the_run_that_never_stopped(instruct, settings):
    settings = settings | {"lr_scheduler_type": "constant", "neftune_noise_alpha": 5.0}
    whole = instruct("whole", max_steps=10, **settings)
    for steps_ in (4, 7, 10):
        parts = instruct("parts", max_steps=steps_, save_steps=3, **settings)
        assert parts.status == 0, parts.error
    assert losses(parts.folder) == losses(whole.folder)
    one, other = weights(parts.folder), weights(whole.folder)
    assert all(torch.equal(one[name], other[name]) for name in other)
    again = instruct("parts", max_steps=10, save_steps=3, **settings)
    assert "is finished at step 10" in again.output
    refused = instruct("parts", max_steps=12, **settings | {"neftune_noise_alpha": 1.0})
    assert refused.status == 2
    assert "neftune_noise_alpha was 5.0 and is 1.0" in refused.error


def test_the_best_checkpoint_is_what_is_kept_and_exported(instruct, tmp_path):
    # few conversations, and long enough to learn them by heart
    path = write_jsonl(tmp_path / "few.jsonl", make_conversations(6, 2))
    ended = instruct(
        train_data=[{"path": path}],
        max_steps=60,
        eval_steps=5,
        save_steps=60,
        keep_last=1,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
    )
    assert ended.status == 0, ended.error
    found = {r["step"]: r["eval_loss"] for r in metrics(ended.folder) if "eval_loss" in r}
    best = min(found, key=found.get)
    assert best < 60
    assert [int(c.name[5:]) for c in checkpoints(ended.folder)] == [best, 60]
    model = AutoModelForCausalLM.from_pretrained(ended.folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(ended.folder / "model")
    assert evaluation_loss(model, tokenizer, ended) == pytest.approx(found[best], rel=1e-5)


def evaluation_loss(model, tokenizer, ended: Ended) -> float:
    settings, _ = read_yaml(str(ended.folder / "config.yaml"))
    (table,) = settings["validation_data"]
    rows = [row(json.loads(line)) for line in Path(table["path"]).read_text().splitlines()]
    examples, _ = to_examples(rows, tokenizer, arguments())
    loss = count = 0
    for example in examples:
        logits = model(torch.from_numpy(example["input_ids"]).long()[None]).logits[0].detach()
        labels = torch.from_numpy(example["shift_labels"]).long()
        loss += cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != IGNORE_INDEX).sum())
    return loss / count


def test_a_signal_while_answers_are_written_is_heard_and_made_up_for(instruct, monkeypatch):
    settings = {"sample_answers": 3, "eval_steps": 3}
    whole = instruct("whole", **settings)
    generate, calls = LlamaForCausalLM.generate, iter(range(1, 10**6))

    def interrupted(*args: Any, **options: Any) -> torch.Tensor:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "generate", interrupted)
        part = instruct("part", **settings)
    assert "stopped after step 3; resume with: " in part.output
    assert not any({"eval_loss", "samples"} & record.keys() for record in metrics(part.folder))
    instruct("part", **settings)
    assert metrics(part.folder) == metrics(whole.folder)
    assert sum("samples" in record for record in metrics(whole.folder)) == 2


def test_tables_are_evaluated_apart(instruct, data):
    tables = [
        {"path": str(data / "validation.jsonl"), "split": s} for s in ("train[:5]", "train[5:]")
    ]
    tables[0]["label"] = "first"
    ended = instruct("apart", source_column=None, validation_data=tables, max_steps=1)
    assert ended.status == 0, ended.error
    alone = [instruct(f"{i}", validation_data=[t], max_steps=1) for i, t in enumerate(tables)]
    (found,) = (r for r in metrics(ended.folder) if "eval_loss" in r)
    results = [r for one in alone for r in metrics(one.folder) if "eval_loss" in r]
    for name in ("eval_loss", "eval_token_accuracy", "eval_tokens"):
        assert found[f"{name}_by_domain"] == {
            "first": pytest.approx(results[0][name]),
            str(data / "validation.jsonl"): pytest.approx(results[1][name]),
        }


def test_rows_of_a_table_are_seen_by_its_weight(instruct, data):
    path = str(data / "train.jsonl")
    tables = [
        {"path": path, "split": "train[:20]", "label": "often", "weight": 2},
        {"path": path, "split": "train[20:]", "label": "seldom", "weight": 0.25},
    ]
    settings = {"train_data": tables, "max_steps": None, "num_train_epochs": 2}
    plan = instruct("weighted", **settings, dry_run=True)
    assert "data         often x 2, seldom x 0.25\n" in plan.output
    ended = instruct("weighted", **settings)
    assert ended.status == 0, ended.error
    shown = "often: 20 x 2 (80.0% of an epoch), seldom: 40 x 0.25 (20.0% of an epoch)"
    assert f"examples by table: {shown}" in ended.output
    assert f"| examples by table | {shown} |" in (ended.folder / "README.md").read_text()
    assert len([r for r in metrics(ended.folder) if "loss" in r]) == 2 * 5  # 50 examples by 12
    tables[1]["weight"] = 0.5
    changed = instruct("weighted", **settings)
    assert changed.status == 2
    assert (
        "finished with the weights of the tables [2.0, 0.25], this is [2.0, 0.5]" in changed.error
    )
    changed = instruct("weighted", **settings | {"num_train_epochs": 3})
    assert changed.status == 2
    assert "the weights of the tables was [2.0, 0.25] and is [2.0, 0.5]" in changed.error


def test_answers_of_the_test_are_scored(instruct, data):
    ended = instruct(
        "scored", scored_answers=4, test_data=[{"path": str(data / "validation.jsonl")}]
    )
    assert ended.status == 0, ended.error
    model = AutoModelForCausalLM.from_pretrained(ended.folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(ended.folder / "model")
    lines = predictions(ended.folder)
    found = lines[:4]
    rows = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    for record, given in zip(found, rows, strict=False):
        turns = given["messages"]
        first = [turn["role"] for turn in turns].index("assistant")
        assert record["reference"] == turns[first]["content"]
        prompt = tokenizer.apply_chat_template(
            turns[:first], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        room = model.config.max_position_embeddings - prompt["input_ids"].shape[1]
        written = model.generate(**prompt, max_new_tokens=min(100, room), do_sample=False)
        text = tokenizer.decode(
            written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert record["prediction"] == text
        assert record["exact_match"] == 100 * (text.strip() == record["reference"].strip())
    (test,) = (record for record in metrics(ended.folder) if "test_loss" in record)
    for name in ("exact_match", "rougeL"):
        assert test[f"test_{name}"] == pytest.approx(sum(r[name] for r in found) / len(found))
    assert len(lines) == 15
    assert not any("prediction" in line for line in lines[4:])
    loss = sum(line["loss"] * line["tokens"] for line in lines) / test["test_tokens"]
    assert loss == pytest.approx(test["test_loss"])
    again = instruct(
        "scored", scored_answers=2, test_data=[{"path": str(data / "validation.jsonl")}]
    )
    assert again.status == 0, again.error
    lines = predictions(ended.folder)
    assert [line for line in lines if "prediction" in line] == found[:2]


def test_scores_of_answers(monkeypatch):
    answers = [
        {"prompt": "a", "reference": "The cats sat.\n", "prediction": " The cats sat."},
        {"prompt": "b", "reference": "the cat sat", "prediction": "A cat sits there"},
    ]
    monkeypatch.setattr(conversation_evaluation, "first_answers", lambda *_: answers)
    results, each = conversation_evaluation.score_answers(None, None, None, [])
    # of the second, stemmed: a longest common subsequence of one word, of 3 and of 4
    f1 = 2 * (1 / 4) * (1 / 3) / (1 / 4 + 1 / 3)
    assert [one["exact_match"] for one in each] == [100, 0]
    assert each[1]["rougeL"] == pytest.approx(100 * f1)
    assert results == {"eval_exact_match": 50, "eval_rougeL": pytest.approx(50 + 50 * f1)}


# adapters


def base_and_adapter(folder: Path) -> tuple[Any, Any]:
    base = AutoModelForCausalLM.from_pretrained(folder / "base_model").eval()
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base_model"), folder / "model"
    ).eval()
    return base, adapted


TOKENS = torch.arange(3, 40)[None]


@pytest.mark.parametrize(
    "lora",
    [
        LORA,
        LORA | {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        LORA | {"use_dora": True},
    ],
    ids=["LoRA", "rsLoRA", "DoRA"],
)
def test_merged_is_the_base_with_the_adapter(instruct, lora):
    alone = instruct("adapter", lora=lora)
    assert alone.status == 0, alone.error
    merged = instruct("merged", lora=lora, merge_adapter=True)
    base, adapted = base_and_adapter(alone.folder)
    whole = AutoModelForCausalLM.from_pretrained(merged.folder / "model").eval()
    with torch.no_grad():
        expected, found, before = (m(TOKENS).logits for m in (adapted, whole, base))
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (expected - before).norm() > 1e-3 * expected.norm()
    # nothing but what LoRA targets has moved
    name = "model.embed_tokens.weight"
    assert torch.equal(whole.state_dict()[name], base.state_dict()[name])
    config = json.loads((alone.folder / "model/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(alone.folder / "base_model")


def test_the_screen_shows_no_warnings_among_libraries(instruct, recwarn):
    """peft calls transformers by a name that has changed."""
    ended = instruct(lora=LORA, max_steps=1)
    assert (ended.status, ended.error) == (0, "")
    assert [str(warning.message) for warning in recwarn if warning.category is FutureWarning] == []


def test_qlora_trains_and_is_merged_in_full_precision(instruct):
    model = TINY_RUN["model"] | {"max_position_embeddings": 256, "hidden_size": 64}
    settings = {"model": model, "lora": LORA, "load_in_4bit": True, "learning_rate": 1e-2}
    ended = instruct(max_steps=12, **settings)
    assert ended.status == 0, ended.error
    assert losses(ended.folder)[-1] < losses(ended.folder)[0] - 0.1
    merged = instruct("merged", max_steps=12, merge_adapter=True, **settings)
    _, adapted = base_and_adapter(ended.folder)
    whole = AutoModelForCausalLM.from_pretrained(merged.folder / "model").eval()
    assert whole.dtype == torch.float32
    with torch.no_grad():
        expected, found = adapted(TOKENS).logits, whole(TOKENS).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_lora_plus_gives_b_a_rate_of_its_own(instruct):
    from utils.adapters import AdapterArguments, add_adapter
    from utils.optimizer import make_optimizer

    settings = TINY_RUN["model"] | {"vocab_size": 100}
    settings.pop("model_type")
    model = add_adapter(
        LlamaForCausalLM(LlamaConfig(**settings)), AdapterArguments(lora=LORA), "CAUSAL_LM", 0
    )
    arguments = instruction.Arguments(loraplus_lr_ratio=16.0)
    optimizer = make_optimizer(model, arguments)
    rates = {id(p): g["lr_ratio"] for g in optimizer.param_groups for p in g["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert rates.keys() == {id(p) for p in trained.values()}
    for name, parameter in trained.items():
        assert rates[id(parameter)] == (16.0 if "lora_B" in name else 1.0)
    slow, fast = instruct("slow", lora=LORA), instruct("fast", lora=LORA, loraplus_lr_ratio=16.0)
    assert losses(fast.folder)[0] == losses(slow.folder)[0]
    assert losses(fast.folder)[-1] < losses(slow.folder)[-1] - 0.05


def test_an_adapter_goes_on_and_one_of_another_base_is_refused(instruct, tmp_path):
    first = instruct("first", lora=LORA)
    base = str(first.folder / "base_model")
    more = instruct(
        "more", model_name_or_path=base, adapter_name_or_path=str(first.folder / "model")
    )
    assert more.status == 0, more.error
    evaluated = [
        [r["eval_loss"] for r in metrics(e.folder) if "eval_loss" in r] for e in (first, more)
    ]
    assert evaluated[1][-1] < evaluated[0][-1]
    other = instruct("other", lora=LORA, seed=1)
    refused = instruct(
        "refused",
        model_name_or_path=str(other.folder / "base_model"),
        adapter_name_or_path=str(first.folder / "model"),
    )
    assert refused.status == 2
    assert f"is an adapter for {base}, not for {other.folder}/base_model" in refused.error
    file = first.folder / "model" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    pickled = instruct(
        "pickled", model_name_or_path=base, adapter_name_or_path=str(first.folder / "model")
    )
    assert pickled.status == 2
    assert "has no weights but pickled ones (adapter_model.bin), which may hold" in pickled.error


@pytest.mark.parametrize("setting", ["model_name_or_path", "adapter_name_or_path"])
def test_weights_that_have_changed_since_their_export_are_not_started_from(setting, instruct):
    first = instruct("first", lora=LORA, max_steps=2)
    start, folder = {"model_name_or_path": str(first.folder / "base_model")}, first.folder / "model"
    if setting == "adapter_name_or_path":
        start[setting] = str(folder)
    else:
        folder = first.folder / "base_model"
    file = min(folder.glob("*model.safetensors"))  # an adapter before its base
    told = f"XXH3 ({file.name}) = {xxh3_64_hexdigest(file.read_bytes())}\n"
    assert told in (folder / "checksums.xxh3").read_text()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused = instruct("next", **start, max_steps=2)
    assert refused.status == 2
    assert refused.error == (
        f"error: {file} is not the file that was written: export or copy it again. "
        f"If it was replaced on purpose, remove {folder}/checksums.xxh3\n"
    )
    assert not (refused.folder / "metrics.jsonl").exists()
    (folder / "checksums.xxh3").unlink()
    assert instruct("next", **start, max_steps=2).status == 0


def code_of_card(folder: Path) -> dict[str, Any]:
    """What the code of an export's card has made, run from where the export is not."""
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('"."', repr(str(folder)))
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)
    return names


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["adapted", "saved"],
)
def test_a_head_that_is_tied_does_not_move_with_the_adapter_of_the_embeddings(instruct, lora):
    """Merged they are two tensors: the loss of the export is that of the run."""
    model = MODEL | {"tie_word_embeddings": True}
    settings = {"lora": LORA | lora, "model": model, "learning_rate": 3e-2, "max_steps": 12}
    alone, merged = (
        instruct("alone", **settings),
        instruct("merged", merge_adapter=True, **settings),
    )
    assert (alone.status, merged.status) == (0, 0), alone.error + merged.error
    base, adapted = base_and_adapter(alone.folder)
    whole = AutoModelForCausalLM.from_pretrained(merged.folder / "model")
    expected = logits(adapted)
    assert (logits(base) - expected).norm() > 0.05 * expected.norm()
    assert (logits(whole) - expected).norm() < 1e-5 * expected.norm()
    assert whole.config.tie_word_embeddings is False
    assert whole.get_output_embeddings().weight is not whole.get_input_embeddings().weight
    plain = AutoModelForCausalLM.from_pretrained(alone.folder / "model")
    assert (logits(plain) - expected).norm() < 1e-5 * expected.norm()


def test_a_run_that_moves_takes_its_base_along(call, data, tokenizer_folder, tmp_path, monkeypatch):
    from utils.export import export

    monkeypatch.chdir(tmp_path)
    folder, settings = Path("run"), {"lora": LORA, "learning_rate": 3e-2}
    words = words_of(folder, data, tokenizer_folder, **settings)
    ended = call(instruction.main, words, folder)
    assert ended.status == 0, ended.error
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    (tmp_path / "run").rename(tmp_path / "there" / "moved")
    moved = tmp_path / "there" / "moved"
    export(checkpoints(moved)[-1], tmp_path / "merged", merge_adapter=True)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    # the folder alone: with the plain pipeline, and with the code of its card
    shutil.copytree(moved / "model", tmp_path / "copy")
    run_tokenizer = AutoTokenizer.from_pretrained(checkpoints(moved)[-1])
    for chat in (
        pipeline("text-generation", tmp_path / "copy"),
        code_of_card(moved / "model")["chat"],
    ):
        assert (logits(chat.model) - logits(whole)).norm() < 1e-5 * logits(whole).norm()
        assert chat.tokenizer.chat_template == run_tokenizer.chat_template
        assert chat.model.generation_config.eos_token_id == run_tokenizer.eos_token_id
    words = words_of(moved, data, tokenizer_folder, **settings, max_steps=8)
    again = call(instruction.main, words, moved)
    assert again.status == 0, again.error


def test_the_card_of_an_adapter_takes_tokenizer_and_template_from_it(instruct, tmp_path):
    first = instruct("first", max_steps=1)
    base = first.folder / "model"
    (base / "chat_template.jinja").unlink()  # as a pretrained model comes
    settings = {"lora": LORA, "learning_rate": 3e-2}
    ended = instruct("adapter", model_name_or_path=str(base), **settings)
    assert ended.status == 0, ended.error
    chat = code_of_card(ended.folder / "model")["chat"]
    held = AutoTokenizer.from_pretrained(checkpoints(ended.folder)[-1])
    assert chat.tokenizer.chat_template == held.chat_template is not None
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    merged = instruct("merged", model_name_or_path=str(base), merge_adapter=True, **settings)
    expected = logits(AutoModelForCausalLM.from_pretrained(merged.folder / "model"))
    assert (logits(chat.model) - expected).norm() < 1e-5 * expected.norm()
    refused = instruct("refused", model_name_or_path=str(ended.folder / "model"))
    assert refused.status == 2


@pytest.mark.parametrize(
    ("frozen", "still"),
    [
        ("embeddings", ("model.embed_tokens.",)),
        (1, ("model.embed_tokens.", "model.layers.0.")),
        ("encoder", ("model.",)),
    ],
)
def test_frozen_parameters_do_not_move(instruct, frozen, still):
    model = TINY_RUN["model"] | {"max_position_embeddings": 256, "tie_word_embeddings": False}
    ended = instruct(freeze=frozen, model=model)
    assert ended.status == 0, ended.error
    before = load_file(ended.folder / "base_model/model.safetensors")
    after = weights(ended.folder)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith(still), name


# bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"rank": 4}}, "lora: LoraConfig has no setting 'rank': the nearest"),
        ({"lora": {"target_modules": ["nope"]}}, "lora: Target modules"),
        (
            {"lora": {"target_modules": ["lm_head"]}},
            "lora: the output layer of llama has an adapter inside, which the chunked loss cannot",
        ),
        ({"load_in_4bit": True}, "load_in_4bit: a 4-bit model cannot be trained: give lora too"),
        ({"lora": LORA, "freeze": 1}, "freeze: LoRA trains its adapter alone"),
        ({"loraplus_lr_ratio": 2.0}, "loraplus_lr_ratio: there is no adapter: give lora too"),
        ({"adapter_name_or_path": "x"}, "adapter_name_or_path: give model_name_or_path"),
        ({"freeze": 9}, "freeze: there are 2 layers, not 9"),
        ({"freeze": "head"}, "freeze must be"),
        ({"neftune_noise_alpha": -1}, "neftune_noise_alpha: -1.0 is negative"),
        ({"chat_template": None}, "chat_template: the tokenizer {tokenizer} has none: give one of"),
        ({"chat_template": "no.jinja"}, "chat_template: cannot read no.jinja: No such file"),
        (
            {"chat_template": "chatlm"},
            "chat_template: there is no chatlm; there are chatml, llama3, plain, or give a jinja f",
        ),
        ({"chat_template": "chatml"}, "writes <|im_end|>, which is no token of the tokenizer"),
        (
            {"chat_template": "{silent}"},
            "silent.jinja: in a conversation of four turns: turn 2: the chat_template does not wri",
        ),
        (
            {"chat_template": "{broken}"},
            "train.jsonl, line 1: the chat_template cannot write the co",
        ),
        ({"eos_token": "<|im_end|>"}, "eos_token: <|im_end|> is no token of the tokenizer"),
        ({"sequence_length": 10}, "train.jsonl, line 1: "),
        ({"train_data": []}, "train_data: give at least one table"),
        ({"train_data": [{"path": "none.jsonl"}]}, "no file none.jsonl"),
        ({"source_column": "from"}, "train.jsonl, line 1: no column 'from'; there are: messages"),
        ({"metric_for_best_model": "eval_f1"}, "metric_for_best_model: eval_f1 is not measured"),
        ({"num_train_epochs": 0}, "num_train_epochs must be more than 0"),
        ({"max_tokens": 5}, "max_tokens: fine-tuning is given its length by epochs or max_steps"),
        ({"model_name_or_path": "/no/model"}, "model_name_or_path: "),
    ],
)
def test_bad_settings(instruct, tokenizer_folder, tmp_path, settings, message):
    (tmp_path / "silent.jinja").write_text("{{ messages[0]['content'] }}")
    (tmp_path / "broken.jinja").write_text("{% generation %}{{ raise }{% endgeneration %}")
    places = {
        "tokenizer": tokenizer_folder,
        "silent": tmp_path / "silent.jinja",
        "broken": tmp_path / "broken.jinja",
    }
    if isinstance(settings.get("chat_template"), str):
        settings = settings | {"chat_template": settings["chat_template"].format(**places)}
    ended = instruct(**settings)
    assert ended.status == 2
    assert ended.error.startswith("error: ")
    shown = message.replace("{tokenizer}", str(tokenizer_folder))
    assert shown in ended.error
    assert len(ended.error.splitlines()) == 1
    assert not ended.folder.exists()


def test_8_bit_moments(instruct, data, tokenizer_folder, tmp_path):
    settings = EIGHT_BITS | {"max_steps": 3}
    alone = instruct("alone", **settings)
    with safe_open(checkpoints(alone.folder)[-1] / RANK_0, framework="pt") as file:
        names = file.keys()
        kinds = {name: str(file.get_slice(name).get_dtype()) for name in names}
    layer = "model.layers.0.mlp.up_proj.weight"
    assert (kinds[f"state1/{layer}"], kinds[f"absmax2/{layer}"]) == ("U8", "F32")
    assert kinds["state1/model.embed_tokens.weight"] == "F32"
    exact = instruct("exact", **settings | {"optim": "adamw_torch_fused"})
    assert losses(alone.folder) != losses(exact.folder)
    assert losses(alone.folder) == pytest.approx(losses(exact.folder), rel=1e-2)
    # written by two processes, read by one
    words = words_of(tmp_path / "two", data, tokenizer_folder, **settings)
    run("multi_cpu", 2, words, tmp_path / "two.log", script=INSTRUCTION)
    for name in ("two", "alone"):
        assert instruct(name, **settings | {"max_steps": 6}).status == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(alone.folder), rel=1e-3)
    other = instruct("alone", **settings | {"max_steps": 9, "optim": "adamw_torch_fused"})
    assert "the optimizer was AdamW8bit and is AdamW" in other.error
    words = words_of(tmp_path / "zero", data, tokenizer_folder, **settings)
    with Launch("zero2", 2, words, tmp_path / "zero.log", script=INSTRUCTION) as launch:
        assert launch.wait() == [2, 2]
    message = "error: optim: adamw_bnb_8bit keeps the moments of whole matrices"
    assert launch.output().count(message) == 1
    assert not (tmp_path / "zero").exists()


def test_4bit_under_zero3(data, tokenizer_folder, tmp_path):
    words = words_of(tmp_path / "run", data, tokenizer_folder, lora=LORA, load_in_4bit=True)
    with Launch("zero3", 2, words, tmp_path / "log", script=INSTRUCTION) as launch:
        assert launch.wait() == [2, 2]
    assert launch.output().count("error: load_in_4bit: ZeRO-3 and FSDP cannot split 4-bit") == 1
    assert not (tmp_path / "run").exists()


def test_dry_run(instruct):
    ended = instruct(dry_run=True, lora=LORA, mixed_precision="bf16")
    assert ended.status == 0, ended.error
    # 7 linear layers of 2 layers: 4 x (32 + 32) three times over … by rank, input and output
    trained = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
    assert f"{trained:,} of them trained" in ended.output
    assert "activations, the most that" in ended.output
    assert "does not tell" not in ended.output
    assert not ended.folder.exists()
