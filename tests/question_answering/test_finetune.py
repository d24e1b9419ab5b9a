"""The question answering recipe: an exact loss, the same on any layout; what it predicts, exports
and refuses."""

import os
import random
import signal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer

from answers import best_answers, best_spans, collate_windows, make_windows
from comparing import (
    assert_same_losses,
    assert_same_run,
    assert_tables_are_told_apart,
    copy_before_its_end,
    run_code_of_card,
)
from conftest import WORDS, write_jsonl
from launching import TINY_BERT, checkpoints, command_line, metrics, predictions, run, tables
from questions import Answer, Question, QuestionColumns, read_questions
from recipes.question_answering import finetune as question_answering
from recipes.question_answering.finetune import Arguments, SpanLoss
from squad_metrics import squad_scores
from utils.config import parse
from utils.tables import READABLE, Table

SCRIPT = "recipes/question_answering/finetune.py"
MODEL = TINY_BERT["model"]
SETTINGS = {
    "model": MODEL,
    "sequence_length": 40,
    "doc_stride": 12,
    "global_batch_size": 16,
    "per_device_batch_size": 4,
    "max_steps": 6,
    "eval_steps": 3,
    "save_steps": 3,
    "learning_rate": 3e-3,
    "adam_epsilon": 1e-4,  # the signs of gradients near 0 are those of rounding
    "metric_for_best_model": "eval_best_f1",
    "report_to": [],
}
PLACES = ("dra", "vorel", "sulren")


def make_rows(count, seed, may_lack=True):
    """Which word of the context is a place? One context in four has none."""
    draw = random.Random(seed)
    others = [word for word in WORDS[:60] if word not in PLACES]
    rows = []
    for number in range(count):
        words = draw.choices(others, k=draw.randint(3, 40))
        has_answer = not may_lack or number % 4 > 0
        place, start = draw.choice(PLACES), draw.randrange(len(words))
        before = "".join(f"{word} " for word in words[:start])
        context = before + " ".join([place, *words[start:]])
        answers = {"text": [place], "answer_start": [len(before)]}
        rows.append(
            {
                "id": f"{seed}-{number}",
                "context": context if has_answer else " ".join(words),
                "question": draw.choice(["ka to?", "where mi?"]),
                "answers": answers if has_answer else {"text": [], "answer_start": []},
            }
        )
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squad")
    for seed, (name, count) in enumerate([("train", 96), ("validation", 20), ("test", 20)]):
        write_jsonl(folder / f"{name}.jsonl", make_rows(count, seed))
    return folder


def words_of(folder, data, tokenizer, **settings):
    values = {"output_dir": folder, "tokenizer": tokenizer, **SETTINGS, **tables(data)}
    return command_line(values | settings)


