"""Distillation of classifiers: what is learnt from a teacher and from labels, and bad input."""

import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    pipeline,
)

import classification_report
from augmentation import Augmentation, Augmenter
from classification_examples import encode
from comparing import assert_same_losses, assert_tables_are_told_apart
from conftest import WORDS, write_jsonl
from labelled_texts import LabelledText
from launching import checkpoints, command_line, metrics, predictions, run, steps, tables
from recipes.classification import distill
from transfer_examples import TransferExamples
from utils.config import parse, read_yaml
from utils.divergences import Divergence

SCRIPT = "recipes/classification/distill.py"
NAMES = ["web", "code", "prose"]  # in no alphabetical order
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
STUDENT = {"model_type": "bert", "num_hidden_layers": 2} | SIZES
TINY = {
    "model": STUDENT,
    "sequence_length": 32,
    "global_batch_size": 16,
    "per_device_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "report_to": [],
}
MULTI, REGRESSION = "multi_label_classification", "regression"


def rows_of(count, seed, label=lambda name, number: name):
    """Texts of 3 to 30 words, one of which gives the label away."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        index = number % 3
        words = [WORDS[i] for i in draw.integers(len(WORDS), size=draw.integers(3, 30))]
        text = " ".join([*words, 2 * WORDS[index]])
        rows.append({"text": text, "label": label(NAMES[index], number)})
    return rows


def write_parts(folder, label=lambda name, number: name):
    for seed, (part, count) in enumerate({"train": 48, "validation": 15, "test": 15}.items()):
        write_jsonl(folder / f"{part}.jsonl", rows_of(count, seed, label))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("texts"))


def tiny_bert(names, kind=None, seed=1, vocabulary=300, **settings):
    torch.manual_seed(seed)
    labels = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    values = SIZES | {
        "num_hidden_layers": 4,
        "initializer_range": 0.2,
        "vocab_size": vocabulary,
        "problem_type": kind,
    }
    model = BertForSequenceClassification(BertConfig(**values | labels | settings))
    with torch.no_grad():
        model.classifier.weight.normal_()
    return model


@pytest.fixture(scope="module")
def make_teacher(tmp_path_factory, wordpiece_folder):
    """make_teacher(names, kind): the folder of a classifier that has an opinion."""

    def make(names=NAMES, kind=None, model=None, tokenizer=wordpiece_folder):
        folder = tmp_path_factory.mktemp("models") / "teacher"
        (model or tiny_bert(names, kind)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def teacher(make_teacher):
    return make_teacher()


@pytest.fixture
def distil(call, texts, teacher, tmp_path, monkeypatch):
    """distil(name, **settings): the recipe in this process, without its slow plots."""
    monkeypatch.setattr(classification_report, "write_figures", lambda *args: [])

    def start(name="run", data=texts, given=teacher, **settings):
        values = {"output_dir": tmp_path / name, **tables(data), **TINY}
        values |= {"teacher": {"model_name_or_path": str(given)}}
        if "student_layers" in settings:
            values.pop("model", None)
        return call(distill.main, command_line(values | settings), tmp_path / name)

    return start


# --- the loss ---------------------------------------------------------------------------------


def fixed(logits):
    """A model that says the same whatever it reads."""

    class Fixed(torch.nn.Module):
        def forward(self, **inputs):
            return SimpleNamespace(logits=logits)

    return Fixed()


def loss_of(student, teacher, problem_type, **settings):
    values = {"label_smoothing": 0.1, "soft_weight": 1.0, "hard_weight": 0.5, "hidden_weight": 0}
    values |= {"as_divergence": Divergence(), "problem_type": problem_type, "seed": 0}
    weights, layers = settings.pop("label_weights", None), settings.pop("layers", None)
    given = SimpleNamespace(**values | settings)
    return distill.DistillationLoss(student, teacher, given, weights, layers)


ROWS, LABELS = 7, 3


def batch_of(labels):
    """The last row is none; the two before it have no label."""
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 0.0, 0.0])
    row_weights = torch.tensor([1.0] * 6 + [0.0])
    inputs = {"input_ids": torch.ones(ROWS, 2), "attention_mask": torch.ones(ROWS, 2)}
    return {"labels": labels, "weights": weights, "row_weights": row_weights, **inputs}


def divergence_of(z, t, kind, temperature):
    """Of each row, in float64."""
    p, q = ((x.double() / temperature).log_softmax(-1) for x in (z, t))
    if kind == "jsd":
        m = ((p.exp() + q.exp()) / 2).log()
        parts = [kl_div(m, x, log_target=True, reduction="none").sum(-1) for x in (p, q)]
        return temperature**2 * sum(parts) / 2
    first, second = (q, p) if kind == "reverse_kl" else (p, q)
    return temperature**2 * kl_div(first, second, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_loss_of_one_label_is_the_dense_one(kind, temperature):
    z, t = (3 * torch.randn(ROWS, LABELS) for _ in range(2))
    batch = batch_of(torch.arange(ROWS) % LABELS)
    given, weights = Divergence(kind, 0.5, temperature), [1.0, 2.0, 0.5]
    z.requires_grad_()
    objective = loss_of(fixed(z), fixed(t), "single_label_classification", as_divergence=given)
    objective.label_weights = torch.tensor(weights)
    found = objective(**batch)
    wide = z.detach().double().requires_grad_()
    soft = (divergence_of(wide, t, kind, temperature) * batch["row_weights"]).sum()
    hard = cross_entropy(
        wide, batch["labels"], torch.tensor(weights).double(), reduction="none", label_smoothing=0.1
    )
    hard = (hard * batch["weights"]).sum()
    assert found["soft_loss"].item() == pytest.approx(soft.item(), rel=1e-6)
    assert found["hard_loss"].item() == pytest.approx(hard.item(), rel=1e-6)
    (0.7 * found["soft_loss"] + 0.3 * found["hard_loss"]).backward()
    (0.7 * soft + 0.3 * hard).backward()
    torch.testing.assert_close(z.grad.double(), wide.grad, atol=2e-6, rtol=1e-5)
    assert objective.counts(batch) == {"soft_loss": 6, "hard_loss": 6}
    assert objective.weights == {"soft_loss": 1.0, "hard_loss": 0.5}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_of_several_labels_is_that_of_each_yes_and_no(temperature):
    z, t = (3 * torch.randn(ROWS, LABELS) for _ in range(2))
    batch = batch_of(torch.randint(2, (ROWS, LABELS)).float())
    z.requires_grad_()
    given = Divergence("forward_kl", 0.5, temperature)
    found = loss_of(fixed(z), fixed(t), MULTI, as_divergence=given, label_smoothing=0.0)(**batch)
    wide = z.detach().double().requires_grad_()
    p, q = ((x.double() / temperature).sigmoid() for x in (wide, t))
    of_labels = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    soft = (temperature**2 * of_labels.mean(1) * batch["row_weights"]).sum()
    hard = binary_cross_entropy_with_logits(wide, batch["labels"].double(), reduction="none")
    assert found["soft_loss"].item() == pytest.approx(soft.item(), rel=1e-6)
    expected = (hard.mean(1) * batch["weights"]).sum().item()
    assert found["hard_loss"].item() == pytest.approx(expected, rel=1e-6)
    found["soft_loss"].backward()
    soft.backward()
    torch.testing.assert_close(z.grad.double(), wide.grad, atol=2e-6, rtol=1e-5)


def test_the_loss_of_a_number_is_the_squared_difference():
    z, t = (torch.randn(ROWS, 1) for _ in range(2))
    batch = batch_of(torch.randn(ROWS))
    found = loss_of(fixed(z), fixed(t), REGRESSION)(**batch)
    soft = ((z - t)[:, 0].double().square() * batch["row_weights"]).sum()
    hard = ((z[:, 0] - batch["labels"]).double().square() * batch["weights"]).sum()
    assert found["soft_loss"].item() == pytest.approx(soft.item(), rel=1e-6)
    assert found["hard_loss"].item() == pytest.approx(hard.item(), rel=1e-6)


def test_the_loss_of_hidden_states_is_by_token_and_leaves_padding_out():
    student, teacher = tiny_bert(NAMES, seed=2, num_hidden_layers=2), tiny_bert(NAMES)
    objective = loss_of(
        student, teacher, "single_label_classification", hidden_weight=1.0, layers=[1, 4]
    ).eval()
    ids = torch.randint(5, 300, (ROWS, 9))
    mask = torch.arange(9) < torch.tensor([9, 4, 5, 6, 2, 8, 9])[:, None]
    batch = batch_of(torch.zeros(ROWS).long()) | {"input_ids": ids, "attention_mask": mask.long()}
    found = objective(**batch)
    mine, theirs = (
        model(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        for model in (student, teacher.eval())
    )
    kept = mask * batch["row_weights"][:, None]
    expected = sum(
        ((mine[i] - theirs[j]).double().square().mean(2) * kept).sum()
        for i, j in ((0, 0), (1, 1), (2, 4))
    )
    assert found["hidden_loss"].item() == pytest.approx(expected.item() / 3, rel=1e-5)
    assert objective.counts(batch)["hidden_loss"] == 9 + 4 + 5 + 6 + 2 + 8


def test_no_training_mode_and_no_optimizer_reaches_the_teacher():
    teacher = tiny_bert(NAMES, hidden_dropout_prob=0.5).requires_grad_(False).eval()
    student = tiny_bert(NAMES, seed=2)
    objective = loss_of(student, teacher, "single_label_classification").train()
    assert not any(module.training for module in teacher.modules())
    held = {id(parameter) for parameter in objective.parameters()}
    assert held == {id(parameter) for parameter in student.parameters()}
    ids = torch.randint(5, 300, (ROWS, 5))
    batch = batch_of(torch.zeros(ROWS).long()) | {"input_ids": ids}
    batch["attention_mask"] = torch.ones(ROWS, 5).long()
    losses = [objective(**batch)["soft_loss"] for _ in range(2)]
    assert losses[0] == losses[1] > 0
    losses[0].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    by_teacher = objective(**batch, predict=True, by_teacher=True)
    assert torch.equal(by_teacher, teacher(ids, attention_mask=batch["attention_mask"]).logits)


LABEL_OF = {
    "single_label_classification": (NAMES, lambda name, number: name),
    MULTI: (NAMES, lambda name, number: [name] if number % 4 else [name, NAMES[0]]),
    REGRESSION: (["score"], lambda name, number: number / 10),
}


@pytest.mark.parametrize("problem_type", LABEL_OF)
def test_a_student_that_is_its_teacher_does_not_move(problem_type, distil, make_teacher, tmp_path):
    names, label = LABEL_OF[problem_type]
    write_parts(tmp_path, label)
    given = make_teacher(names, problem_type)
    temperature = {} if problem_type == REGRESSION else {"temperature": 2.0}
    ended = distil(
        data=tmp_path,
        given=given,
        problem_type=problem_type,
        student_layers=[0, 1, 2, 3],
        hard_weight=0.0,
        hidden_weight=1.0,
        weight_decay=0.0,
        max_steps=2,
        **temperature,
    )
    assert ended.status == 0, ended.error
    for record in steps(ended.folder):
        assert (record["soft_loss"], record["hidden_loss"], record["loss"]) == (0, 0, 0)
        assert record["hard_loss"] > 0  # measured, and not learnt from
        assert record["grad_norm"] == 0
    exported = load_file(ended.folder / "model/model.safetensors")
    for name, tensor in load_file(given / "model.safetensors").items():
        assert torch.equal(exported[name], tensor), name
    config = json.loads((ended.folder / "model/config.json").read_text())
    assert [*config["id2label"].values()] == names
    assert config["problem_type"] == problem_type
    tested = metrics(ended.folder)[-1]
    own = [name for name in tested if name.startswith("test_") and "teacher" not in name]
    assert len(own) > 3
    for name in own:
        assert tested[name.replace("test_", "test_teacher_")] == tested[name]


# --- data -------------------------------------------------------------------------------------


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    return [{"path": str(path)}]


def test_unlabelled_texts_teach_by_the_teacher_alone(distil, tmp_path):
    """Those of transfer_data, whatever labels stand there, and the unlabelled of train_data."""
    rows = rows_of(16, 5)
    for row in rows[6:]:
        row["label"] = ""
    train = write_csv(tmp_path / "train.csv", rows)
    refused = distil("refused", train_data=train)
    assert refused.status == 2
    assert refused.error.count("\n") == 1
    assert "train.csv, line 8: label is missing: set on_missing_label: unlabelled" in refused.error
    more = rows_of(16, 6, lambda name, number: "never read")
    transfer = [{"path": write_jsonl(tmp_path / "more.jsonl", more)}]
    settings = {"max_steps": 1, "on_missing_label": "unlabelled", "global_batch_size": 32}
    ended = distil(train_data=train, transfer_data=transfer, **settings)
    assert ended.status == 0, ended.error
    assert "examples: 32 train, 15 validation, 15 test\n" in ended.output
    assert "train: 6 with a label, 0 varied copies\n" in ended.output
    # both losses are by all texts, six of which have one of a label
    alone = distil("alone", train_data=write_csv(tmp_path / "six.csv", rows[:6]), **settings)
    (one,), (other,) = steps(ended.folder), steps(alone.folder)
    assert one["hard_loss"] == pytest.approx(6 / 32 * other["hard_loss"], rel=1e-6)
    everything = write_jsonl(tmp_path / "all.jsonl", rows_of(16, 5) + rows_of(16, 6))
    whole = distil("whole", train_data=[{"path": everything}], **settings)
    assert one["soft_loss"] == pytest.approx(steps(whole.folder)[0]["soft_loss"], rel=1e-6)


def test_tables_are_told_apart(distil, texts):
    settings = {"augmentation": {}}  # a varied copy of each text
    assert_tables_are_told_apart(distil, texts / "train.jsonl", texts / "test.jsonl", **settings)


def test_a_table_without_labels_has_a_weight(distil, texts):
    table = {"path": str(texts / "test.jsonl"), "label": "more", "weight": 3}
    ended = distil(transfer_data=[table], max_steps=None, num_train_epochs=1)
    assert ended.status == 0, ended.error
    assert "48 x 1 (51.6% of an epoch), more: 15 x 3 (48.4% of an epoch)" in ended.output
    assert len(steps(ended.folder)) == -(-(48 + 45) // TINY["global_batch_size"])


def test_no_row_needs_a_label(distil, tmp_path):
    rows = [{"text": row["text"]} for row in rows_of(20, 5)]
    train = [{"path": write_jsonl(tmp_path / "rows.jsonl", rows)}]
    settings = {"on_missing_label": "unlabelled", "max_steps": 2, "train_data": train}
    ended = distil(**settings)
    assert ended.status == 0, ended.error
    assert [record["hard_loss"] for record in steps(ended.folder)] == [0, 0]
    assert [record["soft_loss"] > 0 for record in steps(ended.folder)] == [True, True]
    refused = distil("refused", **settings, soft_weight=0.0)
    assert (refused.status, refused.error.count("\n")) == (2, 1)
    assert "hard_weight: no row of train_data has a label to learn" in refused.error


def test_only_rows_with_labels_are_held_out_and_no_text_of_theirs_is_trained_on(distil, tmp_path):
    rows = rows_of(60, 3)
    same = [{"text": row["text"]} for row in rows]
    data = {
        "train_data": [{"path": write_jsonl(tmp_path / "train.jsonl", rows)}],
        "transfer_data": [{"path": write_jsonl(tmp_path / "same.jsonl", same)}],
    }
    ended = distil(**data, validation_data=[], validation_split=0.3, max_steps=1)
    assert ended.status == 0, ended.error
    found = re.search(r"examples: (\d+) train, (\d+) validation", ended.output)
    train, validation = map(int, found.groups())
    assert train == 2 * (60 - validation)
    assert f"train: {60 - validation} with a label" in ended.output
    assert f"0 of {validation} validation" in ended.output


def test_varied_copies_multiply_the_texts_and_have_no_label(wordpiece):
    rows = [LabelledText((row["text"],), row["label"], "") for row in rows_of(6, 0)]
    wordpiece.model_max_length = 64

    def read(texts):
        return encode(wordpiece, texts)[0]

    examples = [e | {"label": i % 3} for i, e in enumerate(read([r.texts for r in rows]))]
    settings = Augmentation(operations=["replacement"], probability=1.0)
    make = TransferExamples(examples, 4, [1.0, 3.0, 1.0], Augmenter(rows * 3, settings, 0), read)
    made = make([*range(18)], [0] * 18)
    same = [
        np.array_equal(m["input_ids"], examples[i % 6]["input_ids"]) for i, m in enumerate(made)
    ]
    assert same[:6] == [True] * 6
    assert same[6:] == [False] * 12
    assert any(
        not np.array_equal(made[6 + i]["input_ids"], made[12 + i]["input_ids"]) for i in range(6)
    )
    # the labels 0, 1, 2, 0: torch's weighted mean, by four texts
    assert [m["weight"] for m in made] == pytest.approx([4 / 6] * 4 + [0.0] * 14)
    again, later = make([7, 2], [0, 0]), make([7, 2], [1, 1])
    assert np.array_equal(again[0]["input_ids"], made[7]["input_ids"])
    assert not np.array_equal(later[0]["input_ids"], made[7]["input_ids"])
    assert later[1]["label"] == 2


# --- teachers and students --------------------------------------------------------------------


def test_a_decoder_with_its_own_tokenizer_teaches_an_encoder(
    distil, make_teacher, tokenizer_folder, wordpiece_folder
):
    """And says of each text what it says alone."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    labels = {"id2label": dict(enumerate(NAMES)), "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForSequenceClassification(
        LlamaConfig(num_attention_heads=2, max_position_embeddings=64, **sizes, **labels)
    )
    with torch.no_grad():
        model.score.weight.normal_()
    given = make_teacher(model=model, tokenizer=tokenizer_folder)
    settings = {"tokenizer": wordpiece_folder, "augmentation": {}, "augmented_copies": 2}
    ended = distil(given=given, **settings, sequence_length=48)
    assert ended.status == 0, ended.error
    assert "train: 48 with a label, 96 varied copies\n" in ended.output
    narrow = distil("narrow", given=given, **settings, sequence_length=48, per_device_batch_size=1)
    assert_same_losses(narrow.folder, ended.folder, 1e-5)
    tested = metrics(ended.folder)[-1]
    classify = pipeline("text-classification", str(given), truncation=True, max_length=48)
    rows = rows_of(15, 2)
    right = sum(classify(row["text"])[0]["label"] == row["label"] for row in rows)
    assert tested["test_teacher_accuracy"] == pytest.approx(right / 15)
    card = (ended.folder / "README.md").read_text()
    assert f"| accuracy of the test data by the teacher | {right / 15:.4f} |" in card
    share = f"{tested['test_accuracy'] / (right / 15):.1%}"
    assert f"share of the teacher's accuracy kept | {share} |" in card.replace("&#x27;", "'")


