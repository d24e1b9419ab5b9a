"""The summarization recipe: transformers' own losses, the same on any layout; what it generates,
exports and refuses."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sacrebleu
import torch
from peft import PeftModel
from rouge_score.rouge_scorer import RougeScorer
from safetensors.numpy import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    T5ForConditionalGeneration,
)
from transformers.trainer_pt_utils import LabelSmoother

from comparing import (
    assert_same_losses,
    assert_same_run,
    assert_tables_are_told_apart,
    copy_before_its_end,
    run_code_of_card,
)
from conftest import WORDS, write_jsonl
from launching import TINY_RUN, checkpoints, command_line, metrics, predictions, run, steps, tables
from recipes.summarization import finetune as summarization
from recipes.summarization.finetune import Arguments, TargetLoss
from text_pairs import Pair, PairArguments, PairEncoder
from utils.config import parse

SCRIPT = "recipes/summarization/finetune.py"
T5 = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
}
BART = {
    "model_type": "bart",
    "d_model": 32,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
MARIAN = {**BART, "model_type": "marian", "decoder_start_token_id": 0, "forced_eos_token_id": 2}
LLAMA = TINY_RUN["model"]
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
MODELS = {"t5": T5, "bart": BART, "marian": MARIAN, "llama": LLAMA, "gpt2": GPT2}
SETTINGS = {
    "model": T5,
    "max_source_length": 24,
    "max_target_length": 8,
    "global_batch_size": 16,
    "per_device_batch_size": 4,
    "max_steps": 6,
    "eval_steps": 3,
    "save_steps": 3,
    "learning_rate": 3e-3,
    "adam_epsilon": 1e-4,  # the signs of gradients near 0 are those of rounding
    "num_beams": 2,
    "per_device_eval_batch_size": 4,
    "report_to": [],
}
PARTS = ("train", "validation", "test")


def make_rows(count, seed):
    """The summary is the first word of the document, twice."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices(WORDS[:20], k=draw.randint(2, 9))
        rows.append({"document": " ".join(words), "summary": f"{words[0]} {words[0]}"})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("summaries")
    for seed, (name, count) in enumerate(zip(PARTS, (64, 12, 17), strict=True)):
        write_jsonl(folder / f"{name}.jsonl", make_rows(count, seed))
    return folder


def words_of(folder, data, tokenizer, **settings):
    values = {"output_dir": folder, "tokenizer": tokenizer, **SETTINGS, **tables(data)}
    return command_line(values | settings)


@pytest.fixture
def summarize(call, data, tokenizer_folder, tmp_path):
    """summarize(name, **settings): the recipe."""

    def begin(name="run", **settings):
        folder = tmp_path / name
        tokenizer = settings.pop("tokenizer", tokenizer_folder)
        words = words_of(folder, data, tokenizer, **settings)
        return call(summarization.main, words, folder)

    return begin


def decoder_settings(**settings):
    return {"model": LLAMA, "source_suffix": "\nTL;DR:\n", **settings}


REFERENCES = {"t5": {}, "llama": decoder_settings()}


@pytest.fixture(scope="module")
def references(tmp_path_factory, data, tokenizer_folder):
    """The folders of runs on one process that nothing disturbs."""
    folders = {}
    for name, settings in REFERENCES.items():
        folders[name] = folder = tmp_path_factory.mktemp(name)
        words = words_of(folder, data, tokenizer_folder, **settings)
        run(None, 1, words, folder / "log.txt", script=SCRIPT)
    return folders


