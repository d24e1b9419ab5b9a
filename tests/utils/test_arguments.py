"""utils/arguments.py: defaults that depend on what is trained."""

import pytest

from recipes.bert import distill as bert_distillation
from recipes.causal_lm import distill as distillation
from recipes.causal_lm import finetune, pretrain
from recipes.classification import distill as classifier_distillation
from recipes.classification import finetune as classification
from utils.config import as_yaml, parse, read_yaml

STREAM = ["--tokenizer", "t", "--train_sources", "[{path: a.jsonl}]", "--max_steps", "9"]
TABLES = ["--tokenizer", "t", "--train_data", "[{path: a.jsonl}]"]
LORA = ["--lora", "{r: 4}"]
TEACHER = ["--teacher.model_name_or_path", "org/teacher"]


@pytest.mark.parametrize(
    ("script", "words", "rate"),
    [
        (pretrain, STREAM, 3e-4),
        (finetune, TABLES, 3e-4),
        (finetune, [*TABLES, "--model_name_or_path", "a"], 2e-5),
        (finetune, [*TABLES, *LORA], 2e-4),
        (finetune, [*TABLES, *LORA, "--learning_rate", "1e-4"], 1e-4),
        (classification, [*TABLES, *LORA, "--learning_rate", "null"], 2e-4),
        (classification, [*TABLES, "--model_name_or_path", "a", "--freeze", "encoder"], 2e-5),
        (distillation, [*STREAM, *TEACHER], 3e-4),
        (distillation, [*TABLES, *TEACHER, "--on_policy_share", "0"], 3e-4),
        (distillation, [*TABLES, *TEACHER, "--student_layers", "[0]"], 2e-5),
        (bert_distillation, [*STREAM, *TEACHER], 3e-4),
        (classifier_distillation, [*TABLES, *TEACHER, "--model_name_or_path", "a"], 2e-5),
    ],
)
def test_the_learning_rate_suits_what_is_trained(script, words, rate, tmp_path):
    arguments = parse(script.Arguments, words)
    assert arguments.learning_rate == rate
    (tmp_path / "config.yaml").write_text(as_yaml(arguments))  # and stands there
    assert read_yaml(str(tmp_path / "config.yaml"))[0]["learning_rate"] == rate


def test_a_learning_rate_that_is_far_from_the_usual_is_told_once(pretrain):
    told = "learning_rate: {} times the 0.0003 that is usual for such a run\n"
    assert pretrain(max_steps=2, learning_rate=1e-2).output.count(told.format(33.3)) == 1
    assert pretrain("low", max_steps=1, learning_rate=1e-6).output.count(told.format(0.00333)) == 1
    assert "usual" not in pretrain("near", max_steps=1, learning_rate=8e-3).output


@pytest.mark.parametrize(
    ("script", "words", "metric", "is_greater_better"),
    [
        (pretrain, STREAM, "eval_bits_per_byte", False),
        (classification, TABLES, "expected_calibration_error", False),
        (classification, TABLES, "accuracy", True),
        (classification, [*TABLES, "--greater_is_better", "true"], "loss", True),
    ],
)
def test_the_greater_is_better_but_for_losses_and_errors(script, words, metric, is_greater_better):
    args = parse(script.Arguments, [*words, "--metric_for_best_model", metric])
    assert args.is_greater_better == is_greater_better