def test_a_teacher_is_told_which_text_is_which_though_its_student_is_not(distil, teacher, tmp_path):
    """BERT has token types, and DistilBERT none, of one tokenizer."""
    parts = {}
    for seed, part in enumerate(("train", "validation", "test")):
        rows = [
            row | {"other": text["text"]}
            for row, text in zip(rows_of(16, seed), rows_of(16, 9), strict=True)
        ]
        parts[f"{part}_data"] = [{"path": write_jsonl(tmp_path / f"{part}.jsonl", rows)}]
    model = {"model_type": "distilbert", "dim": 32, "hidden_dim": 64, "n_heads": 2, "n_layers": 1}
    settings = {"text_pair_column": "other", "sequence_length": 64, "max_steps": 2}
    ended = distil(**parts, model=model, hidden_weight=0.1, **settings)
    assert ended.status == 0, ended.error
    classify = pipeline("text-classification", str(teacher), top_k=None)
    losses = []
    for row in rows:
        pair = {"text": row["text"], "text_pair": row["other"]}
        found = classify([pair], truncation=True, max_length=64)[0]
        losses += [-np.log(r["score"]) for r in found if r["label"] == row["label"]]
    tested = metrics(ended.folder)[-1]
    assert tested["test_teacher_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_students_from_the_teachers_layers_a_checkpoint_and_a_config(
    distil, teacher, wordpiece_folder, tmp_path
):
    carved = distil("carved", student_layers=[3, 1], max_steps=1)
    assert carved.status == 0, carved.error
    theirs = load_file(teacher / "model.safetensors")
    mine = load_file(carved.folder / "student/model.safetensors")
    for index, layer in enumerate((3, 1)):
        name = "bert.encoder.layer.{}.attention.self.query.weight".format
        assert torch.equal(mine[name(index)], theirs[name(layer)])
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        assert torch.equal(mine[name], theirs[name])
    sizes = {"dim": 32, "hidden_dim": 64, "n_heads": 2, "n_layers": 1, "vocab_size": 300}
    student = DistilBertForMaskedLM(DistilBertConfig(**sizes, max_position_embeddings=64))
    student.save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(wordpiece_folder).save_pretrained(tmp_path / "student")
    given = distil("given", model_name_or_path=tmp_path / "student", learning_rate=1e-12)
    assert given.status == 0, given.error
    exported = load_file(given.folder / "model/model.safetensors")
    name = "distilbert.transformer.layer.0.ffn.lin1.weight"
    assert torch.allclose(exported[name], student.state_dict()[name], atol=1e-6)
    assert exported["classifier.weight"].shape == (3, 32)
    small = distil("small", model=STUDENT | {"hidden_size": 16}, hidden_weight=1.0)
    assert small.status == 0, small.error
    losses = [record["hidden_loss"] for record in steps(small.folder)]
    assert losses[-1] < losses[0]
    exported = load_file(small.folder / "model/model.safetensors")
    assert not [name for name in exported if "projection" in name]


