"""The part of training that every recipe shares: processes, steps, guards, cadence, checkpoints.

    training = Training(args, folder)
    training.prepare(objective, model, tokenizer, data)  # resumes if it can
    for step in training.steps():
        if training.evaluates():
            training.record_evaluation(…)

What an objective is, and the loss of a step: utils/engine.py.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils import checkpoint
from utils.arguments import TrainingArguments
from utils.config import InputError
from utils.engine import Engine, start_processes, train_step
from utils.export import ModelFiles
from utils.optimizer import adamw
from utils.progress import Progress, command_line, seconds_since_command
from utils.ranks import Ranks
from utils.run_folder import RunFolder, differences
from utils.run_state import BestModel, LossGuard

# what a checkpoint keeps of a `Training`
COUNTERS = (
    "step",
    "tokens",
    "seconds",
    "evaluated_step",
    "counted_step",
    "pending_evaluation",
    "ending",
)


class Step(NamedTuple):
    """What one rank trains on in a step."""

    batches: list[dict[str, torch.Tensor]]  # micro-batches: as many on every rank
    tokens: int  # of text; the rest of the batches is padding
    states: dict[int, dict]  # by lane: where the data go on once the step has been trained on


class Data(Protocol):
    """What is trained on: an order of steps that does not depend on the number of ranks."""

    def fingerprint(self) -> dict[str, Any]:
        """By name, what must not change over the life of a run."""

    def steps(self, rank: int, world_size: int, step: int, states: dict) -> Iterator[Step]:
        """The rank's steps after `step` steps, which left the states of its lanes."""


