"""Search the settings of a training script: a grid of them, or those that optuna chooses.

    python recipes/tuning/search.py recipes/tuning/configs/search_classification_demo.yaml
    python recipes/tuning/search.py recipes/tuning/configs/search_causal_lm_demo.yaml --trials 12

Each trial is a run of the script, in a folder of its own; they are compared by validation data. The
same command continues a search that was stopped, and the trial that it was in. It leaves
trials.jsonl, best.yaml (a config of the script), a card and a picture.
"""

import shlex
import signal
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

from search_report import ending, summary, time_left, told, write_card, write_plot
from search_space import Space, check_space, examples, is_pruned
from trial_records import Metric, read_records, remove_weights, write_records
from trial_run import Trial, as_words, launcher, resolved_settings
from utils.arguments import LESS_IS_BETTER
from utils.config import InputError, as_yaml, at_end, command, parse, read_yaml
from utils.files import written_aside
from utils.program import looked_for, plain, say, spared
from utils.progress import command_line
from utils.ranks import StopSignals, launched_world_size
from utils.run_folder import RunFolder, differences

FREE = ("output_dir", "trials", "launch", "keep_weights")  # a search goes on with others
# of each trial, where the script has such a setting: test data are for what the search ends with
OF_TRIALS = {"test_data": [], "test_sources": [], "push_to_hub": False, "resume": "auto"}