def test_a_teacher_from_scratch_has_the_labels_of_the_data(distil, wordpiece_folder):
    """Its layers are the same in the student that is made of them."""
    settings = {"hard_weight": 0.0, "weight_decay": 0.0, "student_layers": [0, 1], "max_steps": 2}
    ended = distil(teacher={"model": STUDENT}, tokenizer=wordpiece_folder, **settings)
    assert ended.status == 0, ended.error
    assert [record["soft_loss"] for record in steps(ended.folder)] == [0, 0]
    config = json.loads((ended.folder / "model/config.json").read_text())
    assert [*config["id2label"].values()] == sorted(NAMES)


def test_the_export_is_the_student_and_says_what_was_predicted(distil):
    ended = distil(max_steps=12, learning_rate=1e-2, temperature=2.0)
    assert ended.status == 0, ended.error
    losses = [record["soft_loss"] for record in steps(ended.folder)]
    assert losses[-1] < 0.7 * losses[0]
    classify = pipeline("text-classification", str(ended.folder / "model"), top_k=None)
    rows, found = rows_of(15, 2), predictions(ended.folder)
    assert len(found) == 15
    for row, record in zip(rows, found, strict=True):
        scores = {r["label"]: r["score"] for r in classify([row["text"]], truncation=True)[0]}
        assert record["probabilities"] == pytest.approx(scores, abs=1e-5)
        assert record["label"] == row["label"]
        assert [*record["probabilities"]] == NAMES  # the teacher's order


