"""The metrics of classifiers beside scikit-learn's and SciPy's, and by hand."""

import importlib.util
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from classification_metrics import (
    METRICS,
    measure,
    probabilities,
    reliability,
    scores,
    undefined_metrics,
)
from classification_report import write_figures
from launching import ROOT
from utils.config import InputError
from utils.scoring import check_finite


def approx(values: dict[str, float]):
    return pytest.approx({f"eval_{name}": value for name, value in values.items()}, rel=1e-9)


def averages(labels: np.ndarray, found: np.ndarray) -> dict[str, float]:
    functions = {
        "precision": metrics.precision_score,
        "recall": metrics.recall_score,
        "f1": metrics.f1_score,
    }
    return {
        f"{name}_{average}": function(labels, found, average=average, zero_division=0)
        for name, function in functions.items()
        for average in ("micro", "macro")
    }


@pytest.mark.parametrize("problem_type", METRICS)
def test_what_evaluate_computes_is_what_the_module_beside_it_computes(problem_type):
    """evaluate runs a copy of it."""
    draw = np.random.default_rng(1)
    logits = draw.normal(size=(40, 1 if problem_type == "regression" else 3))
    labels = {
        "single_label_classification": draw.integers(0, 3, 40),
        "multi_label_classification": draw.integers(0, 2, (40, 3)),
        "regression": draw.normal(size=40),
    }[problem_type]
    found = scores(problem_type, logits, labels)
    assert measure(problem_type, logits, labels) == approx(found)
    assert list(found) == list(METRICS[problem_type])


def test_single_label_metrics_are_scikit_learns():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 4, 60)
    logits = draw.normal(size=(60, 4)) + 2 * np.eye(4)[labels] * draw.random((60, 1))
    shares = probabilities("single_label_classification", logits)
    found = logits.argmax(1)
    confidence, is_right = shares.max(1), found == labels
    gaps = [
        abs((is_right[inside] - confidence[inside]).sum())
        for low in range(15)
        if (inside := (confidence > low / 15) & (confidence <= (low + 1) / 15)).any()
    ]
    results = measure("single_label_classification", logits.astype(np.float32), labels)
    expected = {
        "loss": metrics.log_loss(labels, shares),
        "accuracy": metrics.accuracy_score(labels, found),
        **averages(labels, found),
        "matthews_correlation": metrics.matthews_corrcoef(labels, found),
        "roc_auc": metrics.roc_auc_score(labels, shares, multi_class="ovr"),
        "expected_calibration_error": sum(gaps) / 60,
    }
    assert results == pytest.approx({f"eval_{k}": v for k, v in expected.items()}, rel=1e-5)
    assert set(expected) == set(METRICS["single_label_classification"])
    assert 0.2 < results["eval_accuracy"] < 1


def test_two_labels_are_told_apart_by_the_probability_of_one():
    logits = np.array([[0.0, 1.0], [0.0, -1.0], [0.0, 2.0], [0.0, 0.5]])
    labels = np.array([1, 0, 0, 1])
    results = measure("single_label_classification", logits, labels)
    assert results["eval_roc_auc"] == metrics.roc_auc_score(labels, logits[:, 1]) == 0.5


def test_multi_label_metrics_are_scikit_learns():
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 2, (50, 3))
    logits = draw.normal(size=(50, 3)) + labels
    shares = probabilities("multi_label_classification", logits)
    found = (shares >= 0.5).astype(int)
    results = measure("multi_label_classification", logits, labels)
    calibration = reliability(np.maximum(shares, 1 - shares).ravel(), (found == labels).ravel())
    assert results == approx(
        {
            "loss": np.mean([metrics.log_loss(labels[:, x], shares[:, x]) for x in range(3)]),
            "accuracy": metrics.accuracy_score(labels, found),
            **averages(labels, found),
            "matthews_correlation": np.mean(
                [metrics.matthews_corrcoef(labels[:, x], found[:, x]) for x in range(3)]
            ),
            "roc_auc": metrics.roc_auc_score(labels, shares, average="macro"),
            "expected_calibration_error": calibration.expected_calibration_error,
        }
    )


def test_regression_metrics_are_scipys():
    draw = np.random.default_rng(2)
    labels = draw.normal(size=40)
    logits = (labels + draw.normal(size=40))[:, None]
    assert measure("regression", logits, labels) == approx(
        {
            "loss": metrics.mean_squared_error(labels, logits[:, 0]),
            "pearsonr": scipy.stats.pearsonr(logits[:, 0], labels).statistic,
            "spearmanr": scipy.stats.spearmanr(logits[:, 0], labels).statistic,
            "mean_absolute_error": metrics.mean_absolute_error(labels, logits[:, 0]),
        }
    )


