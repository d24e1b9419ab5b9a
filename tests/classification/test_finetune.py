"""The classification recipe: what it computes however it is launched, what it writes, refuses."""

import contextlib
import csv
import io
import json
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    pipeline,
    set_seed,
)

import classification_report
import launching
from classification_examples import TrainingExamples, collate
from classification_loss import ClassificationLoss
from classification_metrics import METRICS
from comparing import assert_same_losses, assert_tables_are_told_apart
from conftest import WORDS, Ended, write_jsonl
from launching import (
    TINY_BERT,
    TINY_RUN,
    checkpoints,
    command_line,
    metrics,
    predictions,
    run,
    steps,
    tables,
)
from recipes.classification import finetune as classification
from utils.config import parse, read_yaml
from utils.epochs import digest
from utils.export import export

SCRIPT = "recipes/classification/finetune.py"
BERT, LLAMA = TINY_BERT["model"], TINY_RUN["model"]
TINY = {
    "model": BERT,
    "sequence_length": 32,
    "global_batch_size": 16,
    "per_device_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 3e-3,
    "report_to": [],
}
LABELS = ("code", "prose", "web")
LORA = {"r": 4, "lora_alpha": 8}


def make_rows(count: int, seed: int, **columns: Callable[[str, random.Random], Any]) -> list[dict]:
    """Texts of 3 to 41 words, one of which gives the label away; the last label is the rarest."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = LABELS[number] if number < 3 else draw.choices(LABELS, (6, 3, 1))[0]
        words = draw.choices(WORDS, k=draw.randint(2, 40))
        words.insert(draw.randrange(len(words)), 2 * WORDS[LABELS.index(label)])
        row = {"text": " ".join(words), "label": label}
        rows.append(row | {name: make(label, draw) for name, make in columns.items()})
    return rows


def write_splits(folder: Path, make: Callable[[int, int], list[dict]]) -> None:
    """train.jsonl (90 rows), validation.jsonl and test.jsonl (30 each); make(count, seed)."""
    for seed, (split, count) in enumerate([("train", 90), ("validation", 30), ("test", 30)]):
        write_jsonl(folder / f"{split}.jsonl", make(count, seed))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_splits(folder, make_rows)
    return folder


def words_of(folder: Path, texts: Path, tokenizer: Path, **settings: Any) -> list[str]:
    values = {"output_dir": folder, "tokenizer": tokenizer, **tables(texts), **TINY}
    return command_line(values | settings)


@pytest.fixture
def fine_tune(
    call: Callable,
    texts: Path,
    wordpiece_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Ended]:
    """fine_tune(name, **settings): the recipe in this process, without its slow plots."""
    monkeypatch.setattr(classification_report, "write_figures", lambda *args: [])

    def start(name: str = "run", **settings: Any) -> Ended:
        folder, tokenizer = tmp_path / name, settings.pop("tokenizer", wordpiece_folder)
        data = settings.pop("texts", texts)
        return call(classification.main, words_of(folder, data, tokenizer, **settings), folder)

    return start


def weights(folder: Path) -> dict[str, torch.Tensor]:
    file = min(folder.glob("*model.safetensors"))  # an adapter before its base
    return load_file(file)


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of one that a single process wrote; without what the optimizer keeps, too."""
    return load_file(folder / "rank-00000-of-00001.safetensors")


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [record for record in metrics(folder) if "eval_loss" in record]


# --- the loss ---------------------------------------------------------------------------------


EVERYTHING = {
    "class_weights": "balanced",
    "label_smoothing": 0.1,
    "l1_decay": 0.05,
    "augmentation": {"operations": ["replacement", "swap", "concatenation", "splitting"]},
    "adversarial": {"method": "freelb", "coefficient": 0.5},
}


def test_the_split_into_micro_batches_changes_nothing(fine_tune: Callable):
    whole = fine_tune("whole", per_device_batch_size=16, **EVERYTHING)
    for size in (1, 3):
        split = fine_tune(f"split-{size}", per_device_batch_size=size, **EVERYTHING)
        assert_same_losses(split.folder, whole.folder, 1e-6)
        for one, other in zip(evaluations(split.folder), evaluations(whole.folder), strict=True):
            assert one == pytest.approx(other, rel=1e-5)
    assert len({record["loss"] for record in steps(whole.folder)}) == 4