@pytest.mark.parametrize("dtype", ["8bit", "4bit"])
def test_a_teacher_in_fewer_bits_is_nearly_the_same(dtype, distil, make_teacher):
    given = make_teacher(model=tiny_bert(NAMES, hidden_size=64, intermediate_size=128))
    exact = distil("exact", given=given, max_steps=1)
    rounded = distil("rounded", given=given, max_steps=1, **{"teacher.dtype": dtype})
    assert rounded.status == 0, rounded.error
    (one,), (other,) = (steps(ended.folder) for ended in (exact, rounded))
    assert one["hard_loss"] == other["hard_loss"]
    assert other["soft_loss"] == pytest.approx(one["soft_loss"], rel=0.2)
    assert other["soft_loss"] != one["soft_loss"]


# --- runs -------------------------------------------------------------------------------------

EVERYTHING = {
    "model": STUDENT | {"hidden_dropout_prob": 0.2},
    "class_weights": "balanced",
    "label_smoothing": 0.1,
    "temperature": 2.0,
    "hidden_weight": 0.1,
    "augmentation": {"operations": ["swap", "concatenation", "splitting"]},
}


def test_a_resumed_run_is_the_run_bit_by_bit(distil, tmp_path):
    """Where the best step is that of the checkpoint it goes on from, too."""
    settings = EVERYTHING | {"max_steps": 6, "save_steps": 2, "eval_steps": 3, "keep_last": 9}
    settings |= {"learning_rate": 1e-2}
    whole = distil("whole", **settings)
    assert whole.status == 0, whole.error
    assert "exported: step 3, the best" in whole.output
    again = tmp_path / "again"
    shutil.copytree(whole.folder, again)
    for folder in checkpoints(again)[2:]:
        shutil.rmtree(folder)
    (again / "finished.json").unlink()
    ended = distil("again", **settings)
    assert "continuing" in ended.output
    assert metrics(again) == metrics(whole.folder)
    assert predictions(again) == predictions(whole.folder)
    weights = [load_file(f / "model/model.safetensors") for f in (whole.folder, again)]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    for name, value in {"temperature": 3.0, "augmented_copies": 2, "label_smoothing": 0.2}.items():
        changed = distil("again", **settings | {"max_steps": 8, name: value})
        assert changed.status == 2
        assert f"{name} " in changed.error