@pytest.fixture
def answer(call, data, wordpiece_folder, tmp_path):
    """answer(name, **settings): the recipe."""

    def begin(name="run", **settings):
        folder = tmp_path / name
        tokenizer = settings.pop("tokenizer", wordpiece_folder)
        words = words_of(folder, data, tokenizer, **settings)
        return call(question_answering.main, words, folder)

    return begin


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data, wordpiece_folder):
    """The folder of a run on one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    run(None, 1, words_of(folder, data, wordpiece_folder), folder / "log.txt", script=SCRIPT)
    return folder


def windows_of(path, tokenizer, **options):
    questions = read_questions([Table(str(path))], QuestionColumns())
    return questions, make_windows(questions, tokenizer, 40, 12, **options)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "modernbert", "albert"])
def test_loss_is_that_over_the_candidates_and_padding_changes_nothing(model_type, data, wordpiece):
    extra = {"albert": {"embedding_size": 16}, "roberta": {"type_vocab_size": 1}}
    extra = extra.get(model_type, {})
    if model_type == "modernbert":
        extra = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    settings = {**MODEL, "model_type": model_type, "vocab_size": 320, "pad_token_id": 0, **extra}
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_config(AutoConfig.for_model(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    objective = SpanLoss(model)
    _, windows = windows_of(data / "train.jsonl", wordpiece)
    windows = windows[:12]
    expected = 0.0
    for window in windows:
        ids = torch.from_numpy(window["input_ids"][None].astype(np.int64))
        types = torch.from_numpy(window["token_type_ids"][None].astype(np.int64))
        inputs = {"token_type_ids": types} if model_type in ("bert", "albert") else {}
        output = model(input_ids=ids, **inputs)
        places = [window["cls"], *range(*window["context"])]
        for logits, name in ((output.start_logits, "start"), (output.end_logits, "end")):
            log_probabilities = logits[0, places].double().log_softmax(0)
            expected -= float(log_probabilities[places.index(window[name])].detach()) / 2
    batch = collate_windows(windows, 0)
    assert len({len(window["input_ids"]) for window in windows}) > 3
    assert float(objective(**batch)["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    assert objective.counts(batch) == {"loss": 12}
    empty = collate_windows([], 0)
    loss = objective(**empty)["loss"]
    assert (float(loss.detach()), objective.counts(empty)) == (0.0, {"loss": 0})
    loss.backward()
    assert all(p.grad is None or torch.all(p.grad == 0) for p in model.parameters())


def test_micro_batches_change_nothing(answer):
    runs = [answer(f"run-{size}", per_device_batch_size=size) for size in (1, 3, 16)]
    for other in runs[1:]:
        assert_same_losses(other.folder, runs[0].folder, 1e-5)


@pytest.mark.parametrize(
    ("config", "processes"), [("multi_cpu", 3), ("zero1", 2), ("zero2", 2), ("zero3", 2)]
)
def test_ranks_and_stages_change_nothing(
    config, processes, reference, data, wordpiece_folder, tmp_path
):
    folder = tmp_path / "run"
    words = words_of(folder, data, wordpiece_folder)
    run(config, processes, words, tmp_path / "log.txt", script=SCRIPT)
    # no gradient but rounding
    assert_same_run(folder, reference, without=("key.bias", "qa_outputs.bias"))
    for one, other in zip(predictions(folder), predictions(reference), strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["no_answer_score"] == pytest.approx(other["no_answer_score"], abs=1e-4)


def test_a_resumed_run_is_bit_identical(answer):
    model = {**MODEL, "hidden_dropout_prob": 0.1}
    whole = answer("whole", model=model).folder
    part = whole.with_name("part")
    copy_before_its_end(whole, part)
    ended = answer("part", model=model)
    assert "continuing" in ended.output
    assert metrics(part) == metrics(whole)
    for name in ("model/model.safetensors", "predictions.jsonl"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    assert "is finished at step 6" in answer("part", model=model).output


@pytest.mark.parametrize(("calls", "step"), [(1, 3), (60, 6)])
def test_a_signal_in_an_evaluation_is_heard(calls, step, answer, monkeypatch):
    whole = answer("whole")
    decode, count = question_answering.best_spans, iter(range(1, 10**6))

    def interrupted(*arguments):
        if next(count) == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(*arguments)

    monkeypatch.setattr(question_answering, "best_spans", interrupted)
    ended = answer("part")
    assert ended.status == 0
    assert f"stopped after step {step}; resume with: " in ended.output
    assert not (ended.folder / "predictions.jsonl").exists()
    answer("part")
    assert metrics(ended.folder) == metrics(whole.folder)
    assert predictions(ended.folder) == predictions(whole.folder)


def test_it_learns_and_what_is_exported_predicts_the_same(answer, data):
    ended = answer(max_steps=90, eval_steps=30, save_steps=30, adam_epsilon=1e-8)
    assert ended.status == 0
    records = [record for record in metrics(ended.folder) if "eval_best_f1" in record]
    best = max(records, key=lambda record: record["eval_best_f1"])
    assert best["eval_best_f1"] > 80  # it is 25 if no question is answered
    tokenizer = AutoTokenizer.from_pretrained(ended.folder / "model")
    model = AutoModelForQuestionAnswering.from_pretrained(ended.folder / "model").eval()
    questions, windows = windows_of(data / "test.jsonl", tokenizer, keep_offsets=True)
    found = []
    for window in windows:
        inputs = {
            name: torch.from_numpy(window[name][None].astype(np.int64))
            for name in ("input_ids", "token_type_ids")
        }
        with torch.no_grad():
            output = model(**inputs)
        logits = (output.start_logits[0].numpy(), output.end_logits[0].numpy())
        found.append(best_spans(window, *logits, 30, 20))
    expected = best_answers(questions, windows, found, 20)
    threshold = best["eval_best_f1_threshold"]
    for record, question, prediction in zip(
        predictions(ended.folder), questions, expected, strict=True
    ):
        is_none = prediction.no_answer_score > threshold
        assert record["id"] == question.id
        assert record["prediction"] == ("" if is_none else prediction.text)
        assert record["no_answer_score"] == pytest.approx(prediction.no_answer_score, abs=1e-4)
        assert [entry["text"] for entry in record["n_best"][:2]] == [
            text for text, _ in prediction.best[:2]
        ]
    scores = squad_scores(
        [prediction.text for prediction in expected],
        [question.answer_texts for question in questions],
        [prediction.no_answer_score for prediction in expected],
        threshold,
    )
    (test,) = (record for record in metrics(ended.folder) if "test_f1" in record)
    assert {name: test[f"test_{name}"] for name in ("f1", "exact_match")} == {
        name: pytest.approx(scores[name]) for name in ("f1", "exact_match")
    }
    assert f"no-answer threshold of the test: {threshold:.4f}" in ended.output
    run_code_of_card(ended.folder)


def test_tables_are_told_apart(answer, data):
    assert_tables_are_told_apart(answer, data / "train.jsonl", data / "test.jsonl", "windows")


def test_questions_that_all_have_an_answer(answer, data, tmp_path):
    for seed, part in enumerate(("train", "validation", "test")):
        write_jsonl(tmp_path / f"{part}.jsonl", make_rows(24, seed, may_lack=False))
    ended = answer(**tables(tmp_path), metric_for_best_model="eval_f1")
    (record, *_) = (record for record in metrics(ended.folder) if "eval_f1" in record)
    assert record.keys() == {"step", "eval_loss", "eval_exact_match", "eval_f1"}
    assert all(record["prediction"] for record in predictions(ended.folder))
    ended = answer("other", **tables(tmp_path))
    assert ended.status == 2
    assert ended.error == (
        "error: metric_for_best_model: eval_best_f1 is not measured; these are: eval_loss, "
        "eval_exact_match, eval_f1\n"
    )


def test_predictions_that_are_not_numbers_end_the_run(answer, monkeypatch):
    def broken(window, start, end, *options):
        return best_spans(window, np.full_like(start, np.nan), end, *options)

    monkeypatch.setattr(question_answering, "best_spans", broken)
    ended = answer(metric_for_best_model="f1")
    assert (ended.status, ended.error) == (
        2,
        "error: the model's predictions are not finite: lower the learning_rate\n",
    )


def test_a_given_threshold_is_that_of_the_test(answer):
    ended = answer(null_score_diff_threshold=-1e9)
    assert not any(record["prediction"] for record in predictions(ended.folder))
    (test,) = (record for record in metrics(ended.folder) if "test_f1" in record)
    assert test["test_f1"] == 25.0


def test_lora_trains_its_adapter_and_the_head(answer, reference, data):
    base = str(reference / "model")
    lora = {"r": 4, "lora_alpha": 8}
    ended = answer(model_name_or_path=base, lora=lora, num_train_epochs=1, max_steps=4)
    assert ended.status == 0, ended.error
    model = AutoModelForQuestionAnswering.from_pretrained(base)
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapted = PeftModel.from_pretrained(model, ended.folder / "model").eval()
    run_code_of_card(ended.folder)
    as_in_card = AutoModelForQuestionAnswering.from_pretrained(ended.folder / "model")
    rows = {"input_ids": torch.arange(5, 25)[None]}
    with torch.no_grad():
        found, expected = (m.eval()(**rows).start_logits for m in (as_in_card, adapted))
    assert torch.allclose(found, expected, atol=1e-6)
    head = adapted.get_base_model().qa_outputs.modules_to_save["default"].weight
    assert not torch.equal(head, before["qa_outputs.weight"])
    tokenizer = AutoTokenizer.from_pretrained(ended.folder / "model")
    questions, windows = windows_of(data / "test.jsonl", tokenizer, keep_offsets=True)
    with torch.no_grad():
        logits = SpanLoss(adapted.get_base_model())(**collate_windows(windows, 0), per_window=True)[
            1:
        ]
    found = [
        best_spans(window, start, end, 30, 20)
        for window, start, end in zip(windows, *(x.numpy() for x in logits), strict=True)
    ]
    for record, prediction in zip(
        predictions(ended.folder), best_answers(questions, windows, found, 20), strict=True
    ):
        assert record["n_best"][0]["score"] == pytest.approx(prediction.best[0][1], abs=1e-4)


def test_frozen_parameters_do_not_move(answer, reference):
    base = reference / "model"
    ended = answer(model_name_or_path=str(base), freeze="encoder", max_steps=3)
    before, after = (load_file(f / "model.safetensors") for f in (base, ended.folder / "model"))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {"qa_outputs.weight", "qa_outputs.bias"}


def test_refusals(answer, data, tokenizer_folder, tmp_path):
    path = tmp_path / "rows.jsonl"

    def refused(message, rows=None, **settings):
        if rows is not None:
            write_jsonl(path, rows)
            settings = {"train_data": [{"path": str(path)}], **settings}
        ended = answer("refused", **settings)
        assert (ended.status, ended.error) == (2, f"error: {message}\n")
        assert not ended.folder.exists()

    rows = make_rows(3, 0)
    refused(
        f"{path}, line 2: the answer 'nope' does not stand at character 0 of context, where there "
        f"is {rows[1]['context'][:4]!r}",
        [rows[0], {**rows[1], "answers": {"text": ["nope"], "answer_start": [0]}}],
    )
    refused(f"{path}, line 1: question is empty", [{**rows[0], "question": ""}])
    refused(
        f"{path}, line 1: no column 'query'; there are: id, context, question, answers",
        rows,
        question_column="query",
    )
    refused(
        f"{data / 'validation.jsonl'}, line 1: the question has no answer, and all of train_data "
        "have one: nothing would teach the model to give none",
        make_rows(8, 0, may_lack=False),
    )
    long = {**rows[1], "context": " ".join(WORDS)}
    long["answers"] = {"text": [long["context"]], "answer_start": [0]}
    refused(
        "train_data: no window holds a whole answer: raise sequence_length, or doc_stride",
        [long],
        validation_data=[],
        test_data=[],
        metric_for_best_model="eval_loss",
    )
    refused(
        "tokenizer: it has no [CLS] token, which stands for no answer", tokenizer=tokenizer_folder
    )
    refused("doc_stride must be at least 0 and less than sequence_length 40, not 40", doc_stride=40)
    refused("max_answer_length must be at least 1, not 0", max_answer_length=0)
    refused(
        f"no file {tmp_path / 'nothing.jsonl'} ({READABLE})",
        test_data=[{"path": str(tmp_path / "nothing.jsonl")}],
    )
    refused(
        "sequence_length: 65 is more than the model's max_position_embeddings of 64",
        sequence_length=65,
    )


def test_another_doc_stride_is_another_run(answer):
    answer(max_steps=3)
    ended = answer(max_steps=6, doc_stride=13)
    assert ended.status == 2
    assert "doc_stride was 12 and is 13" in ended.error
    assert len(checkpoints(ended.folder)) == 1


CONFIGS = sorted(Path("recipes/question_answering/configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configs_are_complete_and_run_on_such_rows(file, call, wordpiece_folder, tmp_path):
    args = parse(Arguments, [str(file)])
    assert args.output_dir == f"runs/question_answering/{file.stem}"
    assert args.test_data
    path, folder = tmp_path / "rows.parquet", tmp_path / "run"
    rows = make_rows(8, 0, may_lack=not file.stem.endswith("_squad"))
    rows = [{**row, "title": "A title"} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    settings = {"output_dir": str(folder), "max_steps": 1, "report_to": [], "model": MODEL}
    settings |= {f"{part}_data": [{"path": str(path)}] for part in ("train", "validation", "test")}
    settings |= {"tokenizer": str(wordpiece_folder), "model_name_or_path": None}
    settings |= {"sequence_length": 48, "doc_stride": 16, "warmup_steps": 0}
    ended = call(question_answering.main, [str(file), *command_line(settings)], folder)
    assert ended.status == 0, ended.error
    assert len(predictions(folder)) == 8


def test_a_client_reads_special_tokens_as_training_did(reference, wordpiece):
    client = AutoTokenizer.from_pretrained(reference / "model")
    question = "[SEP] ka [MASK] to [CLS]?"
    context = "dra [SEP] vorel [CLS] [PAD] sulren [UNK] ka"
    answers = [Answer("sulren", context.index("sulren"))]
    asked = Question("1", question, context, answers, "row 1")
    (window,) = make_windows([asked], wordpiece, 100, 12)
    inputs = client(question, context, truncation="only_second", max_length=100)
    assert inputs["input_ids"] == window["input_ids"].tolist()
    assert inputs["token_type_ids"] == window["token_type_ids"].tolist()
    assert inputs["input_ids"].count(client.sep_token_id) == 2
    answer = inputs["input_ids"][window["start"] : window["end"] + 1]
    assert client.decode(answer) == "sulren"
