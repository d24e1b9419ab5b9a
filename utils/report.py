"""What people look at after a run, made from the files of its folder alone: the model card."""

import datetime
import html
import math
import os
import platform
import re
import shutil
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import EvalResult, ModelCardData

from utils.comparison import PRECISIONS, reference_of_run
from utils.config import read_yaml
from utils.export import ADAPTER, export
from utils.files import written_aside
from utils.program import printable, say, spared
from utils.run_folder import RunFolder
from utils.sources import FORMATS
from utils.tables import FORMATS as TABLES

if TYPE_CHECKING:
    from utils.training import Training

PLOTS = ("loss", "learning_rate", "throughput", "domains")  # come first in the card
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers")


def write_card(
    folder: RunFolder,
    title: str,
    pipeline_tag: str,
    usage: str,
    facts: dict[str, Any],
    step: int | None = None,
) -> Path:
    """Write the model card: README.md of the run, and that of model/ with copies of the plots.

    Its scores are of the weights that were exported: on the test data, if there are such.

    Args:
        usage: Python that uses the model; "{model}" in it stands for the path of the export.
        facts: what else is to be said of the run, in the order in which it is shown; paths are not.
        step: whose weights were exported; null: the last.
    """
    settings = folder.path / "config.yaml"
    config, _ = read_yaml(str(settings))
    records = folder.records()
    known = [r for r in records if step is None or r.get("step", 0) <= step]
    latest = {key: value for record in known for key, value in record.items()}
    tested = {key: value for record in records for key, value in record.items()}
    results, split = _scores(tested, "test_"), "test"
    if not results:
        results, split = _scores(latest, "eval_"), "validation"
    held_out = printable(", ".join(_paths(config, split))) or split
    counted = {"steps": latest.get("step", 0), "tokens seen": latest.get("tokens", 0)}
    is_adapter = (folder.path / "model" / ADAPTER).exists()
    scores = _as_scores(title, pipeline_tag, results, split, held_out)
    header = _metadata(config, pipeline_tag, is_adapter, **scores)
    counted |= {name: fact for name, fact in facts.items() if not isinstance(fact, Path)}
    intro = [header, f"# {title}", markdown_table(["", ""], _escaped(counted))]
    sections = [
        *_results(results, held_out),
        *_data(latest.get("tokens_by_source")),
        *_samples(latest.get("samples")),
        "## Settings\n\n<details><summary>config.yaml</summary>",
        f"{_fenced('yaml', settings.read_text(encoding='utf-8'), '````')}\n\n</details>",
        f"## Environment\n\n{markdown_table(['', ''], _environment().items())}\n",
    ]
    for path, model in ((folder.path, "model"), (folder.path / "model", ".")):
        if path.is_dir():
            if path != folder.path and (folder.path / "plots").is_dir():
                shutil.copytree(folder.path / "plots", path / "plots", dirs_exist_ok=True)
            code = _fenced("python", usage.strip().replace("{model}", model))
            use = ["## How to use", "In this folder:", code]
            parts = [*intro, *_pictures(path / "plots"), *use, *sections]
            with written_aside(path / "README.md") as file:
                file.write_text("\n\n".join(parts), encoding="utf-8")
    return folder.path / "README.md"


def _scores(record: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in record.items() if k.startswith(prefix)}


def _paths(config: dict[str, Any], split: str) -> list[str]:
    sources = config.get(f"{split}_sources", config.get(f"{split}_data")) or ()
    return list(dict.fromkeys(source["path"] for source in sources))


def _metadata(config: dict, pipeline_tag: str, is_adapter: bool, **scores: Any) -> str:
    """What the Hub reads; https://huggingface.co/docs/hub/model-cards."""
    base = config.get("model_name_or_path")
    if any(config.get(f"student_{what}") for what in ("layers", "intermediate_size")):
        base = config["teacher"]["model_name_or_path"]  # whose weights they were
    base = base if base and _is_hub_name(base) else None
    tags = ["lora", *([f"base_model:adapter:{base}"] if base else ())] if is_adapter else []
    datasets = _paths(config, "train") + _paths(config, "transfer")
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=pipeline_tag,
        license=config.get("license"),
        language=config.get("language") or None,
        tags=list(dict.fromkeys(tags + (config.get("tags") or []))) or None,
        datasets=[*filter(_is_hub_name, datasets)] or None,
        base_model=base,
        **scores,
    )
    return f"---\n{data}\n---"


def _as_scores(title: str, pipeline_tag: str, results: dict, split: str, held_out: str) -> dict:
    numbers = {k: v for k, v in results.items() if k != "tokens" and isinstance(v, int | float)}
    data = (held_out if _is_hub_name(held_out) else split, held_out)
    scores = [EvalResult(pipeline_tag, *data, *s) for s in numbers.items() if math.isfinite(s[1])]
    return {"model_name": title, "eval_results": scores} if scores else {}


def _is_hub_name(path: str) -> bool:
    is_file = os.path.exists(path) or path.endswith((*FORMATS, *TABLES))
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", path) is not None and not is_file


def _pictures(plots: Path) -> list[str]:
    found = {path.stem for path in plots.glob("*.png")}
    names = [*(name for name in PLOTS if name in found), *sorted(found - {*PLOTS})]
    return [f"![{name.replace('_', ' ')}](plots/{name}.png)" for name in names]