@dataclass
class Arguments:
    """Search the settings of a training script: a grid of them, or those that optuna chooses."""

    script: str  # that trains: recipes/causal_lm/pretrain.py
    config: str  # of the script: what all trials share
    # by name (lora.r: inside of lora) a list of values, or {low, high} with log: true or a step
    settings: dict[str, Any]
    output_dir: str  # everything the search writes; started again, it continues
    # grid: all of the lists; tpe: near what was good before; random: anywhere
    method: Literal["grid", "tpe", "random"] = "tpe"
    trials: int | None = None  # required, unless method is grid: how many
    startup_trials: int = 5  # drawn at random before tpe chooses; median prunes none of them
    # what ends a trial: an evaluation that is worse than the median of the others at its step; or
    # (successive_halving) than the best quarter of those that have come as far, sooner and sooner
    pruner: Literal["median", "successive_halving", "none"] = "median"
    # that evaluations give, the greater the better unless it is a loss, an error, bits per byte, or
    # the config's greater_is_better says otherwise; null: the config's metric_for_best_model
    metric: str | None = None
    # before the script, in the place of python: accelerate launch --config_file …
    launch: list[str] | str = field(default_factory=list)
    keep_weights: Literal["all", "best"] = "all"  # best: those of the other trials are removed
    seed: int = 0  # of the choice; that of the trials is in their config

    def check(self) -> None:
        check_space(self.settings, self.method == "grid")
        if self.method == "grid" and self.trials is not None:
            raise InputError("trials: a grid is run whole: leave it out, or take method: random")
        if self.method != "grid" and self.trials is None:
            raise InputError(f"trials: say how many; method: {self.method} has no end")
        for name in ("trials", "startup_trials"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if launched_world_size() > 1:
            raise InputError("search.py is one process: launch says how its trials are started")


@at_end
def main() -> None:
    args = parse(Arguments)
    words = launcher(args.launch)
    folder = RunFolder(args.output_dir)
    base, metric = look_at_script(args)
    space = Space(args, base, metric.is_greater_better)
    begin(folder.path, args, base)
    records, signals = read_records(folder.path), StopSignals()
    signals.answer = "stopping the trial, with a checkpoint"
    say(f"{space.trials} trials of {args.script}: the {metric.best} {metric.name} is the best")
    write_best(folder.path, args, base, metric, records)  # where a kill came before it
    while len(records) < space.trials and not signals.first:
        chosen = space.choose(records)
        if chosen is None:
            say(f"all settings that were drawn have been tried: {len(records)} trials are enough")
            break
        trial, settings = chosen
        number, left = len(records) + 1, time_left(records, space.trials)
        say(f"trial {number} of {space.trials}: {told(settings)}{left}")
        run = folder.path / f"trials/trial-{number:03d}"
        line = [*words, *trial_words(args, base, settings, run)]
        outcome = Trial(line, run, metric, partial(is_pruned, trial), signals).run()
        if outcome.status == "stopped":
            break
        record = {"trial": number, "settings": settings, "metric": metric.name}
        record |= outcome._asdict() | {"folder": str(run.relative_to(folder.path))}
        say(f"  {ending(record)}, after {outcome.seconds:.0f} seconds")
        records.append(record)
        folder.check()
        write_records(folder.path, records)
        write_best(folder.path, args, base, metric, records)
    if records:
        conclude(folder.path, args, metric, records)
    if signals.first:
        say(f"stopped after {len(records)} trials; resume with: {command_line()}")
    elif not metric.ranked(records):
        raise InputError(f"no trial has come to its end; the last one {ending(records[-1])}")


def trial_words(
    args: Arguments, base: dict[str, Any], settings: dict[str, Any], run: Path
) -> list[str]:
    own = {name: value for name, value in OF_TRIALS.items() if base.get(name, value) != value}
    if args.metric is not None:
        own["metric_for_best_model"] = args.metric
    return [args.script, args.config, *as_words({**settings, **own, "output_dir": str(run)})]


def look_at_script(args: Arguments) -> tuple[dict[str, Any], Metric]:
    """The script's settings, with an example of each that is searched, and what it is measured by.

    Raises:
        InputError: it refuses them; there are no validation data; which way is better is unclear.
    """
    for name in ("script", "config"):
        path = getattr(args, name)
        if not Path(path).is_file():
            raise InputError(f"{name}: there is no file {path}{looked_for(path)}")
    own, _ = read_yaml(args.config)
    given = {} if args.metric is None else {"metric_for_best_model": args.metric}
    base = resolved_settings(args.script, args.config, {**examples(args.settings), **given})
    held_out = ("validation_data", "validation_sources", "validation_split")
    if not any(base.get(name) for name in held_out):
        raise InputError(
            f"config: {args.config} has no validation data: trials are compared by them, and test "
            "data are for the end"
        )
    name = base["metric_for_best_model"].removeprefix("eval_")
    is_greater_better = base.get("greater_is_better")
    said_of = own.get("metric_for_best_model", "loss").removeprefix("eval_")
    if is_greater_better is not None and said_of != name:
        raise InputError(
            f"metric: {args.config} says greater_is_better of {said_of}, and this is {name}: set "
            "metric_for_best_model there, too"
        )
    if is_greater_better is None:
        is_greater_better = not name.endswith(LESS_IS_BETTER)
    return base, Metric(
        f"eval_{name}", is_greater_better, base.get("load_best_model_at_end", False)
    )


def begin(folder: Path, args: Arguments, base: dict[str, Any]) -> None:
    """Write the settings; raises InputError where the folder is another search's."""
    texts = {"config.yaml": as_yaml(args), "base.yaml": as_yaml(base)}
    now = {"config.yaml": plain(args), "base.yaml": base}
    has_trials = any(path.is_dir() for path in folder.glob("trials/*"))
    for file in texts if has_trials else ():
        then, _ = read_yaml(str(folder / file))
        for name, was, value in differences(then, now[file]):
            if file == "base.yaml" or name not in FREE:
                whose = "" if file == "config.yaml" else f" in {args.config}"
                raise InputError(
                    f"cannot continue {folder}: {name}{whose} was {was} and is {value}. "
                    "Change it back, or choose another output_dir"
                )
    for file, text in texts.items():
        with written_aside(folder / file) as aside:
            aside.write_text(text, encoding="utf-8")


def write_best(
    folder: Path, args: Arguments, base: dict[str, Any], metric: Metric, records: list
) -> None:
    """best.yaml: the settings of the best trial, in its folder, with the test data."""
    ranked = metric.ranked(records)
    if ranked:
        best, _ = read_yaml(str(folder / ranked[0]["folder"] / "config.yaml"))
        best |= {"output_dir": str(folder / ranked[0]["folder"])}
        best |= {name: base[name] for name in OF_TRIALS if name in base}
        if base.get("push_to_hub"):  # a repository is not to be named trial-003
            best["hub_model_id"] = base["hub_model_id"] or Path(base["output_dir"]).name
        with written_aside(folder / "best.yaml") as file:
            file.write_text(as_yaml(best), encoding="utf-8")
    if args.keep_weights == "best":
        remove_weights(folder, [record for record in records if record not in ranked[:1]])


def conclude(folder: Path, args: Arguments, metric: Metric, records: list) -> None:
    """The picture, the card, and on the screen the best trials and how the first is run."""
    words = launcher(args.launch) if args.launch else ["python"]
    rerun = shlex.join([*words, args.script, str(folder / "best.yaml")])
    with spared("no picture"):
        write_plot(folder, records, metric, args.settings)
    card = write_card(folder, records, metric, args.script, rerun)
    say(summary(records, metric))
    if metric.ranked(records):
        say(f"the best one: {rerun}")
    say(f"card: {card}")


if __name__ == "__main__":
    command(main)
