"""A classifier that is given keeps its labels: names, order and what it says of each; or is refused
by name."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, pipeline

from conftest import WORDS, write_jsonl
from launching import command_line, predictions
from recipes.classification import finetune as classification

NLI = ["entailment", "neutral", "contradiction"]  # in no alphabetical order
TINY = {
    "sequence_length": 32,
    "global_batch_size": 6,
    "per_device_batch_size": 6,
    "max_steps": 1,
    "learning_rate": 1e-12,
    "report_to": [],
}


@pytest.fixture
def given(wordpiece_folder, tmp_path):
    """given(names, problem_type): the folder of a classifier that has learnt something."""

    def make(names, problem_type=None):
        config = BertConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            problem_type=problem_type,
        )
        torch.manual_seed(1)
        model = BertForSequenceClassification(config)
        with torch.no_grad():
            model.classifier.weight.normal_()
        folder = tmp_path / "given"
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(wordpiece_folder).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def fine_tune(call, tmp_path):
    """fine_tune(labels, **settings): a run on rows with these labels, which learns nothing."""

    def start(labels, **settings):
        draw = random.Random(0)
        texts = [" ".join(draw.choices(WORDS, k=8)) for _ in range(6)]
        rows = [{"text": t, "label": labels[i % len(labels)]} for i, t in enumerate(texts)]
        data = [{"path": write_jsonl(tmp_path / "rows.jsonl", rows)}]
        parts = {f"{part}_data": data for part in ("train", "validation", "test")}
        folder = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        values = {"output_dir": folder, **parts, **TINY} | settings
        return call(classification.main, command_line(values), folder), texts

    return start


@pytest.mark.parametrize(
    ("labels", "lora"),
    [
        (sorted(NLI), None),
        (["Neutral", "ENTAILMENT"], {"r": 2}),
        ([2, 0, 1], None),
        (["1", "2"], None),
    ],
)
def test_names_and_order_are_kept(labels, lora, given, fine_tune):
    folder = given(NLI)
    ended, texts = fine_tune(labels, model_name_or_path=folder, lora=lora)
    assert ended.status == 0, ended.error
    config = json.loads((ended.folder / "model/config.json").read_text())
    assert config["id2label"] == {str(index): name for index, name in enumerate(NLI)}
    before, after = (
        pipeline("text-classification", str(path), top_k=None)(texts)
        for path in (folder, ended.folder / "model")
    )
    for one, other, record in zip(before, after, predictions(ended.folder), strict=True):
        expected = {result["label"]: pytest.approx(result["score"], abs=1e-5) for result in one}
        assert {result["label"]: result["score"] for result in other} == expected
        assert record["probabilities"] == expected
        assert record["label"] in NLI


def test_several_labels_are_kept(given, fine_tune):
    folder = given(NLI)
    kind = {"problem_type": "multi_label_classification"}
    ended, _ = fine_tune([["contradiction"], ["neutral"]], model_name_or_path=folder, **kind)
    assert ended.status == 0, ended.error
    assert [record["label"] for record in predictions(ended.folder)][:2] == [
        ["contradiction"],
        ["neutral"],
    ]


def test_labels_without_names_take_those_of_the_data(given, fine_tune):
    folder = given(["LABEL_0", "LABEL_1", "LABEL_2"])
    for labels, names in (
        ([2, 0], ["0", "1", "2"]),  # the ids are kept
        (["b", "a", "c"], ["a", "b", "c"]),
    ):
        ended, _ = fine_tune(labels, model_name_or_path=folder)
        config = json.loads((ended.folder / "model/config.json").read_text())
        assert [*config["id2label"].values()] == names
    ended, _ = fine_tune(["b", "a"], model_name_or_path=folder)
    assert "'a' is no label of the given model, which tells apart LABEL_0, LABEL_1, " in ended.error


def test_a_regression_is_one(given, fine_tune):
    folder = given(["similarity"])
    ended, _ = fine_tune([0.5, 1.5], model_name_or_path=folder, problem_type="regression")
    config = json.loads((ended.folder / "model/config.json").read_text())
    assert (config["id2label"], config["problem_type"]) == ({"0": "similarity"}, "regression")


@pytest.mark.parametrize(
    ("names", "kind", "labels", "settings", "message"),
    [
        (
            ["ham", "spam"],
            None,
            ["good", "bad"],
            {},
            "line 2: 'bad' is no label of the given model, which tells apart ham, spam: set "
            "new_head: true for a head of its own",
        ),
        (NLI, None, [0, 3], {}, "line 2: '3' is no label of the given model, which tells apart "),
        (
            ["ham", "spam"],
            None,
            [0, 1],
            {"label_names": ["ham", "eggs"]},
            "line 2: 'eggs' is no label of the given model, which tells apart ham, spam: ",
        ),
        (
            NLI,
            "multi_label_classification",
            NLI,
            {},
            "is for multi_label_classification, not for single_label_classification: set "
            "problem_type, or new_head: true for a head of its own",
        ),
        (NLI, None, [0.5, 1.5], {"problem_type": "regression"}, "is for classification, not for"),
        (["LABEL_0"], None, ["a", "b"], {}, "is for regression, not for single_label_class"),
    ],
)
def test_other_labels_are_refused_and_learnt_by_a_new_head(
    names, kind, labels, settings, message, given, fine_tune
):
    folder = given(names, kind)
    ended, _ = fine_tune(labels, model_name_or_path=folder, **settings)
    assert ended.status == 2
    assert message in ended.error
    assert not ended.folder.exists()
    settings = {**settings, "model_name_or_path": folder, "new_head": True}
    ended, _ = fine_tune(labels, **settings)
    assert ended.status == 0, ended.error
    before, after = (
        load_file(path / "model.safetensors") for path in (folder, ended.folder / "model")
    )
    assert torch.allclose(before.pop("bert.pooler.dense.weight"), after["bert.pooler.dense.weight"])
    new = after["classifier.weight"]
    assert new.std() < 0.1  # as BERT draws it, where the given one has 1
    if len(names) != 2:
        return
    adapted, _ = fine_tune(labels, **settings, lora={"r": 2})
    found = load_file(adapted.folder / "model" / "model.safetensors")
    assert torch.allclose(found["classifier.weight"], new, atol=1e-6)


def test_a_new_head_needs_a_given_model(fine_tune, wordpiece_folder):
    ended, _ = fine_tune(["a", "b"], tokenizer=wordpiece_folder, new_head=True)
    assert ended.error == (
        "error: new_head: from scratch every head is new: give model_name_or_path\n"
    )