@pytest.mark.parametrize("config", ["multi_cpu", "zero2", "zero3"])
def test_ranks_and_stages_change_nothing(
    config: str, fine_tune: Callable, texts: Path, wordpiece_folder: Path, tmp_path: Path
):
    one = fine_tune("one", **EVERYTHING).folder
    two = tmp_path / "two"
    words = words_of(two, texts, wordpiece_folder, **EVERYTHING)
    run(config, 2, words, tmp_path / "log", script=SCRIPT)
    assert_same_losses(two, one, 1e-5)
    for name, value in weights(one / "model").items():
        assert (weights(two / "model")[name] - value).norm() <= 1e-4 * value.norm() + 1e-6, name
    assert [r["prediction"] for r in predictions(two)] == [
        r["prediction"] for r in predictions(one)
    ]
    found, expected = evaluations(two)[-1], evaluations(one)[-1]
    # two texts of nearly the same score may change places
    assert found.pop("eval_roc_auc") == pytest.approx(expected.pop("eval_roc_auc"), abs=0.01)
    assert found == pytest.approx(expected, rel=1e-3)
    assert (two / "plots" / "confusion_matrix.png").stat().st_size > 10_000
    assert (two / "plots" / "reliability.png").stat().st_size > 10_000


def logits_module(logits: torch.Tensor) -> torch.nn.Module:
    """A model that says the same whatever it reads."""

    class Fixed(torch.nn.Module):
        def forward(self, **inputs: torch.Tensor) -> Any:
            return type("Output", (), {"logits": logits})

    return Fixed()


def test_class_weights_and_smoothing_are_torchs():
    logits, labels = torch.randn(12, 3, generator=torch.manual_seed(0)), np.arange(12) % 3 // 2
    given = [0.5, 3.0, 1.0]
    examples = [{"input_ids": np.array([1]), "label": label} for label in labels]
    made = TrainingExamples(examples, None, given, None, 0)(list(range(12)), [0] * 12)
    batch = collate([[example] for example in made], 0, labels[0])
    objective = ClassificationLoss(logits_module(logits), "single_label_classification", given, 0.2)
    found = objective(**batch)["loss"] / objective.counts(batch)["loss"]
    expected = torch.nn.CrossEntropyLoss(torch.tensor(given), label_smoothing=0.2)
    assert found.item() == pytest.approx(
        expected(logits, torch.from_numpy(labels)).item(), rel=1e-6
    )


def test_several_labels_and_numbers_are_torchs_losses():
    draws = torch.manual_seed(0)
    logits, labels = torch.randn(6, 3, generator=draws), torch.randint(2, (6, 3), generator=draws)
    batch = {"labels": labels.float(), "weights": torch.ones(6), "noise_keys": torch.zeros(6)}
    given = [1.0, 2.0, 3.0]
    objective = ClassificationLoss(logits_module(logits), "multi_label_classification", given)
    expected = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(given))(logits, labels.float())
    assert objective(**batch)["loss"].item() / 6 == pytest.approx(expected.item(), rel=1e-6)
    batch["labels"] = torch.randn(6, generator=draws)
    objective = ClassificationLoss(logits_module(logits[:, :1]), "regression")
    expected = torch.nn.MSELoss()(logits[:, 0], batch["labels"])
    assert objective(**batch)["loss"].item() / 6 == pytest.approx(expected.item(), rel=1e-6)


def test_a_coefficient_of_zero_is_plain_training_bit_for_bit(fine_tune: Callable):
    model = BERT | {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.1}
    plain = fine_tune("plain", model=model).folder
    for method in ("fgm", "pgd", "freelb", "smart"):
        settings = {"method": method, "coefficient": 0}
        none = fine_tune(method, model=model, adversarial=settings).folder
        assert metrics(none) == metrics(plain)
        for name, value in weights(plain / "model").items():
            assert torch.equal(weights(none / "model")[name], value)
    some = fine_tune("some", model=model, adversarial={"method": "fgm"}).folder
    assert not torch.equal(
        weights(some / "model")["classifier.weight"], weights(plain / "model")["classifier.weight"]
    )


def test_dropout_of_the_config_is_used(fine_tune: Callable):
    plain = fine_tune("plain").folder
    dropped = fine_tune("dropped", dropout={"classifier_dropout": 0.5}).folder
    assert json.loads((dropped / "model/config.json").read_text())["classifier_dropout"] == 0.5
    assert steps(dropped)[0]["loss"] != steps(plain)[0]["loss"]


# --- decoders ---------------------------------------------------------------------------------


