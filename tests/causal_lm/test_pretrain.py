"""The causal LM recipe: the same numbers as plain PyTorch and as transformers.Trainer."""

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaMLP

from conftest import make_documents, write_jsonl
from launching import TINY_RUN, checkpoints, metrics, steps
from packing import DocumentEncoder, pack, packed_rows
from recipes.causal_lm.pretrain import Arguments, NextTokenLoss
from sweeps.architectures import tiny_config
from utils import divergences
from utils.engine import Engine
from utils.lanes import Corpus, Lanes
from utils.loss import IGNORE_INDEX
from utils.sources import Source
from utils.stream import TrainingStream, collate

STEPS = 12
COSINE = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "max_steps": STEPS,
    "weight_decay": 0.5,
    "max_grad_norm": 0.5,
}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A corpus whose lanes end at different times: rows have from 0 to 31 targets."""
    file = tmp_path_factory.mktemp("uneven") / "data.jsonl"
    write_jsonl(file, make_documents("uneven", 70))
    return [{"path": str(file), "epochs": 1}]


@pytest.fixture(scope="module")
def initial(tmp_path_factory, tokenizer_folder):
    """A folder with a model that has not been trained, and its tokenizer."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(**TINY_RUN["model"], vocab_size=512)
    folder = tmp_path_factory.mktemp("initial")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


def global_batches(sources, tokenizer, count=STEPS):
    """The batches that the recipe trains on, as the stream gives them."""
    sources = [Source(**source) for source in sources]
    settings = Arguments(train_sources=sources, lanes=8, global_batch_size=16)
    lanes = Lanes(Corpus(settings), DocumentEncoder(tokenizer))
    rows = TrainingStream(lanes, partial(packed_rows, lanes, 32), settings).rows(0, 1)
    return [collate([row.features for row in next(rows)]) for _ in range(count)]


def plain_loop(folder, batches, factor):
    """A training loop as it stands in a tutorial, for `factor(step)` times the learning rate."""
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    records = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * factor(step)
        labels = batch["shift_labels"]
        places = batch["position_ids"]
        logits = model(batch["input_ids"], position_ids=places, use_cache=False).logits
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        mean = total / (labels != IGNORE_INDEX).sum()
        mean.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        records.append((mean.item(), norm.item()))
    return records, model.state_dict()


def cosine(step):
    if step < 3:
        return step / 3
    return 0.5 * (1 + math.cos(math.pi * (step - 3) / (STEPS - 3)))


@pytest.mark.parametrize("rows", ["full rows", "rows with few targets"])
def test_the_numbers_are_those_of_a_plain_loop(
    rows, pretrain, initial, corpus_folder, uneven, tokenizer
):
    full = [{"path": str(corpus_folder / "train-0.jsonl")}]
    sources = full if rows == "full rows" else uneven
    batches = global_batches(sources, tokenizer)
    targets = {int((row != IGNORE_INDEX).sum()) for b in batches for row in b["shift_labels"]}
    # the last rows of a finite corpus: a mean of means would be far off
    assert min(targets) >= 20 if sources is full else min(targets) == 0
    ended = pretrain(model_name_or_path=str(initial), train_sources=sources, **COSINE)
    assert ended.status == 0, ended.error
    expected, weights = plain_loop(initial, batches, cosine)
    records = steps(ended.folder)
    assert len(records) == STEPS
    assert any(norm > 0.5 for _, norm in expected)  # clipping has something to do
    for step, (record, (mean, norm)) in enumerate(zip(records, expected, strict=True)):
        assert record["learning_rate"] == pytest.approx(3e-3 * cosine(step), rel=1e-12)
        assert record["loss"] == pytest.approx(mean, rel=1e-6)
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-5)
    trained = AutoModelForCausalLM.from_pretrained(ended.folder / "model").state_dict()
    begun = AutoModelForCausalLM.from_pretrained(initial).state_dict()
    for name, weight in weights.items():
        moved = (weight - begun[name]).norm()
        assert moved > 0
        assert (trained[name] - weight).norm() < 1e-4 * moved


