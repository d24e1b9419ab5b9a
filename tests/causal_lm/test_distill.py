"""Distillation of causal models: what is learnt from a teacher, caches, own answers, bad input."""

import io
import itertools
import json
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import peft
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, kl_div
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import cache_shards
import conversation_cache
import stream_cache
from comparing import assert_tables_are_told_apart
from conftest import WORDS, write_jsonl
from launching import TINY_RUN, Launch, checkpoints, command_line, metrics, run, steps
from on_policy import KeyedDraws, Sampler
from packing import pack
from recipes.causal_lm import distill
from utils.checkpoint import parameter_names
from utils.divergences import Divergence
from utils.loss import IGNORE_INDEX
from utils.stream import collate

DISTILL = "recipes/causal_lm/distill.py"
TEACHER = TINY_RUN["model"] | {
    "num_hidden_layers": 4,
    "intermediate_size": 80,
    "num_key_value_heads": 2,
}
SETTINGS = TINY_RUN | {"max_steps": 4, "lr_scheduler_type": "constant"}
TEMPLATE = (
    "{% for m in messages %}{{ '<|begin_of_text|>' + m.role }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|end_of_text|>' }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin_of_text|>assistant' }}{% endif %}"
)


def tiny_llama(folder, tokenizer, seed=1, **settings):
    torch.manual_seed(seed)
    values = TEACHER | {"vocab_size": 512, "initializer_range": 0.2} | settings
    values.pop("model_type")
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "teacher"
    tiny_llama(folder, tokenizer)
    return folder