def test_padding_does_not_move_the_last_token_of_a_decoder():
    set_seed(0)
    settings = {k: v for k, v in LLAMA.items() if k != "model_type"}
    model = LlamaForSequenceClassification(
        LlamaConfig(**settings, vocab_size=50, num_labels=3, pad_token_id=2)
    ).eval()
    rows = [np.array([5, 6, 7, 8]), np.array([9, 2, 10]), np.array([11])]  # 2 inside of a text
    examples = [{"input_ids": ids, "label": 0} for ids in rows]
    objective = ClassificationLoss(model, "single_label_classification")
    batch = collate([[example] for example in examples] + [[]], 2, 0)
    together = objective(**batch, predict=True)
    for row, example in enumerate(examples):
        alone = objective(**collate([[example]], 2, 0), predict=True)
        assert torch.allclose(together[row], alone[0], atol=1e-6)
        hidden = model.model(torch.from_numpy(example["input_ids"])[None]).last_hidden_state
        assert torch.allclose(model.score(hidden[0, -1]), alone[0], atol=1e-6)
    assert objective.counts(batch) == {"loss": 3}
    assert together.isfinite().all()


def test_a_decoder_pads_with_its_end_token_and_loads_as_a_pipeline(
    fine_tune: Callable, tokenizer_folder: Path, tmp_path: Path
):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings = {"model": LLAMA, "tokenizer": tmp_path / "tokenizer"}
    adversarial = {"adversarial": {"method": "pgd", "steps": 2}}
    folder = fine_tune("decoder", **settings, **adversarial).folder
    small = fine_tune("small", **settings, **adversarial, per_device_batch_size=1).folder
    assert_same_losses(small, folder, 1e-5)
    config = json.loads((folder / "model/config.json").read_text())
    assert config["pad_token_id"] == tokenizer.eos_token_id
    assert_pipeline_agrees(folder, make_rows(30, 2))


# --- what is trained --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "moves"),
    [
        ("embeddings", ("encoder.layer.0", "encoder.layer.1", "pooler", "classifier")),
        (1, ("encoder.layer.1", "pooler", "classifier")),
        ("encoder", ("classifier",)),
    ],
)
def test_frozen_parameters_do_not_move(what: Any, moves: tuple[str, ...], fine_tune: Callable):
    folder = fine_tune(freeze=what).folder
    before, after = weights(folder / "base_model"), weights(folder / "model")
    assert before.keys() == after.keys()
    for name, value in before.items():
        is_free = any(part in name for part in moves)
        changes = not torch.equal(after[name], value)
        # nothing depends on the biases of the keys
        assert changes == is_free or "key.bias" in name, name


def test_lora_settings_stay_as_they_were_given(fine_tune: Callable):
    """peft lengthens the list by the classifier's own names."""
    settings = {"lora": {**LORA, "modules_to_save": ["pooler"]}, "max_steps": 2}
    first = fine_tune("run", **settings)
    assert first.status == 0, first.error
    assert read_yaml(str(first.folder / "config.yaml"))[0]["lora"] == settings["lora"]
    assert "is finished at step 2" in fine_tune("run", **settings).output


def test_lora_learns_the_same_adapter_on_stage_3(
    fine_tune: Callable, texts: Path, wordpiece_folder: Path, tmp_path: Path
):
    settings = {"lora": LORA, "merge_adapter": False, "max_steps": 6}
    one = fine_tune("one", **settings).folder
    words = words_of(tmp_path / "two", texts, wordpiece_folder, **settings)
    run("zero3", 2, words, tmp_path / "log", script=SCRIPT)
    found = weights(tmp_path / "two/model")
    expected = weights(one / "model")
    assert found.keys() == expected.keys()
    assert any("classifier" in name for name in found)
    assert any("lora_B" in name for name in found)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name
        assert value.norm() > 0


def test_the_merged_model_is_the_adapter_on_its_base(fine_tune: Callable, tmp_path: Path):
    folder = fine_tune(lora=LORA).folder
    inputs = AutoTokenizer.from_pretrained(folder / "model")(
        [row["text"] for row in make_rows(8, 5)], return_tensors="pt", padding=True
    )
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert not hasattr(merged, "peft_config")
    export(checkpoints(folder)[-1], tmp_path / "adapter", merge_adapter=False)
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base_model")
    with torch.no_grad():
        untrained = base(**inputs).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(**inputs).logits
        found = merged(**inputs).logits
    assert torch.allclose(found, adapted, atol=1e-5)
    assert not torch.allclose(found, untrained, atol=1e-3)


def test_the_card_of_an_adapter_predicts_as_the_run_did(
    fine_tune: Callable, wordpiece_folder: Path, tmp_path: Path
):
    """The labels are known to the adapter alone: its base has none, or is that of the run."""
    base = AutoModelForMaskedLM.from_config(AutoConfig.for_model(**BERT, vocab_size=320))
    base.save_pretrained(tmp_path / "base")
    settings = {"lora": LORA, "merge_adapter": False, "learning_rate": 3e-2, "max_steps": 8}
    for name in ("base", None):
        given = {"model_name_or_path": str(tmp_path / name)} if name else {}
        folder = fine_tune(f"of {name}", **settings, **given).folder
        card = (folder / "model/README.md").read_text()
        code = card.split("```python\n")[1].split("```")[0]
        names: dict[str, Any] = {}
        exec(code.replace('"."', repr(str(folder / "model"))), names)
        for row, record in zip(make_rows(30, 2), predictions(folder), strict=True):
            scores = {
                found["label"]: found["score"] for found in names["classify"]([row["text"]])[0]
            }
            assert record["probabilities"] == pytest.approx(scores, abs=1e-5)


