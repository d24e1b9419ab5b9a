"""The BERT recipe: transformers' own losses, packed rows equal to padded ones, what it exports."""

import json
import math
import re
import shutil
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    pipeline,
)

import masked_loss
from conftest import make_prose, write_jsonl
from example_rows import features, fit
from launching import checkpoints, metrics, state, steps
from masked_loss import MaskedLoss
from masking import ExampleMaker, MaskingArguments
from recipes.bert import pretrain as bert
from sentence_encoder import SentenceEncoder
from utils.loss import IGNORE_INDEX, LossArguments
from utils.stream import collate

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 72,
    "pad_token_id": 0,
}
MODELS = {
    "bert": "mlm_nsp",
    "albert": "mlm_sop",
    "roberta": "mlm",
    "modernbert": "mlm",
    "electra": "mlm",
    "distilbert": "mlm",
}
OF_MODEL = {
    "albert": {"embedding_size": 16},
    "modernbert": {
        "local_attention": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1),
    },
}


def build(model_type, attention="sdpa"):
    objective = MODELS[model_type]
    config = AutoConfig.for_model(model_type, **SMALL, **OF_MODEL.get(model_type, {}))
    auto_model = AutoModelForMaskedLM if objective == "mlm" else AutoModelForPreTraining
    torch.manual_seed(0)
    model = auto_model.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases, too, are to have an effect
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def examples(wordpiece):
    """examples(objective): of 40 documents, none longer than 64 tokens."""
    texts = [document["text"] for document in make_prose("document", 40)]
    sentences = SentenceEncoder(wordpiece)(texts)

    def make(objective, count=None):
        maker = ExampleMaker(wordpiece, MaskingArguments(objective=objective))
        return list(islice(maker(sentences, range(40), 64, 0, "test"), count))

    return make


def batch_of(examples, packing, length=64):
    return collate([features(group, length) for group in fit(examples, length, packing)])


def gradients(model, loss):
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: g for n, g in zip(parameters, found, strict=True) if g is not None and g.norm() > 0}


def assert_same_gradients(found, expected, tolerance):
    assert found.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        # keys' biases have no gradient but rounding
        bound = tolerance * max(gradient.norm(), 1e-3 * largest)
        assert (found[name] - gradient).norm() <= bound, name


def test_the_loss_is_that_of_transformers(examples):
    model = build("bert")
    objective = MaskedLoss(model, "mlm_nsp", packing=False)
    batch = batch_of([e for e in examples("mlm_nsp") if e.pair_label >= 0], packing=False)
    sums, counts = objective(**batch), objective.counts(batch)
    loss = sum(sums[name] / counts[name] for name in objective.names)
    found = gradients(model, loss)
    model.base_model._forward_hooks.clear()
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=(batch["sequence_ids"] > 0).long(),
        token_type_ids=batch["token_type_ids"],
        labels=batch["labels"],
        next_sentence_label=batch["pair_labels"][:, 0],
    )
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-6)
    assert_same_gradients(found, gradients(model, output.loss), 1e-5)


def test_what_is_added_to_the_loss_is_added_to_that_of_tokens_in_training_alone(examples):
    model, batch = build("bert"), batch_of(examples("mlm_nsp"), packing=True)
    added = LossArguments(label_smoothing_factor=0.2, z_loss=0.05)
    objective = MaskedLoss(model, "mlm_nsp", packing=True, added=added).eval()
    plain, targets = objective(**batch), (batch["labels"].flatten() != IGNORE_INDEX).nonzero()
    logits = objective.output(batch, targets.squeeze(1))[0].double().squeeze(0)
    log_p = logits.log_softmax(1)
    right = -log_p.gather(1, batch["labels"].flatten()[targets]).sum()
    assert plain["mlm_loss"].item() == pytest.approx(right.item(), rel=1e-6)
    expected = 0.8 * right - 0.2 * log_p.mean(1).sum()
    expected += 0.05 * logits.logsumexp(1).square().sum()
    objective.training = True  # and no dropout
    found = objective(**batch)
    assert found["mlm_loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert found["nsp_loss"] == plain["nsp_loss"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", MODELS)