@pytest.fixture
def distil(call, corpus_folder, teacher_folder, tmp_path):
    """distil(name, **settings): on text; those of the teacher are given by dotted names."""

    def start(name="run", **settings):
        folder = tmp_path / name
        values = SETTINGS | {"output_dir": folder} | settings
        if values.keys() & {"student_layers", "student_intermediate_size"}:
            values["model"] = settings.get("model", {"model_type": "llama"})
        values.setdefault("train_sources", [{"path": str(corpus_folder / "train-0.jsonl")}])
        values.setdefault("teacher", {"model_name_or_path": str(teacher_folder)})
        return call(distill.main, command_line(values), folder)

    return start


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    draw = random.Random(0)

    def turns(number):
        words = (" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in itertools.count())
        pairs = [
            [
                {"role": "user", "content": next(words)},
                {"role": "assistant", "content": next(words)},
            ]
            for _ in range(1 + number % 2)
        ]
        return {"messages": [turn for pair in pairs for turn in pair]}

    folder = tmp_path_factory.mktemp("conversations")
    (folder / "template.jinja").write_text(TEMPLATE)
    write_jsonl(folder / "train.jsonl", [turns(n) for n in range(24)])
    write_jsonl(folder / "validation.jsonl", [turns(n) for n in range(6)])
    return folder


def of_conversations(data, teacher, output_dir):
    return {k: v for k, v in SETTINGS.items() if k not in ("lanes", "model")} | {
        "output_dir": output_dir,
        "model": TINY_RUN["model"] | {"max_position_embeddings": 256},
        "chat_template": str(data / "template.jinja"),
        "train_data": [{"path": str(data / "train.jsonl")}],
        "validation_data": [{"path": str(data / "validation.jsonl")}],
        "teacher": {"model_name_or_path": str(teacher)},
        "sequence_length": 64,
        "global_batch_size": 8,
        "sample_answers": 1,
    }


@pytest.fixture
def converse(call, conversations, teacher_folder, tmp_path):
    """converse(name, **settings): on conversations."""

    def start(name="run", **settings):
        values = of_conversations(conversations, teacher_folder, tmp_path / name)
        if "student_layers" in settings:
            del values["model"]
        return call(distill.main, command_line(values | settings), tmp_path / name)

    return start


def unfinished(run, copy):
    """A copy of a run as it was before its last checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(checkpoints(copy)[-1])
    (copy / "finished.json").unlink()


def loss_of(student, teacher, **settings):
    values = {"packing": True, "hidden_weight": 0.0, "soft_weight": 1.0, "hard_weight": 0.5}
    values |= {"as_divergence": Divergence(), "seed": 0} | settings
    layers = [1, 4] if values["hidden_weight"] else []
    return distill.DistillationLoss(student, teacher, SimpleNamespace(**values), layers)


def rows_of(packing, lengths=(5, 11, 3, 13, 9, 7, 16), width=16):
    draw = np.random.default_rng(0)
    documents = ((draw.integers(3, 500, n).astype(np.int32), None) for n in lengths)
    rows = itertools.takewhile(lambda row: row[1], pack(documents, width, 0, packing))
    return collate([features for features, _ in rows])


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(("kind", "temperature"), [("forward_kl", 1.0), ("jsd", 2.0)])
def test_the_loss_is_that_of_each_document_alone(packing, kind, temperature, tokenizer, tmp_path):
    """In packed rows and padded ones: of dense logits, document by document."""
    teacher = tiny_llama(tmp_path / "t", tokenizer)
    student = tiny_llama(tmp_path / "s", tokenizer, 2, num_hidden_layers=2)
    given = Divergence(kind, 0.5, temperature)
    objective = loss_of(
        student, teacher, packing=packing, as_divergence=given, hidden_weight=0.3
    ).eval()
    batch = rows_of(packing)
    found = objective(**batch)
    expected, counts = dict.fromkeys(found, 0.0), objective.counts(batch)
    targets = 0
    for ids, places, size in zip(
        *(batch[k] for k in ("input_ids", "position_ids", "lengths")), strict=True
    ):
        starts = [*(places[:size] == 0).nonzero().flatten().tolist(), int(size)]
        for start, end in itertools.pairwise(starts):
            one = ids[None, start:end]
            with torch.no_grad():
                theirs = teacher(one, output_hidden_states=True)
                mine = student(one, output_hidden_states=True)
            labels = one[0, 1:]
            z, t = (x.logits[0, :-1].double() / temperature for x in (mine, theirs))
            p, q = z.log_softmax(1), t.log_softmax(1)
            if kind == "jsd":
                m = ((p.exp() + q.exp()) / 2).log()
                of_t, of_s = (kl_div(m, x, log_target=True, reduction="sum") for x in (q, p))
                soft = (of_t + of_s) / 2
            else:
                soft = kl_div(p, q, log_target=True, reduction="sum")
            expected["soft_loss"] += float(soft) * temperature**2
            expected["hard_loss"] += float(
                cross_entropy(mine.logits[0, :-1].double(), labels, reduction="sum")
            )
            pairs = zip(
                mine.hidden_states, (theirs.hidden_states[i] for i in (0, 1, 4)), strict=True
            )
            expected["hidden_loss"] += float(
                sum((a - b).square().mean(2).sum() for a, b in pairs) / 3
            )
            targets += len(labels)
    assert counts == {
        "soft_loss": targets,
        "hard_loss": targets,
        "hidden_loss": batch["lengths"].sum(),
    }
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=2e-5)


def test_no_training_mode_and_no_optimizer_reaches_the_teacher(tokenizer, tmp_path):
    teacher = tiny_llama(tmp_path / "t", tokenizer, attention_dropout=0.5).eval()
    teacher.requires_grad_(False)
    student = tiny_llama(tmp_path / "s", tokenizer, 2)
    objective = loss_of(student, teacher)
    objective.train()
    assert not any(module.training for module in teacher.modules())
    held = {id(parameter) for parameter in objective.parameters()}
    assert held == {id(parameter) for parameter in student.parameters()}
    assert not held & {id(parameter) for parameter in teacher.parameters()}
    losses = [objective(**rows_of(True)) for _ in range(2)]
    assert losses[0] == losses[1]
    (losses[0]["soft_loss"] + 0.5 * losses[0]["hard_loss"]).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    objective(**rows_of(True), scores_of="teacher")
    assert student.training


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_a_student_that_is_its_teacher_does_not_move(kind, distil, teacher_folder):
    ended = distil(
        student_layers=[0, 1, 2, 3],
        weight_decay=0.0,
        divergence=kind,
        hidden_weight=1.0,
        max_steps=2,
    )
    assert ended.status == 0, ended.error
    for record in steps(ended.folder):
        assert (record["soft_loss"], record["hidden_loss"], record["loss"]) == (0, 0, 0)
        assert record["hard_loss"] > 0  # measured, and not learnt from
        assert record["grad_norm"] == 0
    exported = load_file(ended.folder / "model/model.safetensors")
    for name, tensor in load_file(teacher_folder / "model.safetensors").items():
        assert torch.equal(exported[name], tensor), name


def test_a_carved_student_has_the_layers_and_the_heaviest_neurons(distil, teacher_folder):
    ended = distil(student_layers=[3, 1], student_intermediate_size=16, max_steps=1)
    assert ended.status == 0, ended.error
    given = load_file(teacher_folder / "model.safetensors")
    made = load_file(ended.folder / "student/model.safetensors")
    for mine, theirs in enumerate((3, 1)):
        prefix = "model.layers.{}.".format
        for name in ("self_attn.q_proj", "input_layernorm", "post_attention_layernorm"):
            own = made[f"{prefix(mine)}{name}.weight"]
            assert torch.equal(own, given[f"{prefix(theirs)}{name}.weight"])
        gate, up, down = (
            given[f"{prefix(theirs)}mlp.{n}_proj.weight"] for n in ("gate", "up", "down")
        )
        importance = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
        kept = importance.topk(16).indices.sort().values
        assert torch.equal(made[f"{prefix(mine)}mlp.gate_proj.weight"], gate[kept])
        assert torch.equal(made[f"{prefix(mine)}mlp.down_proj.weight"], down[:, kept])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(made[name], given[name])
    student = AutoModelForCausalLM.from_pretrained(ended.folder / "model")
    assert (student.config.num_hidden_layers, student.config.intermediate_size) == (2, 16)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "qwen3", "gemma3_text", "mistral"])
def test_students_are_carved_from_many_kinds(model_type, distil, tokenizer_folder):
    sizes = {"gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}}
    usual = TEACHER | {"num_hidden_layers": 3, "num_key_value_heads": 2}
    usual = {k: v for k, v in usual.items() if not (model_type == "gpt_neox" and "key" in k)}
    model = sizes.get(model_type, usual) | {"model_type": model_type}
    settings = {} if model_type == "gpt2" else {"student_intermediate_size": 48}
    teacher = {"model": model}
    ended = distil(
        teacher=teacher, student_layers=[2, 0], max_steps=1, tokenizer=tokenizer_folder, **settings
    )
    assert ended.status == 0, ended.error


def test_a_wider_teacher_is_met_through_a_projection_that_is_not_exported(
    distil, tokenizer, tmp_path
):
    tiny_llama(tmp_path / "wide", tokenizer, hidden_size=48)
    teacher = {"model_name_or_path": str(tmp_path / "wide")}
    settings = {
        "teacher": teacher,
        "hidden_weight": 1.0,
        "save_steps": 2,
        "tokenizer": tmp_path / "wide",
    }
    ended = distil(**settings)
    assert ended.status == 0, ended.error
    losses = [record["hidden_loss"] for record in steps(ended.folder)]
    assert losses[-1] < losses[0]
    assert "distillation_projection.weight" in parameter_names(checkpoints(ended.folder)[-1])
    exported = load_file(ended.folder / "model/model.safetensors")
    assert not [name for name in exported if "projection" in name]
    # a run that was stopped goes on with the projection as it was
    unfinished(ended.folder, tmp_path / "again")
    again = distil("again", **settings)
    assert "continuing" in again.output
    assert metrics(again.folder) == metrics(ended.folder)


def test_hidden_states_alone(distil):
    settings = {"soft_weight": 0.0, "hidden_weight": 1.0, "student_layers": [0, 3]}
    ended = distil(**settings, learning_rate=1e-3)
    assert ended.status == 0, ended.error
    records = steps(ended.folder)
    assert [r["loss"] for r in records] == [r["hidden_loss"] for r in records]
    assert records[-1]["hidden_loss"] < records[0]["hidden_loss"]
    assert records[0]["soft_loss"] > 0  # measured


@pytest.mark.parametrize("dtype", ["bfloat16", "8bit", "4bit"])
def test_a_teacher_in_fewer_bits_is_nearly_the_same(dtype, distil, tokenizer, tmp_path):
    tiny_llama(tmp_path / "teacher", tokenizer, hidden_size=64, intermediate_size=128)
    given = {"model_name_or_path": str(tmp_path / "teacher")}
    exact = distil("exact", teacher=given, max_steps=1, hard_weight=1.0)
    rounded = distil("rounded", teacher=given | {"dtype": dtype}, max_steps=1, hard_weight=1.0)
    assert rounded.status == 0, rounded.error
    (one,), (other,) = (steps(ended.folder)[:1] for ended in (exact, rounded))
    assert one["hard_loss"] == other["hard_loss"]
    assert one["soft_loss"] != other["soft_loss"]
    assert other["soft_loss"] == pytest.approx(one["soft_loss"], rel=0.2)


def test_a_teacher_with_an_adapter(distil, teacher_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    lora = peft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "lora")
    adapted.merge_and_unload().save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(tmp_path / "whole")
    given = {"model_name_or_path": str(teacher_folder)}
    teachers = {
        "adapter": given | {"adapter_name_or_path": str(tmp_path / "lora")},
        "merged": {"model_name_or_path": str(tmp_path / "whole")},
        "plain": given,
    }
    settings = {"student_layers": [0, 2], "max_steps": 2}
    runs = [distil(name, teacher=teacher, **settings) for name, teacher in teachers.items()]
    assert [ended.error for ended in runs if ended.status] == []
    losses = [[record["loss"] for record in steps(ended.folder)] for ended in runs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert abs(losses[0][0] / losses[2][0] - 1) > 0.01


def test_a_stopped_run_goes_on_bit_by_bit(distil, tmp_path):
    settings = {"student_layers": [0, 3], "save_steps": 2, "keep_last": 3, "hard_weight": 0.5}
    whole = distil("whole", **settings)
    assert whole.status == 0, whole.error
    unfinished(whole.folder, tmp_path / "again")
    again = distil("again", **settings)
    assert "continuing" in again.output
    assert metrics(again.folder) == metrics(whole.folder)
    weights = [
        load_file(folder / "model/model.safetensors") for folder in (whole.folder, again.folder)
    ]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    other = distil("again", **settings, temperature=2.0, max_steps=6)
    assert (other.status, "temperature" in other.error) == (2, True)


@pytest.mark.parametrize("stage", ["multi_cpu", "zero2", "zero3"])
def test_processes_and_stages_change_no_number(
    stage, distil, corpus_folder, teacher_folder, tmp_path
):
    values = {k: v for k, v in SETTINGS.items() if k != "model"} | {
        "teacher": {"model_name_or_path": str(teacher_folder)},
        "train_sources": [{"path": str(corpus_folder / "train-0.jsonl")}],
        "validation_sources": [{"path": str(corpus_folder / "validation.jsonl")}],
        "test_sources": [{"path": str(corpus_folder / "validation.jsonl")}],
        "eval_documents": 10,
        "student_layers": [0, 3],
        "hard_weight": 0.5,
        "hidden_weight": 0.1,
        "max_steps": 3,
    }
    one = distil("one", **values)
    assert one.status == 0, one.error
    folder = tmp_path / "two"
    words = command_line(values | {"output_dir": folder, "per_device_batch_size": 2})
    run(stage, 2, words, tmp_path / "log.txt", script=DISTILL)
    for found, expected in zip(metrics(folder), metrics(one.folder), strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, float):
                assert found[key] == pytest.approx(value, rel=1e-5), key
    last = metrics(folder)[-1]
    assert last["test_teacher_bits_per_byte"] > 0


def test_a_split_teacher_does_not_grow(corpus_folder, tokenizer, tmp_path):
    """What ZeRO-3 gathers of it in each step, it lets go (DeepSpeed#3175, #3286)."""
    tiny_llama(tmp_path / "teacher", tokenizer, hidden_size=128, intermediate_size=256)
    size = (tmp_path / "teacher/model.safetensors").stat().st_size
    values = SETTINGS | {
        "teacher": {"model_name_or_path": str(tmp_path / "teacher")},
        "train_sources": [{"path": str(corpus_folder / "train-0.jsonl")}],
        "output_dir": tmp_path / "run",
        "max_steps": 200,
        "save_steps": 200,
        "global_batch_size": 4,
        "lanes": 4,
    }
    held = []
    with Launch("zero3", 1, command_line(values), tmp_path / "log.txt", script=DISTILL) as launch:
        for step in (40, 190):
            launch.wait_for(f"step {step}/200 ")
            held.append(psutil.Process(launch.processes[0].pid).memory_info().rss)
        assert launch.wait() == [0], launch.output()
    assert held[1] - held[0] < 10 * size  # and not of 150 steps


def cached(folder, **settings):
    return {"teacher_cache": str(folder), "student_layers": [0, 3]} | settings


def test_a_cache_of_all_tokens_is_the_teacher(distil, tmp_path):
    """But for the float16 of its log-probabilities."""
    settings = cached(tmp_path / "cache", cache_top_k=512, hard_weight=0.5, temperature=2.0)
    written = distil("cached", **settings, write_teacher_cache=True)
    assert written.status == 0, written.error
    assert "bytes a token" in written.output
    ended = distil("cached", **settings)
    online = distil("online", **{k: v for k, v in settings.items() if "cache" not in k})
    assert (ended.status, online.status) == (0, 0), ended.error
    for found, expected in zip(steps(ended.folder), steps(online.folder), strict=True):
        assert found["soft_loss"] == pytest.approx(expected["soft_loss"], rel=1e-3)
        assert found["tokens"] == expected["tokens"]
    assert steps(ended.folder)[0]["hard_loss"] == steps(online.folder)[0]["hard_loss"]


def test_a_cached_run_goes_on_and_an_interrupted_cache_too(distil, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_cache, "SHARD_ROWS", 3)
    monkeypatch.setattr(cache_shards, "GROUP_ROWS", 2)
    settings = cached(tmp_path / "cache", cache_top_k=8, save_steps=2, keep_last=3)
    assert distil("run", **settings, write_teacher_cache=True).status == 0
    files = sorted((tmp_path / "cache").rglob("*.parquet"))
    assert len(files) == 8 * 3
    before = {file: pq.read_table(file) for file in files}
    for file in files[::5] + files[-2:]:
        file.unlink()
    refused = distil("run", **settings)
    assert (refused.status, "cut short: lane 0 has" in refused.error) == (2, True)
    assert distil("run", **settings, write_teacher_cache=True).status == 0
    assert {file: pq.read_table(file) for file in files} == before
    whole = distil("run", **settings)
    assert whole.status == 0, whole.error
    unfinished(whole.folder, tmp_path / "again")
    again = distil("again", **settings)
    assert "continuing" in again.output
    assert metrics(again.folder) == metrics(whole.folder)
    longer = distil("again", **settings | {"max_steps": 6})
    assert (longer.status, "cut short" in longer.error) == (2, True)
    assert distil("again", **settings | {"max_steps": 6}, write_teacher_cache=True).status == 0
    assert distil("again", **settings | {"max_steps": 6}).status == 0
    table = pq.read_table(files[1])
    assert table["top_ids"][0].values.to_numpy().size == 8 * sum(
        label != IGNORE_INDEX for label in table["shift_labels"][0].as_py()
    )


def test_two_processes_write_and_read_the_same_cache(
    distil, corpus_folder, teacher_folder, tmp_path
):
    values = (
        {name: value for name, value in SETTINGS.items() if name != "model"}
        | cached(tmp_path / "cache", cache_top_k=8)
        | {
            "teacher": {"model_name_or_path": str(teacher_folder)},
            "train_sources": [{"path": str(corpus_folder / "train-0.jsonl")}],
        }
    )
    one = cached(tmp_path / "one", cache_top_k=8)
    assert distil("run", **one, write_teacher_cache=True).status == 0
    alone = distil("run", **one)
    words = command_line(values | {"write_teacher_cache": True, "output_dir": tmp_path / "two"})
    run("zero3", 2, words, tmp_path / "log.txt", script=DISTILL)
    for file in sorted((tmp_path / "one").rglob("*.parquet")):
        name = file.relative_to(tmp_path / "one")
        tables = [pq.read_table(tmp_path / part / name) for part in ("one", "cache")]
        for name in ("input_ids", "seen", "state", "top_ids"):
            assert tables[0][name] == tables[1][name]
    words = command_line(values | {"output_dir": tmp_path / "two"})
    run("multi_cpu", 2, words, tmp_path / "log.txt", script=DISTILL)
    losses = [[record["loss"] for record in steps(f)] for f in (alone.folder, tmp_path / "two")]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_conversations_by_the_assistants_tokens(converse, tokenizer):
    ended = converse(student_layers=[0, 1, 2, 3], weight_decay=0.0, max_steps=2)
    assert ended.status == 0, ended.error
    assert [record["soft_loss"] for record in steps(ended.folder)] == [0, 0]
    packed, padded = (
        converse(name, packing=packing, hard_weight=1.0, max_steps=3)
        for name, packing in (("packed", True), ("padded", False))
    )
    losses = [[record["loss"] for record in steps(one.folder)] for one in (packed, padded)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["given", "own"])
def test_tables_are_told_apart(share, converse, conversations):
    assert_tables_are_told_apart(
        converse,
        conversations / "train.jsonl",
        conversations / "validation.jsonl",
        "tokens",
        on_policy_share=share,
        on_policy_tokens=8,
    )


def test_answers_of_the_student_are_the_same_whatever_they_are_sampled_with(
    converse, monkeypatch, tmp_path
):
    """As are all numbers of a run that was stopped."""
    settings = {"on_policy_share": 0.5, "on_policy_tokens": 8, "save_steps": 3, "keep_last": 4}
    seen: dict[str, list] = {}

    def note(name):
        original = Sampler.__call__

        def call(self, indices, times):
            examples = original(self, indices, times)
            seen.setdefault(name, []).append([e["input_ids"].tolist() for e in examples])
            return examples

        monkeypatch.setattr(Sampler, "__call__", call)
        return original

    runs = {}
    for name, size in (("whole", 4), ("narrow", 1)):
        original = note(name)
        runs[name] = converse(name, **settings, per_device_batch_size=size, max_steps=6)
        monkeypatch.setattr(Sampler, "__call__", original)
        assert runs[name].status == 0, runs[name].error
    assert seen["whole"][:4] == seen["narrow"][:4]
    losses = [[record["loss"] for record in steps(one.folder)] for one in runs.values()]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    never = converse("never", max_steps=6)
    pairs = zip(steps(runs["whole"].folder), steps(never.folder), strict=True)
    assert 0 < sum(own["tokens"] == given["tokens"] for own, given in pairs) < 6
    again = tmp_path / "again"
    unfinished(runs["whole"].folder, again)
    ended = converse("again", **settings, max_steps=6)
    assert "continuing" in ended.output
    assert metrics(again) == metrics(runs["whole"].folder)


def test_own_answers_on_two_processes_under_zero3(
    converse, conversations, teacher_folder, tmp_path
):
    settings = {"on_policy_share": 1.0, "on_policy_tokens": 6, "max_steps": 2}
    alone = converse("one", **settings)
    assert alone.status == 0, alone.error
    values = of_conversations(conversations, teacher_folder, tmp_path / "two") | settings
    run("zero3", 2, command_line(values), tmp_path / "log.txt", script=DISTILL)
    one, two = (steps(folder) for folder in (alone.folder, tmp_path / "two"))
    assert [record["tokens"] for record in one] == [record["tokens"] for record in two]
    np.testing.assert_allclose(*([r["loss"] for r in found] for found in (one, two)), rtol=1e-5)


def test_draws_have_the_distribution_of_the_model():
    logits = torch.tensor([2.0, 0.0, 1.0, -torch.inf])
    rows = 20_000
    draws = KeyedDraws([*range(rows)], 0.5, torch.device("cpu"))
    found = draws(None, logits.expand(rows, -1)).argmax(1).bincount(minlength=4) / rows
    torch.testing.assert_close(found, (logits / 0.5).softmax(0), atol=0.01, rtol=0)
    alone = KeyedDraws([17], 0.5, torch.device("cpu"))(None, logits[None])
    again = KeyedDraws([3, 17], 0.5, torch.device("cpu"))(None, logits.expand(2, -1))
    assert torch.equal(alone[0], again[1])


REFUSED = {
    "temperature": ({"temperature": 0.0}, "temperature must be more than 0"),
    "negative": ({"temperature": -1.0}, "temperature must be more than 0"),
    "beta": ({"beta": 1.5}, r"beta must be in \[0, 1\]"),
    "no weights": ({"soft_weight": 0.0}, "there is nothing to learn"),
    "negative weight": ({"hard_weight": -1.0}, "hard_weight must be 0 or more"),
    "no teacher": ({"teacher": {}}, "teacher: give its model_name_or_path"),
    "missing": (
        {"teacher": {"model_name_or_path": "/nowhere"}, "tokenizer": "T"},
        "teacher: model_name_or_path: cannot load /nowhere: there is no such folder",
    ),
    "two kinds": ({"on_policy_share": 0.5}, "'on_policy_share' does not go with '.*': two kinds"),
    "layers": ({"student_layers": [0, 4]}, "not among the teacher's 0 to 3"),
    "no layers": ({"student_layers": []}, "not among the teacher's 0 to 3"),
    "neurons": ({"student_intermediate_size": 100}, "student_intermediate_size: 100"),
    "map": ({"hidden_weight": 1.0, "layer_map": [1, 5]}, "layer_map: .* the teacher's, 1 to 4"),
    "short map": ({"hidden_weight": 1.0, "layer_map": [1]}, "layer_map"),
    "k": (
        {"teacher_cache": "C", "write_teacher_cache": True, "cache_top_k": 513},
        "cache_top_k: 513",
    ),
    "zero k": ({"cache_top_k": 0}, "cache_top_k must be at least 1"),
    "no cache": ({"teacher_cache": "C"}, "there is none in .*C: write it"),
    "nameless cache": ({"write_teacher_cache": True}, "name the folder: teacher_cache"),
    "hidden of cache": ({"teacher_cache": "C", "hidden_weight": 1.0}, "no hidden states"),
    "two students": ({"model_name_or_path": "T", "student_layers": [0]}, "students of their own"),
    "a student twice": ({"model": TEACHER, "student_layers": [0]}, "students of their own"),
    "key": ({"techer": "x"}, "techer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_in_one_line(case, distil, teacher_folder, tmp_path):
    settings, message = REFUSED[case]
    places = {"T": str(teacher_folder), "C": str(tmp_path / "C")}
    settings = {k: places.get(v, v) if isinstance(v, str) else v for k, v in settings.items()}
    ended = distil("run", **settings)
    assert ended.status == 2, ended.output
    assert ended.error.count("\n") == 1
    assert re.search(message, ended.error), ended.error
    assert not ended.folder.exists()


def test_a_teacher_of_other_words_is_refused(distil, tokenizer, tmp_path):
    tiny_llama(tmp_path / "teacher", tokenizer)
    path = tmp_path / "teacher/tokenizer.json"
    settings = json.loads(path.read_text())
    vocabulary = settings["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)[300:]
    ids = sorted((vocabulary[name] for name in names), reverse=True)
    vocabulary |= dict(zip(names, ids, strict=True))
    path.write_text(json.dumps(settings))
    teacher = {"model_name_or_path": str(tmp_path / "teacher")}
    ended = distil(teacher=teacher, tokenizer=tokenizer.name_or_path)
    assert ended.status == 2
    assert ": tokenizer: " in ended.error
    assert "is not that of" in ended.error


APART = {
    "bloom": (
        {"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 2},
        "bloom cannot keep packed documents apart",
    ),
    "opt": (
        {"model_type": "opt", "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "word_embed_proj_dim": 32},
        "documents in one row see each other",
    ),
}


@pytest.mark.parametrize("writes", [False, True], ids=["beside the student", "a cache"])
@pytest.mark.parametrize("kind", APART)
@pytest.mark.parametrize("dtype", ["float32", "8bit"])
def test_a_teacher_that_sees_other_documents_is_refused(
    dtype, kind, writes, distil, tokenizer, tmp_path
):
    """In 8 bits rows are rounded by each other, which is not what is looked for."""
    model, message = APART[kind]
    config = AutoConfig.for_model(**model, vocab_size=512)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    teacher = {"model_name_or_path": str(tmp_path / "teacher"), "dtype": dtype}
    settings = {"teacher": teacher, "tokenizer": tokenizer.name_or_path}
    if writes:
        settings |= {"teacher_cache": str(tmp_path / "cache"), "write_teacher_cache": True}
    ended = distil("run", **settings)
    assert ended.status == 2
    assert f"error: teacher: model: {message}" in ended.error
    assert ended.error.count("\n") == 1
    assert not [*tmp_path.rglob("*.parquet")]


def test_a_teacher_in_its_students_folder_is_refused(distil, teacher_folder, tmp_path):
    first = distil("run", max_steps=1)
    assert first.status == 0, first.error
    again = distil("run", teacher={"model_name_or_path": str(first.folder / "model")}, max_steps=2)
    assert (again.status, "is in the output_dir of its own student" in again.error) == (2, True)


@pytest.mark.parametrize("what", ["teacher", "tokenizer", "corpus", "temperature", "truncated"])
def test_a_cache_of_something_else_is_refused(
    what, distil, teacher_folder, tokenizer, corpus_folder, tmp_path
):
    settings = cached(tmp_path / "cache", cache_top_k=4, max_steps=1)
    assert distil("run", **settings, write_teacher_cache=True).status == 0
    if what == "teacher":
        tiny_llama(tmp_path / "other", tokenizer, seed=7)
        settings["teacher"] = {"model_name_or_path": str(tmp_path / "other")}
    elif what == "tokenizer":
        other = AutoTokenizer.from_pretrained(teacher_folder)
        other.add_tokens(["<|more|>"])
        other.save_pretrained(tmp_path / "other")
        settings["tokenizer"] = str(tmp_path / "other")
        settings["teacher"] = {"model_name_or_path": str(teacher_folder)}
    elif what == "corpus":
        settings["train_sources"] = [{"path": str(corpus_folder / "train-1.jsonl")}]
    elif what == "temperature":
        settings["temperature"] = 3.0
    else:
        file = next((tmp_path / "cache").rglob("*.parquet"))
        file.write_bytes(file.read_bytes()[:-100])
    ended = distil("run", **settings)
    assert ended.status == 2, ended.output
    wanted = "cut short or damaged" if what == "truncated" else f"with another {what}"
    if what == "tokenizer":
        wanted = "vocab|another tokenizer"
    assert re.search(wanted, ended.error), ended.error
    assert not ended.folder.exists()


def test_a_flipped_bit_of_a_cache_is_met(distil, tmp_path):
    settings = cached(tmp_path / "cache", cache_top_k=4, max_steps=1)
    assert distil("run", **settings, write_teacher_cache=True).status == 0
    file = next(iter(sorted((tmp_path / "cache").rglob("*.parquet"))))
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    ended = distil("run", **settings)
    assert (ended.status, "damaged" in ended.error) == (2, True), ended.error


def test_cached_conversations_are_those_beside_the_teacher(converse, tmp_path, monkeypatch):
    """Packed or padded, over epochs, and after a resume."""
    monkeypatch.setattr(conversation_cache, "SHARD_ROWS", 5)
    monkeypatch.setattr(cache_shards, "GROUP_ROWS", 2)
    settings = {"student_layers": [0, 3], "hard_weight": 0.5, "temperature": 2.0, "save_steps": 3}
    settings |= {"max_steps": 8, "keep_last": 9}
    cache = {"teacher_cache": str(tmp_path / "cache"), "cache_top_k": 512}
    written = converse("cached-False", **settings, **cache, write_teacher_cache=True)
    assert written.status == 0, written.error
    assert len([*(tmp_path / "cache").rglob("*.parquet")]) == 5
    for packing in (False, True):
        beside = converse(f"beside-{packing}", **settings, packing=packing)
        ended = converse(f"cached-{packing}", **settings, **cache, packing=packing)
        assert (beside.status, ended.status) == (0, 0), ended.error
        for found, expected in zip(steps(ended.folder), steps(beside.folder), strict=True):
            for name in ("loss", "soft_loss", "hard_loss", "grad_norm"):
                assert found[name] == pytest.approx(expected[name], rel=2e-3), name
    unfinished(ended.folder, tmp_path / "cached-again")
    again = converse("cached-again", **settings, **cache, packing=True)
    assert again.status == 0, again.error
    weights = [load_file(run.folder / "model/model.safetensors") for run in (ended, again)]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


def test_a_cache_of_conversations_is_written_on_where_it_was_stopped(
    converse, conversations, tmp_path, monkeypatch
):
    monkeypatch.setattr(conversation_cache, "SHARD_ROWS", 5)
    settings = {"student_layers": [0, 3], "max_steps": 3, "cache_top_k": 4}
    settings |= {"teacher_cache": str(tmp_path / "cache")}
    assert converse(**settings, write_teacher_cache=True).status == 0
    files = sorted((tmp_path / "cache").rglob("*.parquet"))
    contents = [file.read_bytes() for file in files]
    files[1].unlink()
    ended = converse(**settings)
    assert (ended.status, "lacks 5 of 24 conversations" in ended.error) == (2, True), ended.error
    times = [file.stat().st_mtime_ns for file in files if file.exists()]
    assert converse(**settings, write_teacher_cache=True).status == 0
    assert [file.read_bytes() for file in files] == contents
    assert [f.stat().st_mtime_ns for f in files if f != files[1]] == times  # not again
    data = [{"path": str(conversations / "validation.jsonl")}]
    other = converse(**settings | {"train_data": data})
    assert (other.status, "with another corpus" in other.error) == (2, True), other.error
    own = converse(**settings, on_policy_share=0.5)
    assert (own.status, "on_policy_share: a teacher_cache holds" in own.error) == (2, True)
    files[0].write_bytes(contents[0][:-100])
    assert "is cut short or damaged" in converse(**settings).error
    group = pq.ParquetFile(io.BytesIO(contents[0])).metadata.row_group(0)
    columns = (group.column(place) for place in range(group.num_columns))
    kept = next(column for column in columns if column.path_in_schema.startswith("top_log"))
    flipped = bytearray(contents[0])
    first = kept.dictionary_page_offset or kept.data_page_offset
    flipped[first + kept.total_compressed_size // 2] ^= 1
    files[0].write_bytes(flipped)
    assert "is cut short or damaged" in converse(**settings).error


def test_two_processes_write_a_cache_of_conversations(
    converse, conversations, teacher_folder, tmp_path
):
    values = of_conversations(conversations, teacher_folder, tmp_path / "run")
    values |= {"max_steps": 1, "cache_top_k": 4, "write_teacher_cache": True}
    words = command_line(values | {"teacher_cache": str(tmp_path / "two")})
    run("zero3", 2, words, tmp_path / "log.txt", script=DISTILL)
    one = {"cache_top_k": 4, "max_steps": 1, "teacher_cache": str(tmp_path / "one")}
    assert converse(**one, write_teacher_cache=True).status == 0
    (file,) = (tmp_path / "one").rglob("*.parquet")
    tables = [pq.read_table(tmp_path / part / "lane-00000" / file.name) for part in ("one", "two")]
    for name in ("input_ids", "shift_labels", "top_ids"):
        assert tables[0][name] == tables[1][name]


def test_a_mapping_of_both_kinds_of_data_is_refused(distil, conversations):
    ended = distil(train_data=[{"path": str(conversations / "train.jsonl")}])
    assert ended.status == 2
    assert "train_data" in ended.error