def test_the_card_tells_the_scores_of_what_was_exported(fine_tune: Callable, texts: Path):
    """Of the best step, not of the last: in the table, in the metadata, in the numbers above."""
    settings = {"max_steps": 9, "eval_steps": 3, "metric_for_best_model": "loss", "test_data": []}
    ended = fine_tune(greater_is_better=True, **settings)  # so that the first one is the best
    assert ended.status == 0, ended.error
    (first, *_, last) = evaluations(ended.folder)
    assert first["eval_loss"] > last["eval_loss"]
    card = ModelCard.load(ended.folder / "model/README.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["loss"] == pytest.approx(first["eval_loss"])
    assert f"| steps | {first['step']} |" in card.content
    assert f"| exported | step {first['step']}, the best |" in card.content
    tested = fine_tune("tested", **settings | {"test_data": tables(texts)["test_data"]})
    card = ModelCard.load(tested.folder / "model/README.md")
    (scores,) = [record for record in metrics(tested.folder) if "test_loss" in record]
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["loss"] == pytest.approx(scores["test_loss"])
    assert "test.jsonl" in card.data.eval_results[0].dataset_name


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert"])
def test_lora_trains_a_head_that_the_base_does_not_have(
    model_type: str, fine_tune: Callable, wordpiece_folder: Path, tmp_path: Path
):
    """Or a pooler, which learns nothing from masked tokens alone."""
    set_seed(0)
    settings = {**BERT, "model_type": model_type, "vocab_size": 320}
    settings |= {"type_vocab_size": 1} if model_type == "roberta" else {}
    base = AutoModelForMaskedLM.from_config(AutoConfig.for_model(**settings))
    base.save_pretrained(tmp_path / "base")
    settings = {"model_name_or_path": str(tmp_path / "base"), "lora": LORA, "max_steps": 8}
    ended = fine_tune(**settings, learning_rate=1e-2, save_steps=4, keep_last=9)
    assert ended.status == 0, ended.error
    assert_pipeline_agrees(ended.folder, make_rows(30, 2))
    names = (f"checkpoints/step-0000000{step}" for step in (4, 8))
    early, late = (checkpoint_tensors(ended.folder / name) for name in names)
    heads = [name for name in late if "modules_to_save" in name and name.startswith("parameter/")]
    assert heads
    assert all(not torch.equal(early[name], late[name]) for name in heads)
    assert (
        fine_tune(
            **settings | {"max_steps": 10}, learning_rate=1e-2, save_steps=4, keep_last=9
        ).status
        == 0
    )


def test_lora_in_bf16_keeps_the_head_in_full_precision(fine_tune: Callable):
    base = fine_tune("base", max_steps=1).folder / "model"
    settings = {"model_name_or_path": str(base), "lora": LORA, "mixed_precision": "bf16"}
    ended = fine_tune(**settings)
    assert ended.status == 0, ended.error
    held = checkpoint_tensors(checkpoints(ended.folder)[-1])
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    head = next(n for n in held if n.startswith("parameter/") and "classifier" in n)
    assert not torch.equal(held[head], held[head].bfloat16().float())


def test_what_was_trained_in_full_is_exported_without_its_base(fine_tune: Callable, tmp_path: Path):
    base = fine_tune("base", max_steps=1).folder / "model"
    folder = fine_tune(model_name_or_path=str(base)).folder
    base.rename(tmp_path / "elsewhere")
    export(checkpoints(folder)[-1], tmp_path / "exported")
    for name, tensor in weights(folder / "model").items():
        assert torch.equal(weights(tmp_path / "exported")[name], tensor), name


def test_ways_to_draw_an_adapter_are_functions_of_the_seed(fine_tune: Callable):
    def first(name: str, kind: str) -> dict[str, torch.Tensor]:
        torch.rand(len(name))
        lora = {**LORA, "init_lora_weights": kind}
        ended = fine_tune(name, lora=lora, max_steps=1, learning_rate=1e-12)
        assert ended.status == 0, ended.error
        return checkpoint_tensors(checkpoints(ended.folder)[-1])

    for kind in ("gaussian", "orthogonal"):
        one, other = first(f"{kind}-one", kind), first(f"another-{kind}", kind)
        assert all(torch.equal(one[name], other[name]) for name in one)
    refused = fine_tune(lora={**LORA, "init_lora_weights": "pissa_niter_2"})
    assert "lora.init_lora_weights: pissa_niter_2 draws another base each" in refused.error


def test_more_processes_than_a_step_has_micro_batches(
    fine_tune: Callable, texts: Path, wordpiece_folder: Path, tmp_path: Path
):
    settings = {"global_batch_size": 8, "per_device_batch_size": 16}
    one = fine_tune("one", **settings).folder
    words = words_of(tmp_path / "two", texts, wordpiece_folder, **settings)
    run("zero2", 2, words, tmp_path / "log", script=SCRIPT)
    assert_same_losses(tmp_path / "two", one, 1e-5)


# --- runs -------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_bit_identically(
    fine_tune: Callable, texts: Path, wordpiece_folder: Path, tmp_path: Path
):
    settings = {
        **EVERYTHING,
        "model": BERT | {"hidden_dropout_prob": 0.2},
        "max_steps": 40,
        "eval_steps": 3,
        "save_steps": 5,
        "metric_for_best_model": "roc_auc",
    }
    words = words_of(tmp_path / "run", texts, wordpiece_folder, **settings)
    with launching.Launch("cpu", 1, words, tmp_path / "log", script=SCRIPT) as launch:
        launch.wait_for("step 7/40")
        launch.signal(signal.SIGTERM)
        assert launch.wait() == [0], launch.output()
    assert "resume with: " in launch.output()
    assert not (tmp_path / "run/finished.json").exists()
    resumed = fine_tune("run", **settings)
    assert resumed.status == 0
    straight = fine_tune("straight", **settings).folder
    assert metrics(resumed.folder) == metrics(straight)
    assert predictions(resumed.folder) == predictions(straight)
    for name, value in weights(straight / "model").items():
        assert torch.equal(weights(resumed.folder / "model")[name], value), name
    again = fine_tune("run", **settings)
    assert again.status == 0
    assert "is finished at step 40" in again.output