def build(name, tokenizer, noise=0.1):
    special = {n: getattr(tokenizer, n) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(**MODELS[name], vocab_size=512, **special)
    if name == "t5":
        config.decoder_start_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    auto_model = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto_model.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    suffix = "" if config.is_encoder_decoder else ":\n"
    return model, PairEncoder(tokenizer, PairArguments(source_suffix=suffix), config)


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_that_of_transformers_and_padding_changes_nothing(name, tokenizer):
    model, encode = build(name, tokenizer)
    examples = encode([Pair(row["document"], row["summary"]) for row in make_rows(6, 0)])
    objective = TargetLoss(model, label_smoothing_factor=0.1)
    expected = smoothed = 0.0
    for example in examples:
        batch = encode.collate([example])
        output = model(**batch)
        count = objective.counts(batch)["loss"]
        expected += float(output.loss.detach()) * count
        is_decoder = not model.config.is_encoder_decoder
        smoothed += float(LabelSmoother(0.1)(output, batch["labels"], is_decoder).detach()) * count
    batch = encode.collate(examples)
    assert len({example["source_length"] for example in examples}) > 3
    each = objective(**batch, per_example=True).detach()
    assert float(each.sum()) == pytest.approx(expected, rel=1e-5)
    assert float(objective(**batch)["loss"].detach()) == pytest.approx(smoothed, rel=1e-5)
    assert smoothed != pytest.approx(expected, rel=5e-5)
    assert objective.counts(batch)["loss"] == sum(
        len(example["input_ids"]) - example["source_length"] for example in examples
    )
    empty = encode.collate([])
    loss = objective(**empty)["loss"]
    assert (float(loss.detach()), objective.counts(empty)) == (0.0, {"loss": 0})
    loss.backward()
    assert all(p.grad is None or torch.all(p.grad == 0) for p in model.parameters())


def generated_one_by_one(folder, data, settings):
    """What `generate` of the exported model writes for each document of the test alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    suffix = settings.get("source_suffix", "")
    auto_model = AutoModelForCausalLM if suffix else AutoModelForSeq2SeqLM
    model = auto_model.from_pretrained(folder / "model").eval()
    names = ("length_penalty", "no_repeat_ngram_size", "min_new_tokens")
    options = {name: settings[name] for name in names if name in settings}
    options["num_beams"] = settings.get("num_beams", SETTINGS["num_beams"])
    options["max_new_tokens"] = settings.get("max_new_tokens", SETTINGS["max_target_length"])
    for name, value in options.items():
        assert getattr(model.generation_config, name) == value
    texts = []
    for line in (data / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        inputs = tokenizer(row["document"] + suffix, return_tensors="pt")
        tokens = model.generate(input_ids=inputs["input_ids"], **options)[0]
        tokens = tokens[inputs["input_ids"].shape[1] :] if suffix else tokens
        texts.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return texts


GENERATED = {
    "t5": {"num_beams": 3, "length_penalty": 2.0, "max_new_tokens": 6},
    "bart": {"num_beams": 3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "llama": {"num_beams": 3, "length_penalty": 0.5, "no_repeat_ngram_size": 3},
    "gpt2": {"num_beams": 1},
}


@pytest.mark.parametrize("name", GENERATED)
def test_batches_generate_what_the_export_generates_one_by_one(
    name, summarize, data, tokenizer, tmp_path
):
    model, encode = build(name, tokenizer, noise=0.5)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "given")
    settings = {**GENERATED[name], "source_suffix": encode.arguments.source_suffix}
    given = {"model_name_or_path": str(tmp_path / "given"), "max_steps": 1}
    ended = summarize(**settings, **given)
    assert ended.status == 0, ended.error
    texts = [record["prediction"] for record in predictions(ended.folder)]
    assert texts == generated_one_by_one(ended.folder, data, settings)
    assert len(set(texts)) > 5
    run_code_of_card(ended.folder)


def test_tables_are_told_apart(summarize, data):
    assert_tables_are_told_apart(summarize, data / "train.jsonl", data / "test.jsonl", "tokens")


def test_scores_are_those_of_the_libraries(summarize):
    ended = summarize(metrics=["rouge", "bleu", "chrf"], max_steps=40, eval_generate_examples=5)
    found = predictions(ended.folder)
    texts = [record["prediction"] for record in found]
    targets = [record["reference"] for record in found]
    (test,) = (record for record in metrics(ended.folder) if "test_loss" in record)
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    each = [scorer.score(r, p) for r, p in zip(targets, texts, strict=True)]
    for name in ("rouge1", "rougeL"):
        expected = 100 * sum(score[name].fmeasure for score in each) / len(each)
        assert test[f"test_{name}"] == pytest.approx(expected)
    assert test["test_chrf"] == sacrebleu.corpus_chrf(texts, [targets]).score > 0
    assert test["test_bleu"] == sacrebleu.corpus_bleu(texts, [targets]).score
    assert "how bleu is computed: nrefs:1|case:mixed|eff:no|tok:13a" in ended.output


@pytest.mark.parametrize(
    ("config", "processes", "name"),
    [
        ("multi_cpu", 3, "llama"),
        ("zero1", 2, "t5"),
        ("zero2", 2, "t5"),
        ("zero3", 2, "t5"),
        ("zero3", 2, "llama"),
    ],
)
def test_ranks_and_stages_change_nothing(
    config, processes, name, references, data, tokenizer_folder, tmp_path
):
    folder, reference = tmp_path / "run", references[name]
    words = words_of(folder, data, tokenizer_folder, **REFERENCES[name])
    run(config, processes, words, tmp_path / "log.txt", script=SCRIPT)
    assert_same_run(folder, reference)
    for one, other in zip(predictions(folder), predictions(reference), strict=True):
        assert one == other | {"loss": pytest.approx(other["loss"], rel=1e-5)}


def test_micro_batches_change_nothing(summarize):
    settings = {"eval_generate_examples": 0, "test_data": [], "label_smoothing_factor": 0.1}
    runs = [summarize(f"run-{n}", per_device_batch_size=n, **settings) for n in (1, 3, 16)]
    for other in runs[1:]:
        assert_same_losses(other.folder, runs[0].folder, 1e-5)
    (record, *_) = (record for record in metrics(runs[0].folder) if "eval_loss" in record)
    assert record.keys() == {"step", "eval_loss"}  # no text was generated


def test_a_resumed_run_is_bit_identical(summarize):
    model = {**T5, "dropout_rate": 0.1}
    whole = summarize("whole", model=model).folder
    part = whole.with_name("part")
    copy_before_its_end(whole, part)
    ended = summarize("part", model=model)
    assert "continuing" in ended.output
    assert metrics(part) == metrics(whole)
    for name in ("model/model.safetensors", "model/generation_config.json", "predictions.jsonl"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    assert "is finished at step 6" in summarize("part", model=model).output


@pytest.mark.parametrize(("calls", "step"), [(1, 3), (8, 6)])
def test_a_signal_while_texts_are_generated_is_heard(calls, step, summarize, monkeypatch):
    whole = summarize("whole")
    write, count = T5ForConditionalGeneration.generate, iter(range(1, 10**6))

    def interrupted(*arguments, **options):
        if next(count) == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments, **options)

    monkeypatch.setattr(T5ForConditionalGeneration, "generate", interrupted)
    ended = summarize("part")
    assert ended.status == 0
    assert f"stopped after step {step}; resume with: " in ended.output
    assert not (ended.folder / "predictions.jsonl").exists()
    summarize("part")
    assert metrics(ended.folder) == metrics(whole.folder)
    assert predictions(ended.folder) == predictions(whole.folder)


def test_it_learns(summarize):
    settings = {"max_steps": 150, "eval_steps": 50, "save_steps": 50, "adam_epsilon": 1e-8}
    ended = summarize(model=BART, num_beams=1, lead_sentences=1, **settings)
    (test,) = (record for record in metrics(ended.folder) if "test_loss" in record)
    first = next(record for record in steps(ended.folder))
    assert test["test_loss"] < first["loss"] / 3
    lead = next(line for line in ended.output.splitlines() if "rouge1 of the first 1 sen" in line)
    assert test["test_rouge1"] > float(lead.split()[-1])


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_lora_trains_its_adapter_alone(name, summarize, references, data):
    base = str(references[name] / "model")
    settings = {**REFERENCES[name], "model_name_or_path": base, "lora": {"r": 4}}
    ended = summarize(**settings)
    assert ended.status == 0, ended.error
    auto_model = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    model = PeftModel.from_pretrained(auto_model.from_pretrained(base), ended.folder / "model")
    trained = sum(p.abs().sum() for n, p in model.named_parameters() if "lora_B" in n)
    assert trained > 0
    texts = []
    merged = model.merge_and_unload()
    merged.save_pretrained(ended.folder / "merged")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(checkpoints(ended.folder)[-1] / file, ended.folder / "merged" / file)
    (ended.folder / "model").rename(ended.folder / "adapter")
    (ended.folder / "merged").rename(ended.folder / "model")
    texts = generated_one_by_one(ended.folder, data, settings)
    assert [record["prediction"] for record in predictions(ended.folder)] == texts


def test_an_adapter_beside_the_head_of_a_decoder(summarize, references):
    base = str(references["llama"] / "model")
    for number, lora in enumerate(
        [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}]
    ):
        settings = {**REFERENCES["llama"], "model_name_or_path": base, "lora": {"r": 4, **lora}}
        ended = summarize(f"{number}", max_steps=1, **settings)
        assert ended.status == 0, ended.error


@pytest.mark.parametrize("name", REFERENCES)
def test_the_card_of_an_adapter_writes_what_the_run_wrote(name, summarize, references):
    """With the settings of generation of the run, not those of the base model."""
    base = str(references[name] / "model")
    settings = {**REFERENCES[name], "model_name_or_path": base, "lora": {"r": 4}}
    ended = summarize(
        **settings, max_steps=4, learning_rate=3e-2, min_new_tokens=3, max_new_tokens=3
    )
    assert ended.status == 0, ended.error
    card = (ended.folder / "model/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace('"."', repr(str(ended.folder / "model")))
    lines = (ended.folder / "predictions.jsonl").read_text().splitlines()[:5]
    for record in map(json.loads, lines):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code.replace('"The text that is to be read."', repr(record["source"])), {})
        assert printed.getvalue().strip() == record["prediction"]


def test_frozen_parameters_do_not_move(summarize, references):
    base = references["t5"] / "model"
    ended = summarize(model_name_or_path=str(base), freeze="encoder", max_steps=3)
    before, after = (load_file(f / "model.safetensors") for f in (base, ended.folder / "model"))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("decoder.") for name in moved)


def test_translation_columns(summarize, tmp_path):
    rows = [
        {"translation": {"en": row["document"], "ro": row["summary"]}} for row in make_rows(16, 0)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    tables = {f"{part}_data": [{"path": str(tmp_path / "rows.jsonl")}] for part in PARTS}
    ended = summarize(
        **tables,
        source_column="translation.en",
        target_column="translation.ro",
        metrics=["bleu", "chrf"],
        metric_for_best_model="eval_chrf",
        max_steps=2,
    )
    assert ended.status == 0, ended.error
    found = [record["reference"] for record in predictions(ended.folder)]
    assert found == [row["translation"]["ro"] for row in rows]
    assert "pipeline_tag: translation" in (ended.folder / "README.md").read_text()


def test_refusals(summarize, wordpiece_folder, tmp_path):
    path = tmp_path / "rows.jsonl"

    def refused(message, rows=None, **settings):
        if rows is not None:
            write_jsonl(path, rows)
            settings = {"train_data": [{"path": str(path)}], **settings}
        ended = summarize("refused", **settings)
        assert (ended.status, ended.error) == (2, f"error: {message}\n")
        assert not ended.folder.exists()

    rows = make_rows(3, 0)
    refused(f"{path}, line 2: summary is empty", [rows[0], {**rows[1], "summary": " "}])
    refused(f"{path}, line 1: document must be text, not 3", [{**rows[1], "document": 3}])
    refused(
        f"{path}, line 1: no column 'text'; there are: document, summary",
        rows,
        source_column="text",
    )
    refused("tokenizer: it has no eos_token, which ends a target", tokenizer=wordpiece_folder)
    refused(
        "source_suffix: llama has no encoder: give what stands between source and target, for "
        'example "\\nTL;DR:\\n"',
        model=LLAMA,
    )
    refused("source_suffix: t5 reads source and target apart: use source_prefix", source_suffix=":")
    refused(
        "max_source_length: 65 is more than the model's max_position_embeddings of 64",
        model=BART,
        max_source_length=65,
    )
    refused(
        "max_target_length, max_new_tokens: 70 is more than the model's max_position_embeddings "
        "of 64",
        model=BART,
        max_new_tokens=70,
    )
    refused(
        "max_source_length + max_target_length or max_new_tokens: 65 is more than the model's "
        "max_position_embeddings of 64",
        **decoder_settings(max_source_length=57),
    )
    refused(
        "model: prophetnet has a loss of its own, of several tokens ahead: set "
        "disable_ngram_loss: true and eps: 0.0 in its config",
        model={"model_type": "prophetnet", "hidden_size": 16, "num_encoder_layers": 1},
    )
    refused("source_lang: TokenizersBackend knows no languages: leave it out", source_lang="en_XX")
    refused(
        "sequence_length: 10 is not the 32 of max_source_length and max_target_length: leave it "
        "out",
        sequence_length=10,
    )
    refused(
        "metric_for_best_model: eval_bleu is not measured; these are: eval_loss, eval_rouge1, "
        "eval_rouge2, eval_rougeL, eval_rougeLsum",
        metric_for_best_model="eval_bleu",
    )
    refused(
        "metric_for_best_model: eval_rouge1 is not measured; these are: eval_loss",
        metric_for_best_model="eval_rouge1",
        eval_generate_examples=0,
    )
    encoder = {"model_type": "roberta", "hidden_size": 32, "num_hidden_layers": 1}
    encoder |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 70}
    refused(
        "model: the tokens of roberta see those that they are to predict: set model.is_decoder: "
        "true, or take another",
        **{**decoder_settings(), "model": encoder},
    )
    mixture = LLAMA | {"model_type": "mixtral", "output_router_logits": True}
    refused(
        "model: mixtral adds a loss of its router, which this recipe does not train on: set "
        "output_router_logits to false in its config",
        **{**decoder_settings(), "model": mixture | {"num_key_value_heads": 2}},
    )
    refused("max_target_length must be at least 2, not 1", max_target_length=1)
    refused("num_beams must be at least 1, not 0", num_beams=0)
    refused(
        "length_penalty: it weighs beams against each other: raise num_beams",
        num_beams=1,
        length_penalty=2.0,
    )
    refused("min_new_tokens: 9 is more than max_new_tokens 8", min_new_tokens=9)
    refused("label_smoothing_factor must be in [0, 1), not 1.0", label_smoothing_factor=1.0)
    refused("lead_sentences must not be negative, not -1", lead_sentences=-1)


def test_another_suffix_is_another_run(summarize):
    summarize(**decoder_settings(max_steps=3))
    ended = summarize(**decoder_settings(source_suffix=":\n"))
    assert ended.status == 2
    assert r"source_suffix was \nTL;DR:\n and is :\n" in ended.error
    assert len(checkpoints(ended.folder)) == 1


CONFIGS = sorted(Path("recipes/summarization/configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configs_are_complete_and_run_on_such_rows(file, call, tokenizer_folder, tmp_path):
    args = parse(Arguments, [str(file)])
    assert args.output_dir == f"runs/summarization/{file.stem}"
    assert args.test_data
    rows = [(row["document"], row["summary"]) for row in make_rows(8, 0)]
    columns = {
        "finetune_cnn_dailymail": lambda x, y: {"article": x, "highlights": y, "id": "1"},
        "finetune_wmt16_en_ro": lambda x, y: {"translation": {"en": x, "ro": y}},
    }
    row_of = columns.get(file.stem, lambda x, y: {"document": x, "summary": y, "source": "NumPy"})
    path, folder = tmp_path / "rows.parquet", tmp_path / "run"
    table = pyarrow.Table.from_pylist([row_of(*row) for row in rows])
    pyarrow.parquet.write_table(table, path)
    settings = {"output_dir": str(folder), "max_steps": 1, "warmup_steps": 0, "report_to": []}
    settings |= {f"{part}_data": [{"path": str(path)}] for part in PARTS}
    settings |= {"tokenizer": str(tokenizer_folder), "model_name_or_path": None}
    settings |= {"model": LLAMA if args.source_suffix else T5, "min_new_tokens": 1}
    settings |= {"max_source_length": 24, "max_target_length": 8, "max_new_tokens": 8}
    ended = call(summarization.main, [str(file), *command_line(settings)], folder)
    assert ended.status == 0, ended.error
    assert len(predictions(folder)) == 8
