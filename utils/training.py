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
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from utils import checkpoint
from utils.arguments import TrainingArguments
from utils.config import InputError
from utils.engine import Data, Engine, Step, start_processes
from utils.integrity import describe_files
from utils.model_settings import ModelFiles
from utils.optimizer import make_optimizer
from utils.program import announced, say
from utils.progress import Progress, command_line, seconds_since_command
from utils.ranks import Ranks, end_together
from utils.run_folder import RunFolder, check_continues, push_to_hub
from utils.run_state import RunState, repeated, totals


class Training:
    """One run on this process.

    Raises:
        InputError: a resume that would not continue the same run; too many non-finite steps.
    """

    def __init__(self, arguments: TrainingArguments, folder: RunFolder):
        self.arguments, self.folder, self.ranks = arguments, folder, Ranks()
        self.accelerator = start_processes(arguments)
        self.ranks.join(self.accelerator.process_index, self.accelerator.num_processes)
        self.is_main, self.state = self.ranks.is_main, RunState()
        self.folder.check(self.ranks)
        with self.ranks.together():
            if self.is_main and arguments.push_to_hub:
                push_to_hub(arguments)  # whether it will be possible
        self.data_states: dict[int, dict] = {}  # by lane: where the data go on
        self.hours = 0.0  # of training, as all ranks have it
        self.saved_step: int | None = None
        self.failure: BaseException | None = None  # met by this rank alone

    @property
    def stopped(self) -> bool:
        """By a signal, to be continued."""
        return self.ranks.stopped

    def prepare(
        self,
        objective: torch.nn.Module,
        model: "transformers.PreTrainedModel",
        tokenizer: transformers.PreTrainedTokenizerBase,
        data: Data,
        flops_per_token: Callable[[int], float] = lambda step: 0.0,
    ) -> None:
        """Build the engine and the optimizer; continue from the newest checkpoint, if any.

        Args:
            objective: holds the model; see utils/engine.py.
            model: whose parameters are trained, those that require gradients; or a peft.PeftModel.
            flops_per_token: of the step with this number, for the utilization; 0: not known.
        """
        a, ranks = self.arguments, self.ranks
        self.objective, self.flops_per_token = objective, flops_per_token
        self.model_files = ModelFiles(model, tokenizer, self.folder.path)
        optimizer = make_optimizer(model, a, a.seed)
        fixed = {
            "the optimizer": type(optimizer).__name__,
            **data.fingerprint(),
            "model": model.config.to_diff_dict() | {"transformers_version": "any"},
            **a.fixed(),
        }
        self.fixed = json.loads(json.dumps(fixed))  # as it comes back from a checkpoint
        found: list[dict[str, Any]] = []
        with ranks.together(), announced("looking at the training files"):
            if self.is_main:
                found = [describe_files(data.files, a.verify_sources == "hash")]
        self.training_files = ranks.gather(found)[0]
        self.engine = Engine(self.accelerator, objective, model, optimizer, a)
        if newest := self.folder.newest_checkpoint():
            self._resume(newest)
        elif a.warm_start:
            self.engine.load(Path(a.warm_start))
        steps = a.total_steps or self.state.total_steps
        self.state.total_steps = steps or data.count_steps(ranks)
        self.learning_rate_factor = a.learning_rate_factor(self.state.total_steps)
        self.data = data.steps(ranks.rank, ranks.world_size, self.state.step, self.data_states)

    def forward(self, batch: dict[str, torch.Tensor], **flags: Any) -> Any:
        """What the objective, given `flags`, returns without learning; of all ranks together."""
        self.objective.eval()
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        with torch.no_grad(), self.accelerator.autocast():
            return self.engine.module(**batch, **flags)

    def steps(self) -> Iterator[int]:
        """Train; after a step, and at the end of the run, the caller may evaluate.

        Before an evaluation the steps are saved: whatever it raises, on whatever rank, loses none.
        Ends with `stopped` set when a signal asked for it: saved, and not at its end.
        """
        state = self.state
        self._begin()
        while not self.stopped and (state.pending_evaluation or not state.ending):
            if not state.pending_evaluation and not self._advance():
                continue
            if state.ending or state.step % self.arguments.save_steps == 0:
                self._log_tokens_by_source()
                self.save()
            elif self.evaluates():
                self.save()
            yield state.step
            if not self.stopped:
                state.pending_evaluation = False
                self._update_checkpoint()
        if not self.stopped:
            self._log_tokens_by_source()
            self.save()
            self._update_checkpoint()
            self._check_failure()
        if self.stopped:
            self.stop()

    def evaluates(self) -> bool:
        """Whether it is time to evaluate: every `eval_steps`, and at the end of the run."""
        a, step = self.arguments, self.state.step
        is_last = bool(self.state.ending) or step == self.state.total_steps
        is_due = a.eval_steps is not None and step % a.eval_steps == 0
        return (is_last or is_due) and self.state.evaluated_step != step

    def record_evaluation(self, results: dict[str, Any] | None) -> None:
        """Log an evaluation; note the best one, and end the run when none was better for long.

        Args:
            results: None when a stop signal cut the evaluation short: a resume repeats it.
        """
        if results is None:
            return
        self.state.evaluated_step = self.state.step
        if results:
            self.log({"step": self.state.step, **results})
            self.state.note_evaluation(results, self.arguments)

    @property
    def best_step(self) -> int | None:
        """Of the checkpoint that is kept, tested and exported, if there is such a wish."""
        return self.state.best_step if self.arguments.load_best_model_at_end else None

    def best_checkpoint(self) -> Path:
        """What the run has come to: the best with `load_best_model_at_end`, else the last."""
        if self.best_step is not None:
            return checkpoint.folder_of(self.folder.path, self.best_step)
        return self.folder.newest_checkpoint()

    def load_best(self) -> None:
        """At the end of the run: weigh what comes (a test, say) by the best weights."""
        if self.best_checkpoint() not in (self.engine.loaded, self.folder.newest_checkpoint()):
            self.engine.load(self.best_checkpoint())

    def record_test(self, results: dict[str, Any]) -> None:
        """Log what was measured at the end of the run: eval_loss as test_loss, and so on."""
        named = {f"test_{name.removeprefix('eval_')}": value for name, value in results.items()}
        self.log({"step": self.state.step, **named})
        self._check_failure()

    def save(self) -> None:
        """Write checkpoints/step-…: what was trained on so far, and nothing that was prefetched."""
        if self.saved_step == self.state.step:
            return
        folder, state = self._checkpoint()
        try:
            self.engine.save(folder, state, self.model_files.write)
        except checkpoint.CheckpointError as error:
            last = self.folder.newest_checkpoint() or "none"
            raise InputError(
                f"could not write {folder}: {error}. "
                f"The last good checkpoint is {last}: make room and start again"
            ) from None
        self.saved_step = self.state.step
        self._prune()
        say(f"saved {folder}")

    def stop(self) -> None:
        """Save where a signal has stopped the run, and say how to continue it."""
        if self.state.step > 0:
            self.save()
        say(f"stopped after step {self.state.step}; resume with: {command_line()}")

    def log(self, record: dict[str, Any]) -> None:
        """A line in metrics.jsonl, numbers to the trackers, and lines on the screen."""
        if not self.is_main:
            return
        self.progress.show(record, self.state.seconds, self.arguments.eval_metric)
        self._record(record)

    def _record(self, record: dict[str, Any]) -> None:
        try:
            self.folder.record(record)
        except InputError as error:
            self.failure = error

    def _begin(self) -> None:
        """Settings and metrics in their folder, and the trackers; on rank 0."""
        a, state = self.arguments, self.state
        with self.ranks.together():
            if self.is_main:
                self.folder.begin(a, state.metrics_size)
            self.progress = Progress(self.accelerator, a, state, self.flops_per_token)

    def _checkpoint(self) -> tuple[Path, dict[str, Any]]:
        """Where the checkpoint of this step stands, and what it says of the run."""
        self.folder.check(self.ranks)
        self.state.metrics_size = self.folder.metrics_size()
        state = {
            "counters": asdict(self.state),
            "fixed": self.fixed,
            "training_files": self.training_files,
            "base_model": self.model_files.base_model,
            "limits": self.arguments.limits,
            "world_size": self.ranks.world_size,
            "stream": dict(self.ranks.gather(list(self.data_states.items()))),
        }
        return checkpoint.folder_of(self.folder.path, self.state.step), state

    def _update_checkpoint(self) -> None:
        """Of this step, if there is one: a resume does not evaluate again."""
        if self.saved_step == self.state.step:
            folder, state = self._checkpoint()
            if self.is_main:
                checkpoint.update(folder, state)
            self._prune()

    def _prune(self) -> None:
        a = self.arguments
        if self.is_main:
            checkpoint.prune(self.folder.path, a.keep_last, a.keep_every, self.best_step)

    def _log_tokens_by_source(self) -> None:
        """Once a step, though a stopped run may come here again."""
        if self.state.counted_step != self.state.step:
            self.state.counted_step = self.state.step
            found = totals(self.ranks.gather(list(self.data_states.values())))
            if self.is_main and found:
                self._record({"step": self.state.step, **found})
                say(repeated(found, self.arguments))

    def _advance(self) -> bool:
        """Train a step, or note the end of the run; whether the caller is to hear of it."""
        state, start = self.state, time.monotonic()
        if state.total_steps is not None and state.step >= state.total_steps:
            state.ending = f"all {state.total_steps} steps are done"
        else:
            try:
                data = next(self.data)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # what Rust raises is no Exception
                data, self.failure = Step([], 0, {}), error
            tokens, counts = self._agree(data)
            if self.stopped:
                return False
        if state.ending:
            state.pending_evaluation = state.evaluated_step != state.step
        elif any(counts.values()):  # else single tokens at the very end: nothing to predict
            self._train_step(data, tokens, counts, start)
            state.pending_evaluation = True
        return state.pending_evaluation

    def _train_step(self, data: Step, tokens: int, counts: dict[str, int], start: float) -> None:
        a, state = self.arguments, self.state
        rate = a.learning_rate * self.learning_rate_factor(state.step, self.hours)
        limit = state.spike_limit(a)
        update = self.engine.train_step(data.batches, counts, state.step, rate, limit)
        state.step += 1
        state.tokens += tokens
        state.seconds += time.monotonic() - start
        self.data_states.update(data.states)
        record = {
            "step": state.step,
            "loss": update.loss,
            **(update.losses if len(update.losses) > 1 else {}),
            "learning_rate": rate,
            "grad_norm": update.gradient_norm,
            "tokens": state.tokens,
        }
        say(state.note_step(record, limit, update.applied, a))
        is_fault = "skipped" in record or "loss_spike" in record
        if is_fault or state.step % a.logging_steps == 0 or state.step == state.total_steps:
            self.log(record)
        if state.step == self.progress.first_step + 1:
            say(f"{seconds_since_command():.1f} seconds from the command to the first step")
        state.check_skips(a, self.folder.newest_checkpoint())

    def _agree(self, data: Step) -> tuple[int, dict[str, int]]:
        """(tokens, counts by name) of the global batch; sets `stopped` or `ending` on all ranks."""
        a, state = self.arguments, self.state
        counts = {name: 0 for name in self.objective.names}
        for batch in data.batches:
            for name, count in self.objective.counts(batch).items():
                counts[name] += count
        hours = state.seconds / 3600 * self.is_main  # of the rank whose state a checkpoint keeps
        mine = [hours, self.failure is not None, data.tokens, *counts.values()]
        self.hours, failed, tokens, *sums = self.ranks.sum(mine)
        if failed and not self.stopped:  # what stops a run may have ended its data workers, too
            self._fail()
        if a.max_hours is not None and self.hours > a.max_hours:
            state.ending = f"max_hours: {a.max_hours} have passed"
        elif tokens == 0:
            state.ending = "the data is spent"
        return int(tokens), {name: int(n) for name, n in zip(counts, sums, strict=True)}

    def _check_failure(self) -> None:
        if self.ranks.any_rank(self.failure is not None):
            self._fail()

    def _fail(self) -> None:
        """Of all ranks, when one of them has met a failure: that one says so."""
        if self.state.step > 0:
            self.save()
        end_together(self.failure)

    def _resume(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        by_hash = self.arguments.verify_sources == "hash"
        check_continues(folder, state, self.fixed, self.training_files, by_hash)
        self.engine.load(folder)
        # once the size of the metrics stood beside the counters
        self.state = RunState(**{"metrics_size": state.get("metrics_size", 0), **state["counters"]})
        if state["limits"] != self.arguments.limits:
            self.state.ending = ""  # what has come to its end goes on within other limits
        self.saved_step = self.state.step
        lanes = {int(lane): s for lane, s in state["stream"].items()}
        # those of other ranks would be saved again as they are now
        rank, world_size = self.ranks.rank, self.ranks.world_size
        self.data_states = {k: s for k, s in lanes.items() if k % world_size == rank}
        say(f"continuing {folder}")