def test_the_best_checkpoint_is_exported_and_tested(fine_tune: Callable, texts: Path):
    folder = fine_tune(
        max_steps=24,
        eval_steps=3,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        metric_for_best_model="eval_f1_macro",
    ).folder
    scores = [record["eval_f1_macro"] for record in evaluations(folder)]
    assert scores[-1] < max(scores)  # else the test shows nothing
    assert validated(folder, texts) == pytest.approx(max(scores), abs=1e-9)
    assert_pipeline_agrees(folder, make_rows(30, 2))


def validated(folder: Path, texts: Path) -> float:
    """The macro F1 of the export on the validation data."""
    rows = [json.loads(line) for line in (texts / "validation.jsonl").read_text().splitlines()]
    classify = pipeline("text-classification", str(folder / "model"), truncation=True)
    found = [result["label"] for result in classify([row["text"] for row in rows])]
    return f1_score([row["label"] for row in rows], found, average="macro", zero_division=0)


def test_training_ends_early_and_error_metrics_are_to_fall(fine_tune: Callable):
    ended = fine_tune(
        max_steps=60,
        eval_steps=2,
        learning_rate=5e-2,
        lr_scheduler_type="constant",
        early_stopping_patience=2,
        metric_for_best_model="expected_calibration_error",
    )
    errors = [record["eval_expected_calibration_error"] for record in evaluations(ended.folder)]
    assert len(errors) < 30
    assert errors.index(min(errors)) == len(errors) - 3
    assert "eval_expected_calibration_error has not improved 2 times" in ended.output


# --- what comes out ---------------------------------------------------------------------------


def assert_pipeline_agrees(folder: Path, rows: list[dict]) -> None:
    """The export gives the probabilities of predictions.jsonl, in the order of the rows."""
    classify = pipeline("text-classification", str(folder / "model"), truncation=True, top_k=None)
    columns = [k for k in ("text", "text_pair") if k in rows[0]]
    inputs = [{k: row[k] for k in columns} if len(columns) > 1 else row["text"] for row in rows]
    found = predictions(folder)
    assert len(found) == len(rows)
    for row, record, given in zip(rows, found, inputs, strict=True):
        scores = {result["label"]: result["score"] for result in classify([given])[0]}
        assert record["label"] == row["label"]
        assert {k: record[k] for k in columns} == {k: row[k] for k in columns}
        assert record["probabilities"] == pytest.approx(scores, abs=1e-5)