def _results(results: dict[str, Any], held_out: str) -> list[str]:
    """A row for all of the held-out data, and one for each domain."""
    if not results:
        return []
    by_domain = {k.removesuffix("_by_domain"): v for k, v in results.items() if type(v) is dict}
    overall = {k: v for k, v in results.items() if type(v) is not dict}
    columns = list({**overall, **by_domain})
    rows = [["**all**", *(overall.get(column) for column in columns)]]
    for domain in dict.fromkeys(name for values in by_domain.values() for name in values):
        rows.append(
            [escaped(domain), *(by_domain.get(column, {}).get(domain) for column in columns)]
        )
    header = ["domain", *(column.replace("_", " ") for column in columns)]
    return ["## Results", f"On {escaped(held_out)}:", markdown_table(header, rows)]


def _data(tokens_by_source: dict[str, int] | None) -> list[str]:
    if not tokens_by_source:
        return []
    total = sum(tokens_by_source.values())
    rows = [[*row, f"{row[1] / total:.1%}"] for row in _escaped(tokens_by_source)]
    rows.append(["**all**", total, "100.0%"])
    return ["## Data", markdown_table(["source", "tokens seen", "share"], rows)]


def _samples(samples: list[dict[str, str]] | None) -> list[str]:
    texts = []
    for sample in samples or ():
        shown = ("\n".join(map(printable, sample[key].split("\n"))) for key in ("prompt", "text"))
        prompt, text = (html.escape(text, quote=False) for text in shown)
        texts.append(f"<pre><b>{prompt}</b>{text}</pre>")
    return texts and ["## Samples\n\nThe prompt in bold, then what the model wrote:", *texts]


def _environment() -> dict[str, str]:
    versions = {name: version(name) for name in PACKAGES if find_spec(name)}
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpu.read_text()) if cpu.exists() else None
    hardware = f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}"
    if torch.cuda.is_initialized():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    date = str(datetime.date.today())
    return {"Python": platform.python_version(), **versions, "hardware": hardware, "date": date}


def escaped(text: Any) -> str:
    """Shown by Markdown as it stands: no markup, no HTML, no formula."""
    text = html.escape(printable(" ".join(str(text).split())), quote=False)
    return re.sub(r"[\\`*\[\]~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def _escaped(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    is_number = {name: isinstance(fact, int | float) for name, fact in facts.items()}
    return [(escaped(n), fact if is_number[n] else escaped(fact)) for n, fact in facts.items()]


def _fenced(language: str, text: str, fence: str = "```") -> str:
    """A block of code, whatever fences stand in it."""
    fence = max([fence, *(found + "`" for found in re.findall("`{3,}", text))], key=len)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def markdown_table(
    header: Sequence[str], rows: Iterable[Iterable[Any]], align: str | None = None
) -> str:
    """A Markdown table; numbers that are not formatted yet get four digits.

    Args:
        align: a letter for each column, "l" or "r"; all to the left where it is not given.
    """

    def cell(value: Any) -> str:
        if value is None or value != value:
            return ""  # a metric that this row does not have, or that was not finite
        if isinstance(value, bool) or not isinstance(value, int | float):
            return " ".join(str(value).split()).replace("|", "\\|")
        digits = ",.0f" if value % 1 == 0 else ",.4f" if abs(value) >= 0.1 else ".3g"
        return f"{value:{digits}}"

    line = ["---:" if letter == "r" else "---" for letter in align or "l" * len(header)]
    lines = [header, line, *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conclude(
    training: "Training", title: str, pipeline_tag: str, usage: str, facts: dict[str, Any]
) -> None:
    """Write export, plots and card, say where they are and what came out, and push them to the Hub,
    if that is wanted; the end of all processes.

    Args:
        title, pipeline_tag, usage, facts: as for `write_card`.
    """
    training.ranks.signals.conclude(f"writing the export: {training.folder.path / 'model'}")
    training.load_best()
    reference = reference_of_run(training)
    with training.ranks.together():
        if training.is_main:
            training.folder.check()
            reference.write(training.best_checkpoint())
            say(_conclusion(training, title, pipeline_tag, usage, facts))
    training.progress.end()
    training.accelerator.end_training()
    if training.is_main and training.arguments.push_to_hub:  # others need not wait for it
        training.ranks.signals.conclude(f"uploading {training.folder.path / 'model'}")
        training.folder.push(training.arguments)


def _conclusion(
    training: "Training", title: str, pipeline_tag: str, usage: str, facts: dict[str, Any]
) -> str:
    from utils.plots import write_plots  # whose imports take a second

    a, folder, state = training.arguments, training.folder, training.state
    best = training.best_step
    hours = f"{state.seconds / 3600:.2f} hours"
    facts |= {
        "training": f"{state.step} steps, {hours}; {state.ending}",
        **({"exported": f"step {best}, the best"} if best else {}),
        "processes": f"{training.ranks.world_size} x {training.accelerator.device.type}",
        "parallelism": training.engine.describe(),
        "steps skipped": state.skipped_steps,
    }
    model = folder.path / "model"
    dtype, merge = PRECISIONS[a.mixed_precision], getattr(a, "merge_adapter", False)
    export(training.best_checkpoint(), model, dtype, merge, a.trust_remote_code)
    training.ranks.signals.conclude("drawing the plots, writing the card")
    plots: list[Path] = []
    with spared("no plots", but=OSError):
        plots = write_plots(folder)
    if a.trust_remote_code:
        loads = r'(Auto\w+\.from_pretrained\(|pipeline\("[\w-]+", )"\{model}"'
        usage = re.sub(loads, r"\g<0>, trust_remote_code=True", usage)
    card = write_card(folder, title, pipeline_tag, usage, facts, best)
    folder.finish(state.step, state.ending, a, training.fixed["the training data"])
    lines = ["finished", *(f"  {name}: {fact}" for name, fact in facts.items())]
    lines += [f"model: {model}", f"card:  {card}", *(f"plot:  {path}" for path in plots)]
    return "\n".join(lines)
