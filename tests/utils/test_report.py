"""utils/plots.py and utils/report.py: plots and model card say what the run folder says."""

import datetime
import io
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from utils import plots, report
from utils.plots import write_plots
from utils.report import escaped, markdown_table, write_card
from utils.run_folder import RunFolder

DOMAINS = {"code": 0.8, "prose | verse": 1.1, "tables": 1.4}
USAGE = """
from transformers import pipeline

generate = pipeline("text-generation", "{model}")
print(generate("a b", max_new_tokens=4)[0]["generated_text"])
"""
CONFIG = """
output_dir: run
train_sources:
- {path: cerebras/SlimPajama-627B, name: slim, weight: 2}
- {path: cerebras/SlimPajama-627B, name: slim again}
- {path: data/local, name: null}
- {path: data/train.jsonl, name: files}
validation_sources:
- {path: data/validation.jsonl}
"""


def training_line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2 + 7 / step,
        "learning_rate": 1e-3 / step,
        "grad_norm": 1 / step,
        "tokens": 4096 * step,
        "tokens_per_second": 1000.5 + step,
        **more,
    }


def evaluation_line(step: int) -> dict[str, Any]:
    bits = {domain: value + 1 / step for domain, value in DOMAINS.items()}
    return {
        "step": step,
        "eval_loss": 2.123456789 + 1 / step,
        "eval_bits_per_byte": sum(bits.values()) / 3,
        "eval_tokens": 54321,
        "eval_loss_by_domain": {domain: 2 * value for domain, value in bits.items()},
        "eval_bits_per_byte_by_domain": bits,
    }