@pytest.mark.filterwarnings("error")
def test_what_has_no_definition_is_null_and_nothing_warns():
    constant = measure("regression", np.ones((3, 1)), np.arange(3.0))
    assert constant["eval_pearsonr"] is constant["eval_spearmanr"] is None
    missing = measure("single_label_classification", np.eye(3)[[0, 1]], np.array([0, 1]))
    assert missing["eval_roc_auc"] == 1.0  # of the labels that occur
    single = measure("single_label_classification", np.eye(2), np.array([0, 0]))
    assert single["eval_roc_auc"] is None
    assert single["eval_matthews_correlation"] == metrics.matthews_corrcoef([0, 0], [0, 1]) == 0
    always = measure("single_label_classification", np.eye(2)[[0, 0]], np.array([0, 0]))
    assert (always["eval_accuracy"], always["eval_matthews_correlation"]) == (1, 0)
    for labels in (np.zeros((4, 2), int), np.ones((4, 2), int)):
        several = measure("multi_label_classification", np.eye(2)[[0, 1, 1, 0]], labels)
        assert several["eval_roc_auc"] is None
        assert undefined_metrics("multi_label_classification", labels) == ["roc_auc"]
    assert undefined_metrics("single_label_classification", np.array([2, 2])) == ["roc_auc"]
    assert undefined_metrics("single_label_classification", np.array([2, 1])) == []
    assert undefined_metrics("regression", np.ones(3)) == ["pearsonr", "spearmanr"]


@pytest.mark.parametrize("problem_type", list(METRICS))
def test_the_keys_are_those_of_the_table(problem_type: str):
    labels = {
        "multi_label_classification": np.eye(2, dtype=int),
        "regression": np.array([0.5, 2.0]),
    }
    logits = np.eye(2)[:, :1] if problem_type == "regression" else np.eye(2)
    results = measure(problem_type, logits, labels.get(problem_type, np.array([0, 1])))
    assert list(results) == [f"eval_{name}" for name in METRICS[problem_type]]


def test_a_copied_folder_measures_by_its_own_metrics_and_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("classification_metrics.py", "evaluate_metric.py"):
        shutil.copy(ROOT / "recipes/classification" / name, tmp_path)
    path, given = tmp_path / "classification_metrics.py", ("regression", np.eye(2)[:, :1])
    before = measure(*given, np.array([0.5, 2.0]))
    for constant in (41.0, 42.0):  # edited, and edited again
        text = path.read_text()
        path.write_text(text + f'METRICS["regression"]["spearmanr"] = lambda outputs: {constant}\n')
        spec = importlib.util.spec_from_file_location("copied_metrics", path)
        copied = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copied)
        found = copied.measure(*given, np.array([0.5, 2.0]))
        assert found == before | {"eval_spearmanr": constant}
    assert measure(*given, np.array([0.5, 2.0])) == before


def test_predictions_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="not finite: lower the learning_rate"):
        check_finite(np.array([[0.0, np.nan]]))


def test_calibration_error_by_hand():
    confidence = np.array([0.55, 0.6, 0.9, 0.95, 1.0])
    is_right = np.array([True, False, True, True, True])
    found = reliability(confidence, is_right, bins=5)
    # bins (0.4, 0.6] and (0.8, 1]
    assert found.counts.tolist() == [0, 0, 2, 0, 3]
    assert found.accuracy[[2, 4]].tolist() == [0.5, 1.0]
    expected = 0.4 * abs(0.5 - 0.575) + 0.6 * abs(1 - 0.95)
    assert found.expected_calibration_error == pytest.approx(expected)


@pytest.mark.parametrize(
    ("probabilities", "labels", "plots"),
    [
        (np.eye(3)[[0, 1, 2, 2]], np.array([0, 1, 2, 1]), ["confusion_matrix", "reliability"]),
        (np.array([[0.9, 0.2], [0.1, 0.7]]), np.array([[1, 0], [1, 1]]), ["reliability"]),
        (np.array([1.0, 2.5]), np.array([1.5, 2.0]), ["predictions"]),
    ],
)
def test_plots_of_each_kind_of_problem(
    probabilities: np.ndarray, labels: np.ndarray, plots: list[str], tmp_path: Path
):
    paths = write_figures(
        tmp_path, ["a", "b", "c"][: probabilities.shape[-1]], probabilities, labels
    )
    assert paths == [tmp_path / "plots" / f"{plot}.png" for plot in plots]
    assert all(path.stat().st_size > 10_000 for path in paths)