def test_predictions_are_the_exports_and_the_card_tells_the_results(fine_tune: Callable):
    ended = fine_tune(max_steps=8)
    assert ended.status == 0
    assert_pipeline_agrees(ended.folder, make_rows(30, 2))
    found = predictions(ended.folder)
    assert [r["row"].rpartition(", ")[2] for r in found] == [f"line {n}" for n in range(1, 31)]
    assert all(
        r["prediction"] == max(r["probabilities"], key=r["probabilities"].get) for r in found
    )
    accuracy = sum(r["prediction"] == r["label"] for r in found) / len(found)
    (tested,) = [record for record in metrics(ended.folder) if "test_loss" in record]
    assert tested["test_accuracy"] == pytest.approx(accuracy)
    assert set(evaluations(ended.folder)[0]) == {
        "step",
        *(f"eval_{name}" for name in METRICS["single_label_classification"]),
    }
    card = (ended.folder / "README.md").read_text()
    assert f"| accuracy of the test data | {accuracy:.4f} |" in card
    assert "| examples | 90 train, 30 validation, 30 test |" in card
    assert 'from_pretrained("model")' in card


def test_tables_are_told_apart(fine_tune: Callable, texts: Path):
    assert_tables_are_told_apart(fine_tune, texts / "train.jsonl", texts / "test.jsonl")


def test_the_code_of_the_card_runs(fine_tune: Callable, monkeypatch: pytest.MonkeyPatch):
    folder = fine_tune(max_steps=1).folder
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert all(label in printed.getvalue() for label in LABELS)


def test_several_labels_a_row_from_a_csv_file(fine_tune: Callable, tmp_path: Path):
    for seed, split in enumerate(("train", "validation", "test")):
        with open(tmp_path / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["body", "tags"])
            for number, row in enumerate(make_rows(40, seed)):
                tags = [row["label"], "even"] if number % 2 == 0 else [row["label"]]
                writer.writerow([row["text"], "; ".join(tags) if number else ""])
    data = {
        f"{s}_data": [{"path": str(tmp_path / f"{s}.csv")}] for s in ("train", "validation", "test")
    }
    settings = {"problem_type": "multi_label_classification", "label_separator": ";"}
    columns = {"text_column": "body", "label_column": "tags"}
    folder = fine_tune(**data, **settings, **columns, class_weights={"even": 2}).folder
    found = predictions(folder)
    assert found[0]["label"] == []
    assert set(found[2]["label"]) == {make_rows(40, 2)[2]["label"], "even"}
    assert set(found[0]["probabilities"]) == {*LABELS, "even"}
    text = make_rows(40, 2)[5]["text"]
    classify = pipeline("text-classification", str(folder / "model"), truncation=True, top_k=None)
    scores = {result["label"]: result["score"] for result in classify([text])[0]}
    assert found[5]["probabilities"] == pytest.approx(scores, abs=1e-5)
    assert found[5]["prediction"] == [k for k, v in found[5]["probabilities"].items() if v >= 0.5]


def test_pairs_of_texts_and_named_numbers(fine_tune: Callable, tmp_path: Path):
    other = {"text_pair": lambda label, draw: " ".join(draw.choices(WORDS, k=20))}
    write_splits(
        tmp_path,
        lambda count, seed: [
            row | {"label": LABELS.index(row["label"])} for row in make_rows(count, seed, **other)
        ],
    )
    settings = {"text_pair_column": "text_pair", "label_names": [*LABELS, "unseen"]}
    folder = fine_tune(texts=tmp_path, **settings).folder
    config = json.loads((folder / "model/config.json").read_text())
    assert config["id2label"] == {"0": "code", "1": "prose", "2": "web", "3": "unseen"}
    assert_pipeline_agrees(folder, make_rows(30, 2, **other))
    assert "text_pair" in (folder / "README.md").read_text()


def test_a_regression(fine_tune: Callable, tmp_path: Path):
    write_splits(
        tmp_path,
        lambda count, seed: [
            row | {"label": len(row["text"]) / 100} for row in make_rows(count, seed)
        ],
    )
    settings = {"problem_type": "regression", "metric_for_best_model": "pearsonr"}
    adversarial = {"method": "smart", "epsilon": 0.01}
    folder = fine_tune(texts=tmp_path, max_steps=30, **settings, adversarial=adversarial).folder
    first, last = steps(folder)[0], steps(folder)[-1]
    assert last["loss"] < 0.5 * first["loss"]
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    found = predictions(folder)
    assert [record["label"] for record in found] == [row["label"] for row in rows]
    guess = pipeline("text-classification", str(folder / "model"), truncation=True)
    scores = [guess(row["text"])[0]["score"] for row in rows[:5]]
    assert [record["prediction"] for record in found[:5]] == pytest.approx(scores, abs=1e-4)