def whole_run() -> list[dict[str, Any]]:
    lines = [training_line(step) for step in range(1, 41)]
    seen = {"slim/code": 120_000, "files": 43_840}
    samples = [{"prompt": "def <x>", "text": "(a):\n\n```\n</pre>"}]
    return [
        *lines[:20],
        evaluation_line(20),
        *lines[20:],
        evaluation_line(40),
        {"step": 40, "samples": samples},
        {"step": 40, "tokens_by_source": seen},
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> RunFolder:
    """An empty run folder `run`, in the working directory as a person would have it."""
    monkeypatch.chdir(tmp_path)
    Path("data/local").mkdir(parents=True)
    Path("run").mkdir()
    run = RunFolder("run")
    (run.path / "config.yaml").write_text(CONFIG)
    return run


def write_metrics(folder: RunFolder, lines: list[dict[str, Any]]) -> None:
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def stand_in_plots(folder: RunFolder) -> None:
    """Files where the plots would be: what the card refers to."""
    (folder.path / "plots").mkdir()
    for name in ("loss", "learning_rate", "throughput", "domains"):
        (folder.path / "plots" / f"{name}.png").write_bytes(b"old")


def colors(path: Path | io.BytesIO) -> set[tuple[int, int, int]]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return {color for _, color in image.convert("RGB").getcolors(2**24)}


TRAINING, EVALUATION = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def table(text: str, heading: str) -> dict[str, list[str]]:
    """First cell → the other cells of a row, of the table that follows a heading."""
    lines = text.split(f"{heading}\n", 1)[1].lstrip().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        first, *others = re.split(r"(?<!\\)\|", line.strip("|"))
        rows[first.strip()] = [cell.strip() for cell in others]
    return rows


def card_text(folder: RunFolder, **facts: Any) -> str:
    return write_card(folder, "A tiny Llama", "text-generation", USAGE, facts).read_text()


@pytest.fixture(scope="module")
def whole_run_plots(tmp_path_factory) -> dict[str, bytes]:
    run = RunFolder(str(tmp_path_factory.mktemp("run")))
    run.lock.close()
    write_metrics(run, whole_run())
    paths = write_plots(run)
    assert sorted(run.path.rglob("*.*")) == sorted([run.metrics, *paths])  # nothing else is left
    return {path.stem: path.read_bytes() for path in paths}


def test_plots_of_a_whole_run(whole_run_plots):
    assert {name: Image.open(io.BytesIO(png)).size for name, png in whole_run_plots.items()} == {
        "loss": (1800, 900),
        "learning_rate": (1800, 1200),
        "throughput": (1800, 900),
        "domains": (1800, 900),
    }
    found = {name: colors(io.BytesIO(png)) for name, png in whole_run_plots.items()}
    assert {name for name in found if TRAINING in found[name]} == set(found)
    # the colour of evaluations is the second domain's as well
    assert {name for name in found if EVALUATION in found[name]} == {"loss", "domains"}


@pytest.fixture
def draw(folder, monkeypatch):
    """Metrics → the figures by their name, not rendered."""

    def draw(lines: list[dict[str, Any]]) -> dict[str, Figure]:
        figures = {}

        def keep(figure: Figure, file: Path, **options: Any) -> None:
            figures[file.name.removeprefix(".").removesuffix(".png.partial")] = figure
            file.write_bytes(b"")

        monkeypatch.setattr(Figure, "savefig", keep)
        write_metrics(folder, lines)
        assert [path.stem for path in write_plots(folder)] == list(figures)
        return figures

    return draw


def points(line: Line2D) -> list[tuple[float, float]]:
    return list(zip(*line.get_data(), strict=True))


def test_lines_go_through_the_metrics(draw):
    figures = draw(whole_run())
    training = [training_line(step) for step in range(1, 41)]
    expected = {
        "loss": ["loss"],
        "learning_rate": ["learning_rate", "grad_norm"],
        "throughput": ["tokens_per_second"],
    }
    for name, keys in expected.items():
        for axes, key in zip(figures[name].axes, keys, strict=True):
            assert points(axes.get_lines()[0]) == [(line["step"], line[key]) for line in training]
    (axes,) = figures["loss"].axes
    evaluations = [(step, evaluation_line(step)["eval_loss"]) for step in (20, 40)]
    assert points(axes.get_lines()[2]) == evaluations
    assert axes.get_title(loc="left") == f"Loss: {training[-1]['loss']:.3f} in training at the end"
    assert axes.get_yscale() == "log"  # from 9 to 2.2
    assert axes.xaxis.get_major_formatter()(20, 0) == "20\n81.9k"
    assert figures["throughput"].axes[0].get_ylim()[0] == 0
    (axes,) = figures["domains"].axes
    assert axes.get_title(loc="left") == "Bits per byte on held-out data, by domain"
    bits = [evaluation_line(step)["eval_bits_per_byte_by_domain"] for step in (20, 40)]
    lines = [[(20, bits[0][domain]), (40, bits[1][domain])] for domain in DOMAINS]
    assert [points(line) for line in axes.get_lines()[:3]] == lines
    labels = [f"{domain}  {bits[1][domain]:.3f}" for domain in DOMAINS]
    assert [text.get_text() for text in axes.texts] == labels
    for text, line in zip(axes.texts, axes.get_lines(), strict=False):
        assert text.get_color() == line.get_color()
        height = axes.transAxes.inverted().transform(axes.transData.transform(points(line)[-1]))[1]
        assert text.get_position()[1] == pytest.approx(height)  # nothing is in the way here


def test_smoothed_line_is_a_mean_without_the_faults(draw):
    lines = [training_line(step, loss=5 + math.sin(step)) for step in range(1, 301)]
    losses = [line["loss"] for line in lines]
    lines[149] |= {"loss": 90.0, "loss_spike": True}
    lines[159] |= {"loss": math.nan, "grad_norm": math.inf, "skipped": True}
    figures = draw(lines)
    raw, smooth, spikes, skipped = figures["loss"].axes[0].get_lines()
    assert raw.get_ydata()[149] == 90
    assert smooth.get_ydata()[100] == pytest.approx(sum(losses[97:104]) / 7)
    assert smooth.get_ydata()[150] == pytest.approx(
        (sum(losses[147:149]) + sum(losses[150:154])) / 6
    )
    assert smooth.get_ydata()[0] == losses[0]
    assert smooth.get_ydata()[1] == pytest.approx(sum(losses[:3]) / 3)
    assert (spikes.get_label(), list(spikes.get_xdata())) == ("loss spike (1)", [150])
    assert (skipped.get_label(), list(skipped.get_xdata())) == ("skipped (1)", [160])
    rates, norms = figures["learning_rate"].axes
    assert [line["learning_rate"] for line in lines] == list(rates.get_lines()[1].get_ydata())
    assert len(norms.get_lines()) == 4
    assert len(figures["throughput"].axes[0].get_lines()) == 2


def test_mfu_gets_a_panel(draw):
    figure = draw([training_line(step, mfu=0.4) for step in range(1, 9)])["throughput"]
    tokens, mfu = figure.axes
    assert tokens.get_title(loc="left") == "Throughput: median 1,005 tokens/s"
    assert mfu.get_title(loc="left") == "Model FLOPs utilization: median 40.0%"


def test_many_domains_make_a_higher_plot(draw):
    bits = {f"domain {number}": 1 + number**3 / 1e5 for number in range(40)}
    evaluation = {"step": 2, "eval_bits_per_byte_by_domain": bits}
    figure = draw([training_line(1), training_line(2), evaluation])["domains"]
    assert figure.get_size_inches() == pytest.approx([9, 1.3 + 0.2 * 40])
    heights = [text.get_position()[1] for text in figure.axes[0].texts]
    assert len(heights) == 40
    assert all(above - below > 0.02 for below, above in pairwise(heights))


def test_domains_without_a_line_are_left_out(draw):
    def evaluation(step: int, **losses: float) -> dict[str, Any]:
        return {"step": step, "eval_loss_by_domain": losses}

    training = [training_line(1), training_line(2)]
    assert "domains" not in draw([*training, evaluation(2, code=2.5)])
    assert "domains" not in draw([*training, evaluation(2, code=2.5, prose=math.nan)])
    figure = draw([*training, evaluation(1, old=2, code=3), evaluation(2, code=2, new=1)])[
        "domains"
    ]
    assert [text.get_text() for text in figure.axes[0].texts] == ["new  1.000", "code  2.000"]


@pytest.mark.parametrize("steps", [0, 1])
def test_short_runs_without_an_evaluation(folder, steps):
    write_metrics(folder, [training_line(step) for step in range(1, steps + 1)])
    paths = write_plots(folder)
    expected = ["loss", "learning_rate", "throughput"] if steps else []
    assert [path.stem for path in paths] == expected
    if steps:
        assert TRAINING in colors(paths[0])
        assert EVALUATION not in colors(paths[0])
    text = card_text(folder)
    assert "## Results" not in text
    assert "model-index" not in text
    assert "model_name" not in text
    assert table(text, "# A tiny Llama")["steps"] == [str(steps)]


def test_a_plot_that_cannot_be_written_leaves_the_old_one(folder, monkeypatch):
    write_metrics(folder, whole_run())
    stand_in_plots(folder)

    def no_space(figure: Figure, file: Path, **options: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_plots(folder)
    assert Path("run/plots/loss.png").read_bytes() == b"old"
    assert not [path for path in Path("run/plots").iterdir() if "partial" in path.name]


def test_labels_keep_their_distance_and_their_order():
    places = plots._spread([0.1, 0.11, 0.12, 0.5, 0.99, 1.0], gap=0.1)
    assert all(b - a >= 0.1 - 1e-12 for a, b in pairwise(places))
    assert min(places) >= 0
    assert max(places) <= 1 + 1e-12
    assert places[3] == 0.5
    assert plots._spread([0.2, 0.4, 0.9], gap=0.1) == [0.2, 0.4, 0.9]


def test_numbers_of_the_card_are_those_of_the_metrics(folder):
    write_metrics(folder, whole_run())
    text = card_text(folder, parameters=6_738_415_616, architecture="Llama", hours=0.0123)

    about = table(text, "# A tiny Llama")
    assert about["steps"] == ["40"]
    assert about["tokens seen"] == [f"{40 * 4096:,}"]
    assert about["parameters"] == ["6,738,415,616"]
    assert about["architecture"] == ["Llama"]
    assert about["hours"] == ["0.0123"]

    last = evaluation_line(40)
    results = table(text, "## Results")
    assert results["domain"] == ["loss", "bits per byte", "tokens"]
    assert results["**all**"] == [
        f"{last['eval_loss']:.4f}",
        f"{last['eval_bits_per_byte']:.4f}",
        "54,321",
    ]
    for domain, bits in last["eval_bits_per_byte_by_domain"].items():
        row = results[domain.replace("|", r"\|")]
        assert row == [f"{2 * bits:.4f}", f"{bits:.4f}", ""]
    assert len(results) == 2 + 1 + len(DOMAINS)  # with the header and the line below it

    data = table(text, "## Data")
    assert data["slim/code"] == ["120,000", "73.2%"]
    assert data["files"] == ["43,840", "26.8%"]
    assert data["**all**"] == ["163,840", "100.0%"]


def test_metadata_are_those_of_the_hub(folder):
    write_metrics(folder, whole_run())
    path = write_card(folder, "A tiny Llama", "text-generation", USAGE, {})
    assert path == Path("run/README.md")
    data = ModelCard.load(path).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["cerebras/SlimPajama-627B"]
    assert data.model_name == "A tiny Llama"
    results = {result.metric_type: result for result in data.eval_results}
    last = evaluation_line(40)
    assert {name: result.metric_value for name, result in results.items()} == {
        "loss": last["eval_loss"],
        "bits_per_byte": last["eval_bits_per_byte"],
    }
    assert results["loss"].task_type == "text-generation"
    assert results["loss"].dataset_name == "data/validation.jsonl"
    assert results["loss"].dataset_type == "validation"  # where the Hub looks for a name of its own


CARVED = {"student_layers": [0], "teacher": {"model_name_or_path": "org/teacher"}}


@pytest.mark.parametrize(
    ("settings", "is_adapter", "expected"),
    [
        ({"model_name_or_path": "org/base"}, False, {"base_model": "org/base"}),
        ({"model_name_or_path": "gpt2"}, False, {"base_model": "gpt2"}),
        ({"model_name_or_path": "data/local"}, False, {}),
        ({"model_name_or_path": "./gone"}, False, {}),
        ({"model_name_or_path": "../data/gone"}, False, {}),
        ({"model_name_or_path": "/data/gone"}, False, {}),
        (
            {"model_name_or_path": "org/base", "tags": ["lora", "chat"]},
            True,
            {
                "library_name": "peft",
                "base_model": "org/base",
                "tags": ["lora", "base_model:adapter:org/base", "chat"],
            },
        ),
        ({"model_name_or_path": "data/local"}, True, {"library_name": "peft", "tags": ["lora"]}),
        (CARVED, False, {"base_model": "org/teacher"}),
        (CARVED | {"student_layers": None}, False, {}),
        (
            {"license": "mit", "language": "no", "tags": ["a"]},
            False,
            {"license": "mit", "language": "no", "tags": ["a"]},
        ),
        (
            {"train_data": [{"path": "imdb"}, {"path": "gone/a.csv"}, {"path": "data/local"}]},
            False,
            {"datasets": ["imdb"]},
        ),
        (
            {"train_data": [{"path": "org/a"}], "transfer_data": [{"path": "org/b"}]},
            False,
            {"datasets": ["org/a", "org/b"]},
        ),
    ],
)
def test_no_name_in_the_metadata_but_of_the_hub(settings, is_adapter, expected, folder):
    write_metrics(folder, [training_line(1)])
    (folder.path / "config.yaml").write_text(yaml.dump(settings))
    (folder.path / "model").mkdir()
    if is_adapter:
        (folder.path / "model" / "adapter_config.json").write_text("{}")
    card_text(folder)
    for place in ("run", "run/model"):
        data = ModelCard.load(f"{place}/README.md").data.to_dict()
        usual = {"library_name": "transformers", "pipeline_tag": "text-generation"}
        assert data == usual | expected


def test_what_other_recipes_draw_is_shown_and_where_it_stands_here_is_not(folder):
    write_metrics(folder, whole_run())
    stand_in_plots(folder)
    path = folder.path / "plots" / "confusion_matrix.png"
    path.write_bytes(b"new")
    text = card_text(folder, **{"plot of the confusion matrix": path, "labels": "a, b"})
    assert "![confusion matrix](plots/confusion_matrix.png)" in text
    assert {*table(text, "# A tiny Llama")} >= {"steps", "tokens seen", "labels"}
    assert "plot of the" not in text


def test_metrics_of_other_recipes(folder):
    accuracy = {"a": 0.75, "b": 0.5, "c": 0.9}
    evaluation = {
        "step": 2,
        "eval_accuracy": 0.7,
        "eval_perplexity": math.nan,
        "eval_accuracy_by_domain": accuracy,
    }
    write_metrics(folder, [training_line(1), training_line(2), evaluation])
    (folder.path / "config.yaml").write_text("model_name_or_path: somewhere\n")
    assert "domains" in [path.stem for path in write_plots(folder)]
    path = write_card(folder, "Classifier", "text-classification", USAGE, {})
    results = table(path.read_text(), "## Results")
    assert results["domain"][0] == "accuracy"
    assert {name: results[name][0] for name in accuracy} == {
        "a": "0.7500",
        "b": "0.5000",
        "c": "0.9000",
    }
    (result,) = ModelCard.load(path).data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.7)
    assert result.dataset_name == "validation"
    assert ModelCard.load(path).data.datasets is None


NAMES = [
    "a$b_{$",
    r"\$x$ %&#^{",
    "$$",
    "x" * 3000,
    "東京 🙂",
    "a\nb\x1b[31mred\x00\r",
    "\ud83d",
    "<script>alert(1)</script>|`*_y_*`[x](y)",
    "---\nlicense: none\n---",
    "```\n````\n`````",
    "\u202eabc",
    "",
]


@pytest.mark.filterwarnings("error")
def test_any_name_can_be_drawn(folder):
    from classification_report import write_figures

    losses = {name: 1 + number / 7 for number, name in enumerate(NAMES)}
    lines = [training_line(1), training_line(2), {"step": 2, "eval_loss_by_domain": losses}]
    write_metrics(folder, lines)
    assert [path.stem for path in write_plots(folder)][-1] == "domains"
    paths = write_figures(folder.path, NAMES, np.eye(len(NAMES)), np.arange(len(NAMES)))
    assert [path.stem for path in paths] == ["confusion_matrix", "reliability"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_any_name_in_a_card_is_nothing_but_text(name, folder):
    """Of a domain, a label, a source, a path, in a sample."""
    samples = [{"prompt": name, "text": name}]
    evaluation = {"step": 2, "eval_loss": 1.0, "eval_loss_by_domain": {name: 2.0, "b": 3.0}}
    lines = [training_line(1), training_line(2), evaluation, {"step": 2, "samples": samples}]
    write_metrics(folder, [*lines, {"step": 2, "tokens_by_source": {name: 7}}])
    settings = yaml.dump({"sample_prompts": [name], "validation_sources": [{"path": name}]})
    (folder.path / "config.yaml").write_text(settings)
    card = write_card(folder, "A", "text-generation", USAGE, {"labels": name, name: 1})
    text = card.read_text(encoding="utf-8")
    assert ModelCard.load(card).data.to_dict().keys() <= {
        "library_name",
        "pipeline_tag",
        "model_name",
        "model-index",
    }
    body = text.split("\n---\n", 1)[1]
    assert "<script" not in body.replace(settings, "")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", text)
    assert [line for line in body.splitlines() if line.startswith("## ")] == [
        *("## How to use", "## Results", "## Data", "## Samples", "## Settings", "## Environment")
    ]
    fences = re.findall(r"^(`{3,})(?:yaml|python)\n.*?\n\1$", body, re.MULTILINE | re.DOTALL)
    assert len(fences) == 2
    shown = table(text, "## Data")
    assert len(shown) == 4  # header, line, the name and all
    assert table(text, "## Results").keys() == shown.keys() - {"source", "**all**"} | {
        *("domain", "**all**", "b")
    }


def test_names_are_drawn_as_they_stand(draw):
    losses = {"a$b_{$": 2.0, "tab\tand\x1b[0m": 3.0, "y" * 60: 4.0}
    lines = [training_line(1), training_line(2), {"step": 2, "eval_loss_by_domain": losses}]
    texts = draw(lines)["domains"].axes[0].texts
    assert [text.get_text() for text in texts] == [
        "a$b_{$  2.000",
        r"tab and\x1b[0m  3.000",
        f"{'y' * 39}…  4.000",
    ]
    assert not any(text.get_parse_math() for text in texts)


def test_markdown_shows_what_it_was_given():
    assert escaped("__init__ of a_b <i> & 2 * 3 [x](y) `c` $d$ ~e~ \\") == (
        r"\_\_init\_\_ of a_b &lt;i&gt; &amp; 2 \* 3 \[x\](y) \`c\` \$d\$ \~e\~ \\"
    )


def test_what_was_not_finite_is_left_out(folder, draw):
    evaluation = evaluation_line(2)
    evaluation["eval_loss"] = None  # as RunFolder.record writes it
    evaluation["eval_bits_per_byte_by_domain"]["code"] = None
    figures = draw([training_line(1, grad_norm=None), training_line(2), evaluation])
    assert len(figures["loss"].axes[0].get_lines()) == 2
    labels = [text.get_text() for text in figures["domains"].axes[0].texts]
    assert [label.split("  ")[0] for label in labels] == ["prose | verse", "tables"]
    path = write_card(folder, "A tiny Llama", "text-generation", USAGE, {})
    results = table(path.read_text(), "## Results")
    assert results["domain"] == ["loss", "bits per byte", "tokens"]
    assert results["**all**"][0] == results["code"][1] == ""
    assert [result.metric_type for result in ModelCard.load(path).data.eval_results] == [
        "bits_per_byte"
    ]


def test_cells_of_a_table():
    rows = [["a | b\nc", 1234567, 0.123456, 1e-5], [None, True, 2.0, math.nan]]
    assert markdown_table(["", "x", "y", "z"], rows, "lrrl").splitlines() == [
        "|  | x | y | z |",
        "| --- | ---: | ---: | --- |",
        r"| a \| b c | 1,234,567 | 0.1235 | 1e-05 |",
        "|  | True | 2 |  |",
    ]


def test_a_half_last_line_is_left_out(folder, whole_run_plots):
    write_metrics(folder, whole_run())
    stand_in_plots(folder)
    text = card_text(folder)
    with folder.metrics.open("a") as file:
        file.write(json.dumps(evaluation_line(60))[:70])
    assert card_text(folder) == text
    assert write_plots(folder)[0].read_bytes() == whole_run_plots["loss"]


def test_the_card_changes_with_the_date_alone(folder, monkeypatch):
    class Clock(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2031, 5, 17)

    write_metrics(folder, whole_run())
    today, text = str(datetime.date.today()), card_text(folder, hours=1.5)
    assert card_text(folder, hours=1.5) == text
    monkeypatch.setattr(report.datetime, "date", Clock)
    assert card_text(folder, hours=1.5) == text.replace(
        f"| date | {today} |", "| date | 2031-05-17 |"
    )
    assert "| date | 2031-05-17 |" in card_text(folder)


def test_settings_samples_and_environment_are_shown_as_they_are(folder):
    write_metrics(folder, whole_run())
    text = card_text(folder, comparison="gzip -9 | 2.9\nunigram 4.1")
    assert f"````yaml\n{CONFIG}````" in text
    assert "<pre><b>def &lt;x&gt;</b>(a):\n\n```\n&lt;/pre&gt;</pre>" in text
    assert r"| comparison | gzip -9 \| 2.9 unigram 4.1 |" in text
    environment = table(text, "## Environment")
    assert environment["torch"] == [torch.__version__]
    assert list(environment)[2:] == ["Python", *report.PACKAGES, "hardware", "date"]


def test_no_path_of_the_machine(folder, tmp_path):
    write_metrics(folder, whole_run())
    stand_in_plots(folder)
    text = card_text(folder)
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert pictures == [
        f"plots/{p}.png" for p in ("loss", "learning_rate", "throughput", "domains")
    ]
    assert all((folder.path / picture).exists() for picture in pictures)


def test_the_snippet_runs_in_both_folders(folder, monkeypatch, capsys):
    words = {word: index for index, word in enumerate(["<unk>", "</s>", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained("run/model")
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained("run/model")
    write_metrics(folder, whole_run())
    stand_in_plots(folder)
    card_text(folder)
    for place in ("run", "model"):
        monkeypatch.chdir(place)
        text = Path("README.md").read_text()
        pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
        assert len(pictures) == 4
        assert all(Path(picture).read_bytes() == b"old" for picture in pictures)
        exec(re.search(r"```python\n(.+?)```", text, re.DOTALL)[1], {})
        assert "\na b" in f"\n{capsys.readouterr().out}"
    ModelCard.load("README.md")