class Training:
    """One run on this process.

    Raises:
        InputError: a resume that would not continue the same run; too many non-finite steps.
    """

    def __init__(self, arguments: TrainingArguments, folder: RunFolder):
        self.arguments, self.folder = arguments, folder
        self.ranks = Ranks()
        self.is_main = self.ranks.is_main
        self.accelerator = start_processes(arguments, folder.path)
        self.ranks.join(self.accelerator.process_index, self.accelerator.num_processes)
        self.guard = LossGuard(arguments)
        self.step = self.tokens = 0
        self.seconds = 0.0  # of training, over all interruptions
        self.best = BestModel(arguments)
        self.pending_evaluation = False  # the step is trained, and the caller not yet heard
        self.evaluated_step = self.counted_step = self.saved_step = None
        self.metrics_size = 0  # bytes of metrics.jsonl that the checkpoint has seen
        self.data_states: dict[int, dict] = {}
        self.ending = ""  # why the run has come to its end
        self.data_error: InputError | None = None  # met by this rank alone

    @property
    def stopped(self) -> bool:
        """By a signal, to be continued."""
        return self.ranks.stopped

    def prepare(
        self,
        objective: torch.nn.Module,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: Data,
        optimizer: torch.optim.Optimizer | None = None,
        base_model: str | None = None,
        fixed: dict[str, Any] | None = None,
        flops_per_token: Callable[[int], float] = lambda step: 0.0,
    ) -> None:
        """Build the engine and the optimizer; continue from the newest checkpoint, if any.

        Args:
            objective: holds the model; see utils/engine.py.
            model: whose parameters are trained, those that require gradients; or a peft.PeftModel.
            optimizer: null: AdamW.
            base_model: where the other parameters come from, if there are any.
            fixed: what else must not change over the life of a run.
            flops_per_token: of the step with this number, for the utilization; 0: not known.
        """
        a = self.arguments
        self.objective, self.flops_per_token = objective, flops_per_token
        self.model_files = ModelFiles(model, tokenizer)
        is_whole = all(parameter.requires_grad for parameter in model.parameters())
        if is_whole and not {name for name, _ in model.named_buffers()} & model.state_dict().keys():
            base_model = None  # but for saved buffers (Marian's bias of the logits) all is trained
        self.base_model = base_model
        optimizer = optimizer or adamw(model, a)
        fixed = {
            "seed": a.seed,
            "the optimizer": type(optimizer).__name__,
            **data.fingerprint(),
            "model": model.config.to_diff_dict() | {"transformers_version": "any"},
            "sequence_length": a.sequence_length,
            "global_batch_size": a.global_batch_size,
            **(fixed or {}),
        }
        self.fixed = json.loads(json.dumps(fixed))  # as it comes back from a checkpoint
        self.learning_rate_factor = a.learning_rate_factor()
        self.engine = Engine(self.accelerator, objective, model, optimizer, a)
        if newest := self.folder.newest_checkpoint():
            self._resume(newest)
        elif a.warm_start:
            self.engine.load(Path(a.warm_start))
        ranks = self.ranks
        self.data = data.steps(ranks.rank, ranks.world_size, self.step, self.data_states)

    def steps(self) -> Iterator[int]:
        """Train; after a step, and at the end of the run, the caller may evaluate.

        Ends with `stopped` set when a signal asked for it: saved, and not at its end.
        """
        a = self.arguments
        if self.is_main:
            self.folder.begin(a, self.metrics_size)
        self.accelerator.wait_for_everyone()
        self.accelerator.init_trackers("", init_kwargs={"tensorboard": {"purge_step": self.step}})
        self.progress = Progress(
            a.total_steps,
            self.step,
            self.tokens,
            self.seconds,
            self.flops_per_token,
            self.accelerator.device,
            self.ranks.world_size,
        )
        while True:
            if not self.pending_evaluation:
                if a.total_steps is not None and self.step >= a.total_steps:
                    self.ending = self.ending or f"all {a.total_steps} steps are done"
                if self.ending:
                    break
                start = time.monotonic()
                try:
                    data = next(self.data)
                except InputError as error:
                    data, self.data_error = Step([], 0, {}), error
                tokens, counts = self._agree(data)
                if self.stopped:
                    return self.stop()
                if self.ending:
                    break
                if not any(counts.values()):
                    continue  # single tokens at the very end of the data: nothing to predict
                self._train_step(data, tokens, counts, start)
                self.pending_evaluation = True
                if self.step == self.progress.first_step + 1:
                    seconds = seconds_since_command()
                    self._say(f"{seconds:.1f} seconds from the command to the first step")
            yield self.step
            if self.stopped:
                return self.stop()
            self.pending_evaluation = False
            is_best = self.best.step_to_keep == self.step
            if is_best or self.step % a.save_steps == 0:
                self._log_tokens_by_source()
                self.save()
        if self.evaluated_step != self.step:
            yield self.step
            if self.stopped:
                return self.stop()
        self._log_tokens_by_source()
        self.save()

    def evaluates(self) -> bool:
        """Whether it is time to evaluate: every `eval_steps`, and at the end of the run."""
        a = self.arguments
        is_last = bool(self.ending) or self.step == a.total_steps
        is_due = a.eval_steps is not None and self.step % a.eval_steps == 0
        return (is_last or is_due) and self.evaluated_step != self.step

    def record_evaluation(self, results: dict[str, Any] | None) -> None:
        """Log an evaluation; note the best one, and end the run when none was better for long.

        Args:
            results: None when a stop signal cut the evaluation short: a resume repeats it.

        Raises:
            InputError: `metric_for_best_model` is not among the results.
        """
        if results is None:
            return
        self.evaluated_step = self.step
        if not results:
            return
        self.log({"step": self.step, **results})
        if ending := self.best.note(self.step, results):
            self.ending = ending

    def forget_losses(self) -> None:
        """What comes is not to be compared with what was: in spikes, in early stopping."""
        self.guard.forget()
        self.best.forget()

    def best_checkpoint(self) -> Path:
        """What the run has come to: the best with `load_best_model_at_end`, else the last."""
        if self.best.step_to_keep is not None:
            return checkpoint.folder_of(self.folder.path, self.best.step_to_keep)
        return self.folder.newest_checkpoint()

    def load_best(self) -> None:
        """At the end of the run: weigh what comes (a test, say) by the best weights."""
        if self.best_checkpoint() != self.folder.newest_checkpoint():
            self.engine.load(self.best_checkpoint())

    def record_test(self, results: dict[str, Any]) -> None:
        """Log what was measured at the end of the run: eval_loss as test_loss, and so on."""
        named = {f"test_{name.removeprefix('eval_')}": value for name, value in results.items()}
        self.log({"step": self.step, **named})

    def save(self) -> None:
        """Write checkpoints/step-…: what was trained on so far, and nothing that was prefetched."""
        if self.saved_step == self.step:
            return
        a, states = self.arguments, dict(self.ranks.gather(list(self.data_states.items())))
        folder = checkpoint.folder_of(self.folder.path, self.step)
        counters = {name: getattr(self, name) for name in COUNTERS}
        state = {
            "counters": counters | self.guard.state() | self.best.state(),
            "fixed": self.fixed,
            "base_model": self.base_model,
            "limits": a.limits,
            "metrics_size": self.folder.metrics_size(),
            "world_size": self.ranks.world_size,
            "stream": states,
        }
        try:
            self.engine.save(folder, state, self.model_files.write)
        except checkpoint.CheckpointError as error:
            last = self.folder.newest_checkpoint()
            raise InputError(
                f"could not write {folder}: {error}. "
                f"The last good checkpoint is {last or 'none'}: make room and start again"
            ) from None
        self.saved_step = self.step
        if self.is_main:
            best = self.best.step_to_keep
            checkpoint.prune(self.folder.path, a.keep_last, a.keep_every, best)
            print(f"saved {folder}", flush=True)

    def _log_tokens_by_source(self) -> None:
        """Once a step, though a stopped run may come here again."""
        if self.counted_step == self.step:
            return
        self.counted_step = self.step
        states = self.ranks.gather(list(self.data_states.values()))
        found = totals(states)
        if self.is_main and found:
            self.folder.record({"step": self.step, **found})

    def _train_step(self, data: Step, tokens: int, counts: dict[str, int], start: float) -> None:
        a = self.arguments
        rate = a.learning_rate * self.learning_rate_factor(self.step)
        self.engine.set_learning_rate(rate)
        limit = self.guard.limit()
        losses = train_step(self.engine, self.objective, data.batches, counts, self.step, limit)
        loss = sum(losses.values())
        self.step += 1
        self.tokens += tokens
        self.data_states.update(data.states)
        self.seconds += time.monotonic() - start
        record = {
            "step": self.step,
            "loss": loss,
            **(losses if len(losses) > 1 else {}),
            "learning_rate": rate,
            "grad_norm": self.engine.gradient_norm,
            "tokens": self.tokens,
        }
        self._say(self.guard.note(record, limit, self.engine.applied))
        is_fault = "skipped" in record or "loss_spike" in record
        if is_fault or self.step % a.logging_steps == 0 or self.step == a.total_steps:
            self.log(record)
        if self.guard.is_exhausted:
            last, count = self.folder.newest_checkpoint(), self.guard.skipped_in_a_row
            raise InputError(
                f"{count} steps in a row, up to step {self.step}, were skipped: "
                "loss or gradient not finite, or a spike. Look at the data or the learning_rate; "
                f"the last good checkpoint: {last or 'none'}"
            )

    def _resume(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        for name, was, now in differences(state["fixed"], self.fixed):
            raise InputError(
                f"cannot continue {folder}: {name} was {was} and is {now}. "
                "Change it back, or choose another output_dir"
            )
        self.engine.load(folder)
        for name in COUNTERS:
            setattr(self, name, state["counters"][name])
        self.guard.load_state(state["counters"])
        self.best.load_state(state["counters"])
        if state["limits"] != self.arguments.limits:
            self.ending = ""  # what has come to its end goes on within other limits
        self.saved_step, self.metrics_size = self.step, state["metrics_size"]
        lanes = {int(lane): s for lane, s in state["stream"].items()}
        # those of other ranks would be saved again as they are now
        rank, world_size = self.ranks.rank, self.ranks.world_size
        self.data_states = {k: s for k, s in lanes.items() if k % world_size == rank}
        self._say(f"continuing {folder}")

    def _agree(self, data: Step) -> tuple[int, dict[str, int]]:
        """(tokens, counts by name) of the global batch; sets `stopped` or `ending` on all ranks."""
        a = self.arguments
        spent = a.max_hours is not None and self.seconds > 3600 * a.max_hours
        counts = {name: 0 for name in self.objective.names}
        for batch in data.batches:
            for name, count in self.objective.counts(batch).items():
                counts[name] += count
        flags = [float(spent), float(self.data_error is not None), float(data.tokens)]
        spent, failed, tokens, *totals = self.ranks.sum([*flags, *counts.values()])
        if failed and not self.stopped:  # what stops a run may have ended its data workers, too
            if self.step > 0:
                self.save()
            raise self.data_error or SystemExit(2)  # the rank that met it says so
        if spent:
            self.ending = f"max_hours: {a.max_hours} have passed"
        elif tokens == 0:
            self.ending = "the data is spent"
        return int(tokens), {name: int(n) for name, n in zip(counts, totals, strict=True)}

    def log(self, record: dict[str, Any]) -> None:
        """A line in metrics.jsonl, numbers to the trackers, and a line on the screen."""
        if not self.is_main:
            return
        if "loss" in record:
            print(self.progress.line(record, self.seconds), flush=True)
        if "eval_loss" in record:
            shown = [f"{k} {v:.4f}" for k, v in record.items() if isinstance(v, float)]
            print(f"step {self.step}  {'  '.join(shown)}", flush=True)
        self.folder.record(record)
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        self.accelerator.log(numbers, step=self.step)

    def _say(self, text: str) -> None:
        if self.is_main and text:
            print(text, flush=True)

    def stop(self) -> None:
        """Save where a signal has stopped the run, and say how to continue it."""
        if self.step > 0:
            self.save()
        self._say(f"stopped after step {self.step}; resume with: {command_line()}")
        self.ranks.release()


def totals(states: list[dict]) -> dict[str, dict[str, int]]:
    """Of all lanes' states: tokens by source, and what else a recipe has its lanes count."""
    found = {}
    for name, key in {"tokens_by_source": "seen", "sequence_counts": "counts"}.items():
        total: Counter[str] = Counter()
        for state in states:
            total.update(state.get(key, {}))
        if total:
            found[name] = dict(sorted(total.items()))
    return found