def test_numbers_as_labels_are_in_their_order(fine_tune: Callable, tmp_path: Path):
    write_splits(
        tmp_path,
        lambda count, seed: [
            row | {"label": (2, 10, 1)[i % 3]} for i, row in enumerate(make_rows(count, seed))
        ],
    )
    config = json.loads((fine_tune(texts=tmp_path).folder / "model/config.json").read_text())
    assert config["id2label"] == {"0": "1", "1": "2", "2": "10"}


# --- what is refused --------------------------------------------------------------------------


def bad(change: Callable[[list[dict]], Any], split: str = "train", **settings: Any) -> tuple:
    return split, change, settings


def set_row(number: int, **values: Any) -> Callable[[list[dict]], None]:
    return lambda rows: rows[number - 1].update(values)


def test_held_out_data_of_one_class(fine_tune: Callable, texts: Path, tmp_path: Path):
    for seed, split in enumerate(("train", "validation", "test")):
        rows = make_rows(40, seed)
        write_jsonl(tmp_path / f"{split}.jsonl", rows if seed == 0 else [rows[0]] * 5)
    ended = fine_tune(texts=tmp_path)
    assert ended.status == 0
    said = "validation data have the same label: roc_auc is not defined there, null in the results"
    assert said in ended.error
    evaluations = [row for row in metrics(ended.folder) if "eval_loss" in row]
    assert [row["eval_roc_auc"] for row in evaluations] == [None] * len(evaluations)
    assert "NaN" not in (ended.folder / "metrics.jsonl").read_text()
    assert "not defined: all are the same" in (ended.folder / "README.md").read_text()
    ended = fine_tune("other", texts=tmp_path, metric_for_best_model="roc_auc")
    assert (ended.status, ended.folder.exists()) == (2, False)
    assert ended.error == (
        "error: metric_for_best_model: eval_roc_auc is not defined: all rows of the validation "
        "data have the same label\n"
    )


def test_a_label_whose_rows_are_all_held_out(fine_tune: Callable, tmp_path: Path):
    rows = make_rows(90, 0)
    shares = {row["text"]: int(digest([(row["text"],)]), 16) / 2**64 for row in rows}
    (held_out := min(rows, key=lambda row: shares[row["text"]]))["label"] = "rare"
    write_jsonl(tmp_path / "train.jsonl", rows)
    data = {"train_data": [{"path": str(tmp_path / "train.jsonl")}], "validation_data": []}
    share = shares[held_out["text"]] + 1e-9
    ended = fine_tune(**data, test_data=[], validation_split=share)
    assert ended.status == 0, ended.error
    assert "labels: code, prose, rare, web\n" in ended.output
    assert "examples: 89 train, 1 validation, 0 test\n" in ended.output


def test_a_part_of_the_training_data_is_held_out(fine_tune: Callable, texts: Path):
    ended = fine_tune(validation_data=[], validation_split=0.25)
    (examples,) = re.findall(r"  examples: (\d+) train, (\d+) validation, 30 test", ended.output)
    assert sum(map(int, examples)) == 90
    assert 10 < int(examples[1]) < 35
    assert any("eval_loss" in row for row in metrics(ended.folder))


def test_rows_that_are_trained_on_and_tested_on(fine_tune: Callable, texts: Path, tmp_path: Path):
    rows = make_rows(30, 2)
    rows[3]["text"] = make_rows(90, 0)[5]["text"]
    path = str(tmp_path / "test.jsonl")
    write_jsonl(Path(path), rows)
    ended = fine_tune(test_data=[{"path": path}])
    assert "warning: 1 of 30 test rows stand in train_data too, the first: " in ended.error
    card = (ended.folder / "README.md").read_text()
    assert "| rows that stand in train_data too | 0 of 30 validation, 1 of 30 test |" in card
    ended = fine_tune("other", test_data=[{"path": path}], on_leaked_rows="fail")
    assert (ended.status, ended.folder.exists()) == (2, False)
    assert ended.error.startswith("error: on_leaked_rows: 1 of 30 test rows stand in train_data")


def set_labels(label: Any) -> Callable[[list[dict]], None]:
    return lambda rows: [row.update(label=label) for row in rows]


