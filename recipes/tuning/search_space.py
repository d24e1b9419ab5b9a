"""What is searched: lists and ranges of settings, and how the next trial's are chosen.

Nothing is kept from trial to trial but their records: what a trial gets is a function of the
search's settings, its seed and those records.
"""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from utils.config import InputError
from utils.randomness import random_key

RANGE = {"low": (int, float), "high": (int, float), "log": (bool,), "step": (int, float)}
# they say where a run is, or what is measured of it: trials would not be comparable
NOT_SEARCHED = ("output_dir", "resume", "metric_for_best_model", "greater_is_better")
NOT_SEARCHED += ("load_best_model_at_end", "validation_", "test_", "eval_")
DRAWS = 100  # of settings, until some are new


def check_space(settings: dict[str, Any], is_grid: bool) -> None:
    """Raises InputError where a setting is given neither a list nor a range of values."""
    if not settings:
        raise InputError("settings: give at least one: {learning_rate: [1e-4, 1e-3]}")
    for name, values in settings.items():
        if str(name).startswith(NOT_SEARCHED):
            raise InputError(
                f"settings.{name}: it does not change what is trained: set it in the script's "
                "config for all trials"
            )
        if isinstance(values, list):
            texts = [json.dumps(value) for value in values]
            if not texts or len({*texts}) < len(texts):
                raise InputError(f"settings.{name}: give different values, not {values}")
        else:
            _check_range(name, values)
            if is_grid:
                raise InputError(f"settings.{name}: a grid needs a list of values, not a range")


def _check_range(name: str, values: Any) -> None:
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= RANGE.keys():
        raise InputError(
            f"settings.{name} must be a list of values, or {{low: …, high: …}} with log: true or a "
            f"step, not {values!r}; what is inside of a setting is named with dots: lora.r"
        )
    for key, value in values.items():
        if type(value) not in RANGE[key] or not math.isfinite(value):
            kind = "true or false" if key == "log" else "a number"
            raise InputError(f"settings.{name}.{key} must be {kind}, not {value!r}")
    low, high, step, is_log = (values.get(key) for key in ("low", "high", "step", "log"))
    if low >= high:
        raise InputError(f"settings.{name}: low: {low} must be below high: {high}")
    if is_log and (low <= 0 or step is not None):
        raise InputError(f"settings.{name}: log: true takes low above 0, and no step")
    if step is not None and not 0 < step <= high - low:
        raise InputError(f"settings.{name}.step must be above 0 and fit into the range, not {step}")


def examples(settings: dict[str, Any]) -> dict[str, Any]:
    """A value of each: the first, or the lowest."""
    return {name: v[0] if isinstance(v, list) else v["low"] for name, v in settings.items()}


def distributions(settings: dict[str, Any], base: dict[str, Any]) -> dict[str, BaseDistribution]:
    """As optuna has them; of a list the places, so that its values may be anything.

    Args:
        base: the script's settings with an example of each: a range is of whole numbers where that
            is one.
    """
    found: dict[str, BaseDistribution] = {}
    for name, values in settings.items():
        if isinstance(values, list):
            found[name] = CategoricalDistribution(range(len(values)))
            continue
        inside: Any = base
        for part in name.split("."):
            inside = inside[int(part) if isinstance(inside, list) else part]
        low, high, step = values["low"], values["high"], values.get("step")
        if type(inside) is not int:
            found[name] = FloatDistribution(low, high, values.get("log", False), step)
        elif {type(low), type(high), type(step or 1)} == {int}:
            found[name] = IntDistribution(low, high, values.get("log", False), step or 1)
        else:
            raise InputError(f"settings.{name}: it is a whole number: so must low, high, step be")
    return found


class Space:
    """All settings that may be chosen, and the order of the choice.

    Args:
        args: the `Arguments` of the search.
        base: as for `distributions`.
    """

    def __init__(self, args: Any, base: dict[str, Any], is_greater_better: bool):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.args, self.settings = args, args.settings
        self.distributions = distributions(args.settings, base)
        self.direction = "maximize" if is_greater_better else "minimize"
        places = [range(len(values)) for values in args.settings.values()]
        self.grid = [*itertools.product(*places)] if args.method == "grid" else []

    @property
    def trials(self) -> int:
        return len(self.grid) or self.args.trials

    def choose(self, records: Sequence[dict]) -> tuple[optuna.Trial, dict[str, Any]] | None:
        """The trial after those of the records, to be told its evaluations, and its settings.

        None: all that were drawn have been tried.
        """
        study = self._study(records)
        if self.grid:
            study.enqueue_trial(dict(zip(self.settings, self.grid[len(records)], strict=True)))
        tried = [record["settings"] for record in records]
        for _ in range(DRAWS):
            trial = study.ask(self.distributions)
            settings = {name: self._value(name, drawn) for name, drawn in trial.params.items()}
            if settings not in tried:
                return trial, settings
            study.tell(trial, state=TrialState.FAIL)
        return None

    def _study(self, records: Sequence[dict]) -> optuna.Study:
        """As it stands after those trials, of which nothing is drawn anew."""
        seed = random_key("trial", self.args.seed, len(records)) % 2**32
        startup = self.args.startup_trials
        samplers = {
            "grid": lambda: None,
            "random": lambda: optuna.samplers.RandomSampler(seed),
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup),
        }
        pruners = {
            "none": optuna.pruners.NopPruner,
            "median": lambda: optuna.pruners.MedianPruner(startup),
            "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
        }
        study = optuna.create_study(
            direction=self.direction,
            sampler=samplers[self.args.method](),
            pruner=pruners[self.args.pruner](),
        )
        for record in records:
            places = {n: place(self.settings[n], v) for n, v in record["settings"].items()}
            study.enqueue_trial(places)
            trial = study.ask(self.distributions)
            if record["status"] == "failed":
                # optuna forgets what has failed, and tries beside it; the worst is pruned at once
                study.tell(trial, state=TrialState.PRUNED)
                continue
            for step, value in record["evaluations"]:
                is_pruned(trial, step, value)
            if record["status"] == "pruned":
                study.tell(trial, state=TrialState.PRUNED)
            else:
                study.tell(trial, record["value"])
        return study

    def _value(self, name: str, drawn: Any) -> Any:
        """What the script is given: of a range four digits, which is all that anybody reads."""
        values = self.settings[name]
        if isinstance(values, list):
            return values[drawn]
        if isinstance(drawn, float) and "step" not in values:
            return min(max(float(f"{drawn:.4g}"), float(values["low"])), float(values["high"]))
        return drawn


def place(values: Any, value: Any) -> Any:
    """Of a value in its list: 0 is not false; of one of a range itself."""
    return [*map(json.dumps, values)].index(json.dumps(value)) if type(values) is list else value


def is_pruned(trial: optuna.Trial, step: int, value: float | None) -> bool:
    """Whether a trial is given up after this evaluation; null stands for what was not finite."""
    trial.report(math.nan if value is None else value, step)
    return trial.should_prune()