def test_processes_and_stages_change_no_number(distil, texts, teacher, tmp_path):
    settings = EVERYTHING | {"model": STUDENT}
    one = distil("one", **settings).folder
    values = {"output_dir": tmp_path / "two", **tables(texts), **TINY, **settings}
    values |= {"teacher": {"model_name_or_path": str(teacher)}}
    run("zero3", 2, command_line(values), tmp_path / "log", script=SCRIPT)
    assert_same_losses(tmp_path / "two", one, 1e-5)
    for found, expected in zip(metrics(tmp_path / "two")[-2:], metrics(one)[-2:], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


# --- what is refused --------------------------------------------------------------------------


def test_other_labels_than_the_teachers_are_refused(distil, tmp_path):
    data = {"train_data": [{"path": str(tmp_path / "rows.jsonl")}], "validation_data": []}
    write_jsonl(tmp_path / "rows.jsonl", rows_of(9, 0, lambda name, n: name if n else "news"))
    ended = distil(**data)
    assert (ended.status, ended.folder.exists()) == (2, False)
    assert ended.error == (
        f"error: {tmp_path}/rows.jsonl, line 1: 'news' is no label of the teacher, which tells "
        "apart web, code, prose\n"
    )
    # in other capitals, or as numbers, and not all of them
    write_jsonl(tmp_path / "rows.jsonl", rows_of(9, 0, lambda name, n: "CODE"))
    assert distil("capitals", **data, test_data=[], max_steps=1).status == 0
    write_jsonl(tmp_path / "rows.jsonl", rows_of(9, 0, lambda name, n: n % 2 + 1))
    assert distil("numbers", **data, test_data=[], max_steps=1).status == 0


def test_labels_without_names_are_numbers(distil, make_teacher, tmp_path):
    given = make_teacher(["LABEL_0", "LABEL_1", "LABEL_2"])
    ended = distil(given=given)
    assert (ended.status, ended.folder.exists()) == (2, False)
    assert "is no label of the teacher, which tells apart LABEL_0, LABEL_1, " in ended.error
    write_parts(tmp_path, lambda name, number: NAMES.index(name))
    ended = distil("named", given=given, data=tmp_path, label_names=NAMES, max_steps=1)
    assert ended.status == 0, ended.error
    assert [*predictions(ended.folder)[0]["probabilities"]] == NAMES


def teacher_of(kind, make_teacher, tmp_path, tokenizer_folder):
    if kind == "headless":
        return make_teacher(model=BertForMaskedLM(tiny_bert(NAMES).config))
    if kind == "without weights of a head":
        folder = make_teacher(model=BertForMaskedLM(tiny_bert(NAMES).config))
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = ["BertForSequenceClassification"]
        (folder / "config.json").write_text(json.dumps(config))
        return folder
    if kind == "another problem":
        return make_teacher(NAMES, MULTI)
    if kind == "own output":
        return shutil.copytree(make_teacher(), tmp_path / "run/model")
    if kind == "other words":
        return make_teacher(model=tiny_bert(NAMES, vocabulary=512), tokenizer=tokenizer_folder)
    return make_teacher()


REFUSED = {
    "headless": ({}, r"teacher: .* has no classification head \(BertForMaskedLM\)"),
    "without weights of a head": ({}, "teacher: .* has no classifier.bias"),
    "another problem": (
        {},
        r"teacher: problem_type: .* is for multi_label_classification, not for "
        r"single_label_classification: set problem_type\n",
    ),
    "own output": ({}, "teacher: .*run/model is in the output_dir of its own student"),
    "other words": (
        {"tokenizer": "W", "student_layers": [0]},
        "student_layers: .* is not the tokenizer of the teacher",
    ),
    "nothing there": (
        {"teacher": {"model_name_or_path": "/nowhere"}},
        "teacher: model_name_or_path: cannot load the tokenizer of /nowhere: there is no such",
    ),
    "an adapter": ({"teacher.adapter_name_or_path": "W"}, "teacher.adapter_name_or_path: the lab"),
    "no teacher": ({"teacher": {}}, "teacher: give its model_name_or_path"),
    "temperature": ({"temperature": 0.0}, "temperature must be more than 0"),
    "temperature of numbers": (
        {"temperature": 2.0, "problem_type": REGRESSION, "metric_for_best_model": "loss"},
        "divergence and temperature: a regression has no probabilities",
    ),
    "no weights": ({"soft_weight": 0.0, "hard_weight": 0.0}, "there is nothing to learn"),
    "layers": ({"student_layers": [4]}, "not among the teacher's 0 to 3"),
    "map": ({"hidden_weight": 1.0, "layer_map": [1, 5]}, "layer_map: .* the teacher's, 1 to 4"),
    "short map": ({"hidden_weight": 1.0, "layer_map": [1]}, "layer_map: "),
    "copies": ({"augmented_copies": 2}, "augmented_copies: give augmentation too"),
    "no copies": ({"augmented_copies": 0, "augmentation": {}}, "augmented_copies must be at le"),
    "new head": ({"new_head": True}, "new_head: from scratch every head is new"),
    "two students": ({"model_name_or_path": "T", "student_layers": [0]}, "students of their own"),
    "longer rows": ({"sequence_length": 65}, "teacher.*sequence_length: 65 is more than"),
    "no transfer file": ({"transfer_data": [{"path": "none.jsonl"}]}, "no file none.jsonl"),
    "encoder-decoder": (
        {"teacher": {"model": {"model_type": "t5"}}, "tokenizer": "W"},
        "teacher: model: t5 is an encoder-decoder",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said_in_one_line(
    case, distil, make_teacher, tokenizer_folder, wordpiece_folder, tmp_path
):
    settings, message = REFUSED[case]
    given = teacher_of(case, make_teacher, tmp_path, tokenizer_folder)
    places = {"T": str(given), "W": str(wordpiece_folder)}
    settings = {k: places.get(v, v) if isinstance(v, str) else v for k, v in settings.items()}
    ended = distil(given=given, **settings)
    assert ended.status == 2, ended.output
    assert ended.error.count("\n") == 1, ended.error
    assert re.search(message, ended.error), ended.error
    assert not (ended.folder / "checkpoints").exists()


def test_a_student_of_other_labels_needs_a_new_head(distil, make_teacher):
    student = make_teacher([*reversed(NAMES)])
    ended = distil(model_name_or_path=student, max_steps=1)
    assert ended.status == 2
    assert (
        "tells apart prose, code, web, its teacher web, code, prose: set new_head: " in ended.error
    )
    new = distil("new", model_name_or_path=student, new_head=True, learning_rate=1e-12, max_steps=1)
    assert new.status == 0, new.error
    assert load_file(new.folder / "model/model.safetensors")["classifier.weight"].std() < 0.4
    kept = distil("kept", model_name_or_path=make_teacher(), learning_rate=1e-12, max_steps=1)
    assert load_file(kept.folder / "model/model.safetensors")["classifier.weight"].std() > 0.6


@pytest.mark.parametrize(
    "file", sorted(Path("recipes/classification/configs").glob("distill_*.yaml")), ids=str
)
def test_configs_parse(file):
    args = parse(distill.Arguments, [str(file)])
    values, _ = read_yaml(str(file))
    assert args.output_dir == values["output_dir"]
    assert args.train_data
    assert args.validation_data