def test_the_loss_curve_is_that_of_transformers_trainer(
    pretrain, initial, corpus_folder, tokenizer, tmp_path
):
    sources = [{"path": str(corpus_folder / "train-0.jsonl")}]
    ended = pretrain(model_name_or_path=str(initial), train_sources=sources, **COSINE)
    rows = [
        {
            "input_ids": batch["input_ids"][i],
            "position_ids": batch["position_ids"][i],
            "labels": batch["shift_labels"][i],  # so that the model computes a loss; of …
            "shift_labels": batch["shift_labels"][i],  # … these, where a row's last has a target
        }
        for batch in global_batches(sources, tokenizer)
        for i in range(16)
    ]
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(initial),
        TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=3,
            max_steps=STEPS,
            weight_decay=0.5,
            max_grad_norm=0.5,
            adam_beta2=0.95,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
    )
    trainer.train()
    theirs = [record for record in trainer.state.log_history if "loss" in record]
    ours = steps(ended.folder)
    assert len(theirs) == len(ours) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(float(other["loss"]), rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(float(other["grad_norm"]), rel=1e-3)
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.1


# one global batch, split in several ways


@pytest.fixture
def gradient_norms(monkeypatch):
    """Norms by parameter of every step's gradients, as the optimizer would get them."""
    norms = []
    update = Engine._update

    def recording_update(engine):
        norms.append({n: float(p.grad.norm()) for n, p in engine.model.named_parameters()})
        return update(engine)

    monkeypatch.setattr(Engine, "_update", recording_update)
    return norms


def test_epochs_are_counted_and_the_schedule_ends_with_them(pretrain, tmp_path, monkeypatch):
    """Of .txt files in a folder; what was counted is not counted again, and lanes are few."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, document in enumerate(make_documents("text", 20)):
        (folder / f"{number}.txt").write_text(document["text"])
    given = {"train_sources": str(folder), "lanes": None, "lr_scheduler_type": "linear"}
    ended = pretrain("counted", **given, num_train_epochs=2, save_steps=2, keep_last=99)
    assert ended.status == 0, ended.error
    records = steps(ended.folder)
    assert yaml.safe_load((ended.folder / "config.yaml").read_text())["lanes"] == 4  # of 20 / 4
    total = len(records)
    rates = [record["learning_rate"] for record in records]
    assert rates == pytest.approx([3e-3 * (1 - step / total) for step in range(total)])
    assert f"step {total}/{total}" in ended.output
    (last,) = (r for r in metrics(ended.folder) if r.get("epoch_by_source") and r["step"] == total)
    assert last["epoch_by_source"] == {str(folder): 2}

    said = [{"path": str(folder), "epochs": 2}]
    same = pretrain("said", **given | {"train_sources": said, "max_steps": total}, save_steps=2)
    assert steps(same.folder) == records

    before = metrics(ended.folder)
    for checkpoint in checkpoints(ended.folder)[1:]:
        shutil.rmtree(checkpoint)
    (ended.folder / "finished.json").unlink()
    monkeypatch.setattr(TrainingStream, "count_steps", None)
    again = pretrain("counted", **given, num_train_epochs=2, save_steps=2, keep_last=99)
    assert again.status == 0, again.error
    assert metrics(ended.folder) == before


def test_data_that_repeat_are_told(pretrain, uneven):
    few = [uneven[0] | {"epochs": None, "label": "few"}]
    ended = pretrain("few", train_sources=few, max_steps=16, save_steps=16)
    assert "the data repeat: by now they were read, few 1." in ended.output
    ended = pretrain("asked", train_sources=few, max_steps=16, save_steps=16, num_train_epochs=3)
    assert ended.status == 0
    assert "the data repeat" not in ended.output


def test_accumulation_and_micro_batches_do_not_change_the_numbers(
    pretrain, uneven, gradient_norms, monkeypatch
):
    monkeypatch.setattr(divergences, "CHUNK_ELEMENTS", 512 * 100)  # chunks, too, fall differently
    runs = {}
    for size in (16, 8, 4, 1):
        gradient_norms.clear()
        ended = pretrain(
            f"{size}", train_sources=uneven, per_device_batch_size=size, save_steps=1000
        )
        assert "the data is spent" in ended.output
        runs[size] = steps(ended.folder), list(gradient_norms)
    records, norms = runs[16]
    assert len(records) == len(norms) > STEPS
    for other_records, other_norms in (runs[8], runs[4], runs[1]):
        for record, other in zip(records, other_records, strict=True):
            assert other["tokens"] == record["tokens"]
            assert other["loss"] == pytest.approx(record["loss"], rel=1e-6)
        for norm, other in zip(norms, other_norms, strict=True):
            assert other == pytest.approx(norm, rel=1e-4)
        # before updates let the roundings of one step grow in the next
        assert other_norms[0] == pytest.approx(norms[0], rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_no_number(dropout, pretrain, gradient_norms, monkeypatch):
    forward, calls = LlamaMLP.forward, []
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda *args, **kw: calls.append(None) or forward(*args, **kw)
    )
    model = {**TINY_RUN["model"], "attention_dropout": dropout}
    plain = pretrain("plain", max_steps=4, model=model)
    plain_norms, plain_calls = list(gradient_norms), len(calls)
    gradient_norms.clear()
    checkpointed = pretrain("checkpointed", max_steps=4, model=model, gradient_checkpointing=True)
    # steps x micro-batches x layers are computed once more
    assert len(calls) - plain_calls == plain_calls + 4 * 4 * 2
    for mine, other in zip(steps(plain.folder), steps(checkpointed.folder), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
    for mine, other in zip(plain_norms, gradient_norms, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)


def test_dropout_is_drawn_anew_in_every_step_and_is_off_in_evaluations(
    pretrain, tokenizer, tmp_path
):
    """Seen in the losses of weights that do not change on data that is always the same."""
    encode = DocumentEncoder(tokenizer)
    words = (make_documents("x", 1)[0]["text"][:size] for size in range(200))
    text = next(text for text in words if len(encode([text])[0]) == 32)  # a row
    write_jsonl(tmp_path / "same.jsonl", [{"text": text}] * 50)
    source = [{"path": str(tmp_path / "same.jsonl")}]
    settings = {
        "train_sources": source,
        "validation_sources": source,
        "learning_rate": 0.0,
        "weight_decay": 0.0,
        "max_steps": 4,
        "eval_steps": 1,
        "eval_documents": 5,
    }

    def losses(name, dropout, **more):
        model = {**TINY_RUN["model"], "attention_dropout": dropout}
        ended = pretrain(name, model=model, **settings, **more)
        lines = metrics(ended.folder)
        assert len({line["eval_loss"] for line in lines if "eval_loss" in line}) == 1
        return [line["loss"] for line in lines if "loss" in line]

    assert len(set(losses("without", 0.0))) == 1
    first = losses("with", 0.5)
    assert len(set(first)) == 4
    assert losses("again", 0.5) == first
    other = losses("other", 0.5, seed=1)
    assert not set(other) & set(first)


def test_bf16_is_near_fp32_and_keeps_fp32_weights(pretrain):
    settings = {"max_steps": 10, "save_steps": 10}
    exact = pretrain("fp32", **settings)
    rough = pretrain("bf16", mixed_precision="bf16", **settings)
    losses = [s["loss"] for s in steps(exact.folder)]
    assert [s["loss"] for s in steps(rough.folder)] == pytest.approx(losses, rel=1e-2)
    assert [s["loss"] for s in steps(rough.folder)] != losses
    dtypes = {
        ended: AutoConfig.from_pretrained(ended.folder / "model").dtype for ended in (exact, rough)
    }
    assert dtypes == {exact: torch.float32, rough: torch.bfloat16}
    (checkpoint,) = rough.folder.glob("checkpoints/*/rank-*.safetensors")
    from safetensors.torch import load_file

    assert {tensor.dtype for tensor in load_file(checkpoint).values()} == {torch.float32}


def test_fp16_on_a_cpu_is_refused(pretrain):
    """Accelerate would train in fp32 there without a word."""
    ended = pretrain(mixed_precision="fp16", max_steps=1)
    message = "mixed_precision: fp16 needs a GPU, or DeepSpeed and a CPU that knows fp16"
    assert (ended.status, ended.error) == (2, f"error: {message}\n")
    assert not ended.folder.exists()


# packed documents do not see each other


def tiny_model(model_type, attention="sdpa"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    for name, value in {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # so that attention matters
    return model


def packed_batch(documents, length=48):
    rows = pack(((np.array(tokens, np.int32), None) for tokens in documents), length)
    return collate([next(rows)[0]])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "gpt_neox"])
def test_packed_documents_do_not_see_each_other(model_type, attention):
    objective = NextTokenLoss(tiny_model(model_type, attention))
    draw = np.random.default_rng(0)
    documents = [draw.integers(1, 64, size).tolist() for size in (11, 2, 20, 9)]
    with torch.no_grad():
        losses = objective(**packed_batch(documents), per_token=True)[0]
        total = objective(**packed_batch(documents))["loss"]
        start = 0
        for index, tokens in enumerate(documents):
            end = start + len(tokens)
            ids = torch.tensor([tokens])
            logits = objective.model(input_ids=ids, use_cache=False).logits[0, :-1]
            alone = cross_entropy(logits, ids[0, 1:], reduction="none")
            torch.testing.assert_close(losses[start : end - 1], alone, atol=1e-5, rtol=1e-5)
            assert losses[end - 1] == 0
            changed = [
                [t % 63 + 1 for t in d] if i == index else d for i, d in enumerate(documents)
            ]
            other = objective(**packed_batch(changed), per_token=True)[0]
            assert not torch.equal(other[start:end], losses[start:end])
            assert torch.equal(other[:start], losses[:start])
            assert torch.equal(other[end:], losses[end:])
            start = end
    assert total.item() == pytest.approx(losses.sum().item(), rel=1e-6)
    assert not losses[start:].any()  # padding


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi"])  # not tied, tied, with a bias
def test_loss_and_gradients_are_those_of_the_logits_of_the_model(model_type, monkeypatch):
    monkeypatch.setattr(divergences, "CHUNK_ELEMENTS", 64 * 5)
    model = tiny_model(model_type)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.5)
    batch = packed_batch([[5, 6, 7, 8, 9], list(range(20, 60)), [9, 8, 7]])
    value = NextTokenLoss(model)(**batch)["loss"]
    places = batch["position_ids"]
    logits = model(batch["input_ids"], position_ids=places, use_cache=False).logits
    expected = cross_entropy(logits[0], batch["shift_labels"][0], reduction="sum")
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(x, parameters) for x in (value, expected))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"model_type": "mamba"}, "mamba cannot keep packed documents apart: it is recurrent, or"),
        ({"model_type": "bloom"}, "bloom cannot keep packed documents apart: it is recurrent, or"),
        ({"model_type": "jamba"}, "jamba cannot keep packed documents apart: it is recurrent, or"),
        # they take position_ids, and build their masks without
        ({"model_type": "falcon"}, "documents in one row see each other: it cannot train on"),
        ({"model_type": "gpt_oss"}, "documents in one row see each other: it cannot train on"),
        ({"model_type": "opt"}, "documents in one row see each other: it cannot train on"),
        ({"model_type": "opt"}, "cannot train on packed rows: set packing: false"),
        # in a new model as small as this, it would hardly show
        ({"model_type": "opt", "init_std": 1e-6}, "documents in one row see each other"),
        ({"model_type": "bert"}, "the tokens of bert see those .* set model.is_decoder: true"),
        ({"model_type": "roberta", "is_decoder": True}, "documents in one row see each other"),
        (
            {"model_type": "xlnet", "d_head": 8, "packing": False},
            "the tokens of xlnet see those that they are to predict",
        ),
        (
            {
                "model_type": "bamba",
                "mamba_n_heads": 8,
                "mamba_d_head": 8,
                "z_loss_coefficient": 0.1,
                "packing": False,
            },
            "bamba adds .* to its own loss, .* left out: set z_loss_coefficient to 0 in its config",
        ),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_models_that_would_be_trained_wrongly_are_refused(model, message, pretrain):
    known = AutoConfig.for_model(model["model_type"])
    accepted = known.to_dict().keys() | known.attribute_map.keys()
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "intermediate_size": 64,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "num_local_experts": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "max_position_embeddings": 64,
    }
    packing = model.get("packing", True)
    model = {name: value for name, value in model.items() if name != "packing"}
    model = {name: value for name, value in small.items() if name in accepted} | model
    ended = pretrain(model=model, max_steps=1, packing=packing)
    assert ended.status == 2
    assert re.search(message, ended.error), ended.error
    assert ended.error.count("\n") == 1
    assert not ended.folder.exists()


@pytest.mark.parametrize("model_type", ["opt", "bloom"])
def test_documents_in_rows_of_their_own(model_type, pretrain, tokenizer, corpus_folder):
    """For architectures that cannot keep packed ones apart; the numbers are the model's own."""
    config = tiny_config(model_type, vocab_size=512)
    model = config.to_diff_dict() | {"model_type": model_type}
    model = {k: v for k, v in model.items() if not k.endswith("token_id")}
    validation = [{"path": str(corpus_folder / "validation.jsonl")}]
    settings = {
        "model": model,
        "packing": False,
        "validation_sources": validation,
        "eval_documents": 7,
        "save_steps": 2,
        "keep_last": 9,
        "sequence_length": 24,
    }
    whole = pretrain("whole", max_steps=4, **settings)
    assert whole.status == 0, whole.error
    cut = pretrain("cut", max_steps=2, **settings)
    again = pretrain("cut", max_steps=4, **settings)
    assert again.status == 0, again.error
    assert [s["loss"] for s in steps(cut.folder)] == [s["loss"] for s in steps(whole.folder)]
    refused = pretrain("cut", max_steps=5, **{**settings, "packing": True})
    assert refused.status == 2
    # the last evaluation, document by document and piece by piece
    trained = AutoModelForCausalLM.from_pretrained(whole.folder / "model").eval()
    lines = (corpus_folder / "validation.jsonl").read_text().splitlines()[:7]
    texts = [json.loads(line)["text"] for line in lines]
    loss = count = 0
    for tokens in DocumentEncoder(tokenizer)(texts):
        for start in range(0, len(tokens), 24):
            piece = torch.from_numpy(tokens[start : start + 25]).long()
            logits = trained(piece[None, :24], use_cache=False).logits[0, : len(piece) - 1]
            if len(piece) > 1:
                loss += cross_entropy(logits, piece[1:], reduction="sum").item()
                count += len(piece) - 1
    evaluated = [line for line in metrics(whole.folder) if "eval_loss" in line][-1]
    assert evaluated["eval_tokens"] == count
    assert evaluated["eval_loss"] == pytest.approx(loss / count, rel=1e-5)


def test_the_router_loss_is_logged_beside_the_cross_entropy(pretrain):
    """And it is the same for every split into micro-batches that see the same tokens."""
    model = {
        **TINY_RUN["model"],
        "model_type": "mixtral",
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.5,
    }
    on = steps(pretrain("on", model=model, max_steps=3).folder)
    off = steps(pretrain("off", model=model | {"router_aux_loss_coef": 0.0}, max_steps=3).folder)
    for record in on:
        assert record["loss"] == pytest.approx(record["cross_entropy"] + record["router_aux_loss"])
        assert 0.9 < record["router_aux_loss"] < 2  # 0.5 x top 2 of balanced experts
    assert on[0]["cross_entropy"] == pytest.approx(off[0]["loss"], rel=1e-6)
    assert on[2]["cross_entropy"] != off[2]["loss"]
    assert "cross_entropy" not in off[0]


# bad input: one message, status 2, and nothing is written

BAD_SETTINGS = [
    ({"lerning_rate": 1}, "unknown key 'lerning_rate': the nearest valid one is 'learning_rate'"),
    ({"train_sources.0.pat": "x"}, "unknown key .*pat': the nearest valid one is .*path'"),
    ({"model.hidden_siz": 3}, "llama has no setting 'hidden_siz': .* valid one is 'hidden_size'"),
    ({"model.model_type": "lama"}, "model: Unrecognized model identifier: lama"),
    ({"model.hidden_size": "big"}, "model: .*hidden_size' expected int, got str"),
    ({"model.hidden_size": 31}, r"model: .*hidden size \(31\) is not a multiple of .* heads"),
    ({"model.num_key_value_heads": 4}, "num_key_value_heads: 4 does not divide the 2 heads"),
    ({"model.num_attention_heads": 0}, "model.num_attention_heads: 0 is less than 1"),
    ({"model.hidden_act": "silux"}, "no llama can be built: model.hidden_act: there is no 'silux'"),
    ({"model.pad_token_id": 9999}, "no llama can be built: .*Padding_idx must be within"),
    ({"model.rope_parameters": {"rope_type": "no"}}, "no llama can be built: KeyError: 'no'"),
    (
        {"model": {"model_type": "gpt2", "n_embd": 30, "n_head": 4}},
        "no gpt2 can be built: .*`embed_dim` must be divisible by num_heads",
    ),
    (
        {"model": {"model_type": "gpt2", "n_head": 3, "n_embd": 32}},
        "no gpt2 can be built: .*`embed_dim` must be divisible by num_heads",
    ),
    (
        {
            "model": {
                "model_type": "qwen2",
                "hidden_size": 30,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
            }
        },
        r"qwen2 cannot compute its own loss \(RuntimeError: ",
    ),
    (
        {"model": {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 4}},
        "model.num_experts_per_tok: 4 is more than the 2 of num_local_experts",
    ),
    (
        {"model": {"model_type": "deepseek_v3", "n_routed_experts": 2, "num_experts_per_tok": 4}},
        "model.num_experts_per_tok: 4 is more than the 2 of n_routed_experts",
    ),
    ({"model": {"model_type": "llama", "bogus": 1}}, "llama has no setting 'bogus': the nearest"),
    (
        {"model": {"model_type": "mpt", "max_seq_len": 16}},
        "sequence_length: 32 is more than the model's max_seq_len of 16",
    ),
    ({"attn_implementation": "flex_attention"}, "flex_attention trains on GPUs alone: set sdpa"),
    ({"max_steps": "many"}, "--max_steps: max_steps must be a whole number, not 'many'"),
    ({"max_steps": 2.5}, "--max_steps: max_steps must be a whole number, not 2.5"),
    ({"resume": "always"}, '--resume: resume must be "auto" or "never", not \'always\''),
    ({"logging_steps": 0}, "logging_steps must be at least 1, not 0"),
    ({"eval_steps": 0}, "eval_steps must be at least 1, not 0"),
    ({"eval_documents": 0}, "eval_documents must be at least 1, not 0"),
    ({"train_sources": []}, "no sources: give at least one path"),
    ({"train_sources": [{"path": "no/such.jsonl"}]}, "source 'no/such.jsonl': no file matches"),
    ({"train_sources": [{"path": "EMPTY"}]}, r"source '.*empty.jsonl' is empty: no document in"),
    (
        {"train_sources": [{"path": "CORPUS", "text_field": "body"}]},
        r"train-0.jsonl, line 1: no field 'body' \(it has: text, meta\)",
    ),
    (
        {"train_sources": [{"path": "CORPUS", "weight": 0}]},
        r"the weights of the sources must be positive \(.*: 0\)",
    ),
    (
        {"train_sources": [{"path": "CORPUS", "weight": -1}]},
        r"the weights of the sources must be positive \(.*: -1\)",
    ),
    ({"validation_sources": [{"path": "EMPTY"}]}, "empty.jsonl' is empty: no document"),
    (
        {"per_device_batch_size": 3},
        "global_batch_size: 16 is not divisible by 1 processes x per_device_batch_size 3",
    ),
    (
        {"lanes": 6},
        "lanes: 6 do not fit: global_batch_size 16 must be a multiple of lanes",
    ),
    (
        {"model.vocab_size": 100},
        "model.vocab_size: 100 is less than the tokenizer's 512 tokens",
    ),
    ({"tokenizer": "/no/such/tokenizer"}, "tokenizer: cannot load /no/such/tokenizer: "),
    ({"tokenizer": "null"}, "tokenizer: give a folder or Hub name"),
    ({"model_name_or_path": "/no/such/model"}, "model_name_or_path: .*/no/such/model: there is no"),
    (
        {"sequence_length": 65},
        "sequence_length: 65 is more than the model's max_position_embeddings of 64",
    ),
    ({"output_dir": "FILE"}, "output_dir: .*/file is a file, not a folder"),
    ({"output_dir": "FILE/run"}, "output_dir: .*/file is a file, not a folder"),
    (
        {"lr_scheduler_type": "cosine"},
        "lr_scheduler_type: cosine needs max_steps, max_tokens, max_hours or num_train_epochs",
    ),
    (
        {"lr_scheduler_type": "warmup_stable_decay", "max_hours": 1},
        "lr_scheduler_type: warmup_stable_decay needs max_steps, max_tokens or num_train_epochs",
    ),
    ({"num_train_epochs": 0}, "num_train_epochs must be more than 0, not 0"),
    ({"num_train_epochs": 1.5}, "num_train_epochs: a stream has whole ones, not 1.5"),
    ({"num_train_epochs": 1, "warmup_steps": 999}, "warmup_steps: 999 is more than the run's"),
    (
        {"max_steps": 9, "warmup_steps": 10},
        "warmup_steps: 10 is more than the run's 9 steps",
    ),
    (
        {"max_steps": 9, "lr_scheduler_type": "warmup_stable_decay"},
        "lr_scheduler_kwargs: .*num_decay_steps",
    ),
    (
        {"metric_for_best_model": "bits_per_bite", "validation_sources": [{"path": "CORPUS"}]},
        "metric_for_best_model: eval_bits_per_bite is not measured; these are: eval_loss, "
        "eval_bits_per_byte$",
    ),
    ({"report_to": ["paper"]}, "report_to: no tracker 'paper': give all, none, or of"),
    ({"attn_implementation": "magic"}, 'model: .*attn_implementation="magic"` is not supported'),
    ({"dataloader_num_workers": 9}, "dataloader_num_workers: 9 is more than a rank's 8 lanes"),
    ({"warm_start": "/no/such/checkpoint"}, "no checkpoint /no/such/checkpoint"),
]


@pytest.mark.parametrize(
    ("settings", "message"), BAD_SETTINGS, ids=[str(settings) for settings, _ in BAD_SETTINGS]
)
def test_bad_settings(settings, message, pretrain, corpus_folder, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": "  "}\n\n')
    (tmp_path / "file").write_text("kept")
    places = {
        "CORPUS": str(corpus_folder / "train-0.jsonl"),
        "EMPTY": str(tmp_path / "empty.jsonl"),
        "FILE": str(tmp_path / "file"),
    }
    text = json.dumps(settings)
    for word, place in places.items():
        text = text.replace(word, place)
    ended = pretrain(**json.loads(text))
    assert ended.status == 2
    assert ended.error.startswith("error: ")
    assert ended.error.count("\n") == 1
    assert re.search(message, ended.error), ended.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "file"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "qwen3_moe", "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1},
        {"rope_theta": 5e5, "torch_dtype": "float32", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "qwen2", "head_dim": 8, "use_sliding_window": False},
    ],
    ids=str,
)
def test_what_published_configs_hold_may_be_set(settings, pretrain):
    small = {name: value for name, value in TINY_RUN["model"].items() if name not in settings}
    ended = pretrain(model={**small, "num_key_value_heads": 2, **settings}, max_steps=1)
    assert ended.status == 0, ended.error
    config = AutoConfig.from_pretrained(ended.folder / "model")
    assert getattr(config, "head_dim", None) == settings.get("head_dim", 16)
    assert config.rope_parameters["rope_theta"] in (settings.get("rope_theta"), 10_000.0)