def test_packed_rows_give_the_numbers_of_padded_ones(model_type, attention, examples):
    model = build(model_type, attention)
    objective = MaskedLoss(model, MODELS[model_type], packing=True)
    made = examples(MODELS[model_type])
    packed, padded = batch_of(made, True), batch_of(made, False)
    assert len(packed["input_ids"]) < 0.8 * len(padded["input_ids"])
    assert objective.counts(packed) == objective.counts(padded)
    sums = objective(**packed)
    found = gradients(model, sum(sums.values()))
    objective.packing = False
    expected = objective(**padded)
    for name in objective.names:
        assert sums[name].item() == pytest.approx(expected[name].item(), rel=1e-5)
    assert_same_gradients(found, gradients(model, sum(expected.values())), 1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", MODELS)
def test_a_changed_sequence_leaves_its_neighbours_untouched(model_type, attention, examples):
    objective = MaskedLoss(build(model_type, attention), MODELS[model_type], packing=True)
    rows = fit(examples(MODELS[model_type]), 64)
    row = max(rows, key=len)
    assert len(row) >= 3
    batch = collate([features(row, 64)])
    sequence, tokens = batch["sequence_ids"], batch["input_ids"]
    is_first = (batch["position_ids"] == 0) & (sequence > 0)
    batch["labels"] = torch.where(sequence > 0, tokens, IGNORE_INDEX)
    batch["pair_labels"] = torch.where(is_first, 1, IGNORE_INDEX)
    of_target, of_pair = sequence[sequence > 0], sequence[is_first]
    changed = {**batch, "input_ids": torch.where(sequence == 2, tokens + 1, tokens) % 300}
    with torch.no_grad():
        before, after = objective(**batch, per_target=True), objective(**changed, per_target=True)
    for term, of in zip(before, (of_target, of_pair), strict=False):
        difference = (before[term][0] - after[term][0]).abs()
        assert difference[of == 2].max() > 1e-3
        assert difference[of != 2].max() < 1e-6


def test_rows_without_any_target_count_nothing(examples):
    objective = MaskedLoss(build("bert"), "mlm_nsp", packing=True)
    batch = collate([features([], 64)])
    sums = objective(**batch)
    assert [value.item() for value in sums.values()] == [0, 0]
    assert objective.counts(batch) == {"mlm_loss": 0, "nsp_loss": 0}
    sum(sums.values()).backward()
    assert all(p.grad is None or not p.grad.any() for p in objective.parameters())


# runs


PHASES = {
    "phases": [
        {"sequence_length": 32, "steps": 60},
        {"sequence_length": 64, "steps": 20, "per_device_batch_size": 2},
    ],
    "sequence_length": 64,
    "max_steps": 80,
    "learning_rate": 1e-2,
    "warmup_steps": 10,
    "lr_scheduler_type": "linear",
    "save_steps": 15,
    "eval_steps": 40,
    "keep_last": 9,
}


def validation(prose_folder):
    path = str(prose_folder / "validation.jsonl")
    return [{"path": path, "domain_field": "meta.redpajama_set_name"}]


def test_a_run_in_phases_learns_and_resumes(pretrain_bert, prose_folder, tmp_path):
    settings = {**PHASES, "validation_sources": validation(prose_folder)}
    ended = pretrain_bert("whole", **settings)
    assert ended.status == 0, ended.error
    records = steps(ended.folder)
    # 16 rows a step, nearly full
    tokens = np.diff([0, *(record["tokens"] for record in records)])
    for length, of_phase in ((32, tokens[:60]), (64, tokens[60:])):
        assert (of_phase <= 16 * length).all()
        assert of_phase.mean() > 0.9 * 16 * length
    for step, record in enumerate(records):
        assert record["loss"] == pytest.approx(record["mlm_loss"] + record["nsp_loss"])
        # one schedule over the phases
        rate = 1e-2 * (step / 10 if step < 10 else (80 - step) / 70)
        assert record["learning_rate"] == pytest.approx(rate)
    first, last = (np.mean([r["mlm_loss"] for r in part]) for part in (records[:5], records[-5:]))
    assert last < first - 0.5
    evaluations = [r for r in metrics(ended.folder) if "eval_loss" in r]
    assert [r["step"] for r in evaluations] == [40, 80]
    assert {*evaluations[0]["eval_mlm_loss_by_domain"]} == {"Book", "Code", "Web"}
    counts = [r["sequence_counts"] for r in metrics(ended.folder) if "sequence_counts" in r][-1]
    assert 0 < counts["pairs"] < counts["sequences"]
    assert min(counts[key] for key in ("documents", "tokens_borrowed", "tokens_cut")) > 0

    assert f"tokens cut: {counts['tokens_cut']:,}" in ended.output

    found = checkpoints(ended.folder)
    assert [int(folder.name[5:]) for folder in found] == [15, 30, 40, 45, 60, 75, 80]
    for folder in (found[0], found[4], found[5]):  # in the first phase, between, in the second
        copy = tmp_path / f"from-{folder.name}"
        shutil.copytree(folder, copy / "checkpoints" / folder.name)
        size = state(folder)["counters"]["metrics_size"]
        seen = (ended.folder / "metrics.jsonl").read_bytes()[:size]
        (copy / "metrics.jsonl").write_bytes(seen)
        resumed = pretrain_bert(copy.name, **settings)
        assert resumed.status == 0, resumed.error
        assert f"continuing {copy / 'checkpoints' / folder.name}" in resumed.output
        assert metrics(copy) == metrics(ended.folder)
        weights = [f / "model" / "model.safetensors" for f in (copy, ended.folder)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_must_not_change_is_refused(pretrain_bert):
    settings = {**PHASES, "eval_steps": 99}
    pretrain_bert(**settings, max_hours=1e-9)
    longer = [*PHASES["phases"][:1], {**PHASES["phases"][1], "steps": 30}]
    for changes, message in (
        ({"mlm_probability": 0.3}, "mlm_probability was 0.15 and is 0.3"),
        ({"objective": "mlm_sop"}, "objective was mlm_nsp and is mlm_sop"),
        ({"packing": False}, "packing was True and is False"),
        ({"phases": PHASES["phases"][::-1]}, "phases: the lengths"),
        ({"seed": 7}, "seed was 0 and is 7"),
    ):
        refused = pretrain_bert(**{**settings, **changes})
        assert refused.status == 2
        assert message in refused.error
    # micro-batches of another size, and a longer last phase, go on
    longer[0] = {**longer[0], "per_device_batch_size": 8}
    ended = pretrain_bert(**{**settings, "phases": longer, "max_steps": 90, "max_hours": 2e-9})
    assert ended.status == 0, ended.error


@pytest.mark.parametrize("model_type", ["bert", "albert", "roberta", "modernbert"])
def test_the_export_loads_everywhere(model_type, pretrain_bert, wordpiece):
    model = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"model_type": model_type}
    model |= {k: v for k, v in OF_MODEL.get(model_type, {}).items() if "token" not in k}
    settings = {"objective": MODELS[model_type], "max_steps": 4, "sequence_length": 64}
    ended = pretrain_bert(model=model, **settings)
    assert ended.status == 0, ended.error
    folder = ended.folder / "model"
    trained = AutoModelForMaskedLM.from_pretrained(folder).eval()
    batch = wordpiece(f"to ka {wordpiece.mask_token} mi.", return_tensors="pt")
    with torch.no_grad():
        logits = trained(**batch).logits
        if model_type != "modernbert":  # which has no such class
            output = AutoModelForPreTraining.from_pretrained(folder).eval()(**batch)
            other = output.get("prediction_logits", output.get("logits"))
            torch.testing.assert_close(other, logits)
        hidden = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
        torch.testing.assert_close(hidden, trained.base_model(**batch).last_hidden_state)
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
        assert classifier(**batch).logits.shape == (1, 3)
    fill = pipeline("fill-mask", str(folder), top_k=1)
    (best,) = fill(f"to ka {wordpiece.mask_token} mi.")
    place = (batch["input_ids"][0] == wordpiece.mask_token_id).nonzero().item()
    assert best["token"] == logits[0, place].argmax().item()
    assert best["score"] == pytest.approx(logits[0, place].softmax(0).max().item(), rel=1e-5)


def test_weights_go_on_with_another_objective(pretrain_bert):
    """The export is of the class that was trained, not of the one that the weights came from."""
    objectives = ["mlm", "mlm_nsp", "mlm"]
    classes = ["BertForMaskedLM", "BertForPreTraining", "BertForMaskedLM"]
    settings = {}
    for number, (objective, name) in enumerate(zip(objectives, classes, strict=True)):
        ended = pretrain_bert(f"{number}", objective=objective, max_steps=1, **settings)
        assert ended.status == 0, ended.error
        folder = ended.folder / "model"
        assert json.loads((folder / "config.json").read_text())["architectures"] == [name]
        names = load_file(folder / "model.safetensors")
        assert ("cls.seq_relationship.weight" in names) == (objective == "mlm_nsp")
        settings = {"model_name_or_path": str(folder)}


def test_losses_of_one_length_are_not_compared_with_those_of_another(pretrain_bert, prose_folder):
    settings = {**PHASES, "validation_sources": validation(prose_folder), "eval_steps": 5}
    settings |= {"phases": [{**PHASES["phases"][0], "steps": 20}, {**PHASES["phases"][1]}]}
    ended = pretrain_bert(**{**settings, "max_steps": 40, "save_steps": 1, "keep_last": 99})
    assert ended.status == 0, ended.error
    counters = [state(folder)["counters"] for folder in checkpoints(ended.folder)]
    assert [len(c["recent_losses"]) for c in counters][17:23] == [18, 19, 0, 1, 2, 3]
    assert counters[18]["best_metric"] > 0
    assert counters[19]["best_metric"] is None


def test_evaluation_and_pseudo_perplexity_are_those_of_a_plain_loop(
    pretrain_bert, prose_folder, wordpiece
):
    ended = pretrain_bert(
        max_steps=3,
        sequence_length=32,
        test_sources=validation(prose_folder),
        pseudo_perplexity_documents=2,
    )
    assert ended.status == 0, ended.error
    model = AutoModelForMaskedLM.from_pretrained(ended.folder / "model").eval()
    counts, losses = Counter(), []
    for line in (prose_folder / "validation.jsonl").read_text().splitlines():
        record = json.loads(line)
        domain = record["meta"]["redpajama_set_name"]
        counts[domain] += 1
        if counts[domain] > 2:
            continue
        tokens = wordpiece(record["text"], truncation=True, max_length=32, return_tensors="pt")
        ids = tokens.input_ids[0]
        for place in range(1, len(ids) - 1):
            masked = ids.clone()
            masked[place] = wordpiece.mask_token_id
            with torch.no_grad():
                logits = model(masked[None]).logits[0, place]
            losses.append(-logits.log_softmax(0)[ids[place]].item())
    expected = math.exp(np.mean(losses))
    (shown,) = re.findall(r"pseudo perplexity of the test documents: ([\d.]+)", ended.output)
    assert float(shown) == pytest.approx(expected, rel=1e-4)
    (record,) = (r for r in metrics(ended.folder) if "test_loss" in r)
    assert record["test_pseudo_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert {*record["test_pseudo_perplexity_by_domain"]} == {"Book", "Code", "Web"}
    assert 0 <= record["test_nsp_accuracy_by_domain"]["Code"] <= 1


REFUSED = [
    ({"objective": "mlm_nsp", "model": {"model_type": "roberta"}}, "roberta has no head for pairs"),
    (
        {"objective": "mlm", "model": {"model_type": "deberta-v2"}},
        "deberta-v2 cannot be trained on packed rows",
    ),
    ({"model": {"model_type": "llama"}}, "Unrecognized configuration class|no model"),
    (
        {"phases": [{"sequence_length": 32, "steps": 3}], "max_steps": 4},
        "phases: 3 steps do not add up to max_steps 4",
    ),
    (
        {"phases": [{"sequence_length": 32, "steps": 3}]},
        "phases: 3 steps do not add up to max_steps None",
    ),
    (
        {
            "phases": [{"sequence_length": 64, "steps": 2}, {"sequence_length": 32, "steps": 2}],
            "max_steps": 4,
        },
        r"phases: the lengths \[64, 32\] must not become shorter",
    ),
    (
        {
            "phases": [{"sequence_length": 32, "steps": 4, "per_device_batch_size": 3}],
            "max_steps": 4,
        },
        "global_batch_size: 16 is not divisible by 1 processes x per_device_batch_size 3",
    ),
    (
        {**PHASES, "sequence_length": 48},
        "sequence_length: 48 is not the 64 of the last of the phases: leave it out",
    ),
    ({"sequence_length": 7}, "sequence_length: 7 is too short for a pair: at least 8"),
    (
        {"sequence_length": 7, "objective": "mlm"},
        "sequence_length: 7 is too short for a sequence: at least 8",
    ),
    ({"sequence_length": 65}, "65 is more than the model's max_position_embeddings of 64"),
    (
        {"sequence_length": 64, "objective": "mlm", "model.model_type": "roberta"},
        "sequence_length: 64 and the model's first position 1 are more than",
    ),
    ({"pseudo_perplexity_documents": 2}, "pseudo_perplexity_documents: give test_sources"),
    (
        {"attn_implementation": "flash_attention_2"},
        "attn_implementation: flash_attention_2 takes no mask of packed rows: set sdpa",
    ),
    (
        {"phases": [{"sequence_length": 32, "steps": 0}], "max_steps": 0},
        "phases: steps must be at least 1, not 0",
    ),
    ({"train_sources": [{"path": "TOKENLESS"}], "objective": "mlm"}, "hold nothing that the token"),
    ({"mlm_probability": 0}, "mlm_probability: 0 leaves nothing to learn"),
    ({"mlm_probability": 1.5}, "mlm_probability must lie between 0 and 1, not 1.5"),
    ({"mask_replace_prob": 0.95}, "shares of the masked tokens: 0.95 and 0.1 are not"),
    ({"tokenizer": "BPE"}, "has no mask_token, which masked language modelling needs"),
    ({"train_sources": [{"path": "ONE"}]}, "holds only one: set objective: mlm"),
    (
        {"train_sources": [{"path": "SINGLE"}]},
        "mlm_nsp needs documents of two sentences or more; the first 30 of .* have one at most",
    ),
    ({"train_sources": [{"path": "BLANK"}]}, "is empty: no document in"),
    (
        {
            "objective": "mlm",
            "validation_sources": [{"path": "ONE"}],
            "metric_for_best_model": "nsp_accuracy",
        },
        "eval_nsp_accuracy is not measured; these are: eval_loss, eval_mlm_loss, eval_mlm_accuracy",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[str(s) for s, _ in REFUSED])
def test_bad_input(settings, message, pretrain_bert, tokenizer_folder, tmp_path):
    write_jsonl(tmp_path / "one.jsonl", make_prose("one", 1, seed=4))
    write_jsonl(tmp_path / "single.jsonl", [{"text": f"Only one {i}"} for i in range(30)])
    write_jsonl(tmp_path / "tokenless.jsonl", [{"text": "\u200b"}] * 3)
    write_jsonl(tmp_path / "blank.jsonl", [{"text": ""}, {"text": " \n\t"}])
    places = {
        "BPE": str(tokenizer_folder),
        "ONE": str(tmp_path / "one.jsonl"),
        "SINGLE": str(tmp_path / "single.jsonl"),
        "TOKENLESS": str(tmp_path / "tokenless.jsonl"),
        "BLANK": str(tmp_path / "blank.jsonl"),
    }
    text = json.dumps(settings)
    for word, place in places.items():
        text = text.replace(word, place)
    settings = json.loads(text)
    if "model" in settings:
        small = {k: v for k, v in SMALL.items() if k not in ("vocab_size", "pad_token_id")}
        settings["model"] = small | settings["model"]
    ended = pretrain_bert(**{"max_steps": 4, **settings} if "phases" not in settings else settings)
    assert ended.status == 2
    assert ended.error.startswith("error: ")
    assert ended.error.count("\n") == 1
    assert re.search(message, ended.error), ended.error
    assert not ended.folder.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "mlm_nsp", "model": {"model_type": "roberta"}}, "roberta has no head for"),
        (
            {"objective": "mlm", "model": {"model_type": "roberta"}, "sequence_length": 72},
            "sequence_length: 72 and the model's first position 1 are more than",
        ),
        ({"objective": "mlm", "model": {"model_type": "llama"}}, "no model for MaskedLM of type"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(settings, message, pretrain_bert):
    ended = pretrain_bert(dry_run=True, **settings | {"model": SMALL | settings["model"]})
    assert ended.status == 2
    assert ended.error.startswith("error: ")
    assert message in ended.error


def test_rows_of_every_phase_are_packed_on_trial(pretrain_bert, monkeypatch):
    """A model that keeps sequences apart in short rows alone is refused before the first step."""
    block_diagonal_mask = masked_loss.block_diagonal_mask

    def mask_of_short_rows(sequence_ids, *rest):
        mask = block_diagonal_mask(sequence_ids, *rest)
        return mask if sequence_ids.shape[1] <= 32 else torch.zeros_like(mask)

    monkeypatch.setattr(masked_loss, "block_diagonal_mask", mask_of_short_rows)
    assert pretrain_bert("short", max_steps=1).status == 0
    ended = pretrain_bert("phases", **PHASES)
    assert ended.status == 2
    assert "documents in one row see each other" in ended.error
    assert not ended.folder.exists()


@pytest.mark.parametrize("objective", ["mlm", "mlm_nsp"])
def test_documents_that_give_no_pair_are_counted_and_learnt_from(
    objective, pretrain_bert, tmp_path
):
    documents = [
        *make_prose("some", 30),
        *({"text": f"Only one sentence, number {i}"} for i in range(20)),
        {"text": "   "},
    ]
    write_jsonl(tmp_path / "data.jsonl", documents)
    source = {"path": str(tmp_path / "data.jsonl"), "epochs": 1}
    settings = {"train_sources": [source], "max_steps": 10**4, "lanes": 1}
    ended = pretrain_bert(objective=objective, **settings)
    assert ended.status == 0, ended.error
    assert "the data is spent" in ended.output
    counts = [r["sequence_counts"] for r in metrics(ended.folder) if "sequence_counts" in r][-1]
    if objective == "mlm":
        assert counts["pairs"] == counts["tokens_cut"] == counts["tokens_borrowed"] == 0
    else:
        one_sentence = sum(record["text"].count(".") < 2 for record in documents[:50])
        assert counts["documents"] == 50
        assert counts["documents_without_pair"] == one_sentence >= 20


def test_deberta_trains_on_padded_rows(pretrain_bert):
    model = {**SMALL, "model_type": "deberta-v2", "relative_attention": True}
    del model["vocab_size"]
    ended = pretrain_bert(
        model=model | {"pos_att_type": ["p2c", "c2p"]}, objective="mlm", packing=False, max_steps=2
    )
    assert ended.status == 0, ended.error
    assert len(steps(ended.folder)) == 2


def test_the_plan_of_bert_base(call, tmp_path):
    config = "recipes/bert/configs/pretrain_base_slimpajama.yaml"
    ended = call(bert.main, [config, "--dry_run", "true"], tmp_path)
    assert ended.status == 0, ended.error
    assert "bert, 110,106,428 parameters" in ended.output
    for line in ("256 sequences x 128 = 32,768 tokens", "256 sequences x 512 = 131,072 tokens"):
        assert line in ended.output