MULTI = {"problem_type": "multi_label_classification"}
BAD_DATA = {
    "unseen label": (
        bad(set_row(3, label="news"), "validation"),
        "{validation}, line 3: label 'news' does not occur in train_data, whose labels are: "
        "code, prose, web",
    ),
    "empty text": (bad(set_row(4, text=" \n"), "test"), "{test}, line 4: text is empty"),
    "no label": (
        bad(set_row(2, label=None)),
        "{train}, line 2: label must be text or a whole number, not None",
    ),
    "single class": (
        bad(set_labels("web")),
        "train_data: label is 'web' in every row: there is nothing to tell apart",
    ),
    "missing column": (
        bad(lambda rows: rows[6].pop("text")),
        "{train}, line 7: no column 'text'; there are: label",
    ),
    "NaN": (
        bad(
            lambda rows: [set_labels(1.0)(rows), set_row(5, label=float("nan"))(rows)],
            **{"problem_type": "regression"},
        ),
        "{train}, line 5: label must be a number, not nan",
    ),
    "text for a number": (
        bad(lambda rows: None, problem_type="regression"),
        "{train}, line 1: label must be a number, not 'code'",
    ),
    "no list": (
        bad(lambda rows: None, **MULTI),
        "{train}, line 1: label must be a list of labels, not 'code': where the labels stand in "
        "a text, set label_separator",
    ),
    "no names": (
        bad(set_row(1, label=5), label_names=["a", "b"]),
        "{train}, line 1: label must be a number from 0 to 1, one for each of label_names, not 5",
    ),
    "unknown class": (
        bad(lambda rows: None, class_weights={"news": 2.0}),
        "class_weights: there is no label 'news'; there are: code, prose, web",
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_are_named_and_nothing_is_written(name: str, fine_tune: Callable, tmp_path: Path):
    (split, change, settings), message = BAD_DATA[name]
    files = {}
    for seed, part in enumerate(("train", "validation", "test")):
        rows = make_rows(12, seed)
        if part == split:
            change(rows)
        files[part] = tmp_path / f"{part}.jsonl"
        write_jsonl(files[part], rows)
    ended = fine_tune(texts=tmp_path, **settings)
    assert ended.status == 2
    assert ended.error == f"error: {message.format(**files)}\n"
    assert not ended.folder.exists()


BAD_SETTINGS = {
    "metric_for_best_model: eval_pearsonr is not measured; these are: eval_loss, eval_accuracy, ": {
        "metric_for_best_model": "eval_pearsonr"
    },
    "label_smoothing must be in [0, 1), not 1.0": {"label_smoothing": 1.0},
    "label_smoothing and class_weights: a regression has no labels": {
        "problem_type": "regression",
        "label_smoothing": 0.1,
        "metric_for_best_model": "loss",
    },
    "label_separator: needs problem_type: multi_label_classification": {"label_separator": ","},
    "dropout: bert has no 'dropuot'; it has: hidden_dropout_prob, ": {"dropout": {"dropuot": 0.1}},
    "dropout.hidden_dropout_prob must be in [0, 1), not 1.5": {
        "dropout": {"hidden_dropout_prob": 1.5}
    },
    "class_weights must be more than 0": {"class_weights": {"web": 0}},
    "lora: No modules were targeted": {"lora": {"target_modules": ["none"]}},
    "adversarial.steps must be at least 1": {"adversarial": {"method": "pgd", "steps": 0}},
    "augmentation.probability must be in [0, 1]": {"augmentation": {"probability": 2}},
    "freeze: LoRA trains its adapter alone": {"freeze": 1, "lora": LORA},
    "model: t5 is an encoder-decoder": {"model": {"model_type": "t5"}},
    "adversarial: smart compares what perturbations of 1e-05 do, which is lost in bf16": {
        "adversarial": {"method": "smart"},
        "mixed_precision": "bf16",
    },
    "sequence_length: 64 and the model's first position 1 are more than its max_position_emb": {
        "model": BERT | {"model_type": "roberta", "type_vocab_size": 1},
        "sequence_length": 64,
    },
    "validation_data: say which split of some/dataset it is, for example {path: some/dataset": {
        "validation_data": [{"path": "some/dataset"}]
    },
    "label_names: give two names at least": {"label_names": ["a"]},
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_bad_settings_are_named_and_nothing_is_written(message: str, fine_tune: Callable):
    ended = fine_tune(**BAD_SETTINGS[message])
    assert ended.status == 2
    assert ended.error.startswith(f"error: {message}"), ended.error
    assert ended.error.count("\n") == 1
    assert not (ended.folder / "checkpoints").exists()


def test_what_is_learned_must_not_change(fine_tune: Callable):
    fine_tune(max_steps=2)
    for setting, was in {
        "label_smoothing": {"label_smoothing": 0.3},
        "adversarial": {"adversarial": {"method": "fgm"}},
        "augmentation": {"augmentation": {}},
    }.items():
        ended = fine_tune(max_steps=3, **was)
        assert ended.status == 2
        assert f": {setting} was " in ended.error


# --- configs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", sorted(Path("recipes/classification/configs").glob("finetune_*.yaml")), ids=str
)
def test_configs_parse(file: Path):
    own = ["--train_data", "my.csv"] if "own" in file.stem else []
    args = parse(classification.Arguments, [str(file), *own])
    values, _ = read_yaml(str(file))
    assert args.output_dir == values["output_dir"]
    assert args.train_data
    assert args.has_validation