def test_bad_config_files(pretrain, tmp_path):
    ended = pretrain(config=tmp_path / "none.yaml")
    assert ended.error == (
        f"error: cannot read the config {tmp_path}/none.yaml: No such file or directory\n"
    )
    file = tmp_path / "some.yaml"
    file.write_text("# a comment\nmax_step: 3\n")
    ended = pretrain(config=file)
    assert ended.status == 2
    assert ended.error == (
        f"error: {file}, line 2: unknown key 'max_step': the nearest valid one is 'max_steps'\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["some.yaml"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write in")
def test_an_output_dir_that_cannot_be_written(pretrain):
    ended = pretrain(output_dir="/proc/run")
    assert ended.status == 2
    assert re.fullmatch(r"error: output_dir: cannot write in /proc: [\w ]+\n", ended.error)


def test_the_test_is_of_the_best_weights_where_they_are_exported(pretrain, corpus_folder):
    held_out = [{"path": str(corpus_folder / "validation.jsonl")}]
    settings = {"validation_sources": held_out, "test_sources": held_out, "eval_documents": 10}
    # the loss falls: by what is asked for here the first weights are the best
    best = {"load_best_model_at_end": True, "greater_is_better": True}
    ended = pretrain(**settings, **best, eval_steps=1, max_steps=3)
    assert ended.status == 0, ended.error
    losses = [record["eval_loss"] for record in metrics(ended.folder) if "eval_loss" in record]
    assert losses[-1] < losses[0] == max(losses)
    assert metrics(ended.folder)[-1]["test_loss"] == pytest.approx(losses[0], rel=1e-6)
