"""The part of training that every recipe shares: processes, steps, guards, cadence, checkpoints.

    training = Training(args, folder)
    training.prepare(objective, model, tokenizer, corpus, rows_of)  # resumes if it can
    for step in training.steps():
        if training.evaluates():
            training.record_evaluation(…)

An objective is a module whose `forward(**batch)` returns named sums of losses, and whose
`counts(batch)` tells what each is divided by. The loss of a step is Σ weight x sum / count over
the whole global batch: however it is split over ranks and micro-batches, it is the same number.
"""

import copy
import json
import math
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from utils import checkpoint
from utils.config import InputError
from utils.engine import Engine, start_processes
from utils.export import export
from utils.lanes import Corpus
from utils.packing import collate
from utils.progress import Progress, command_line, seconds_since_command
from utils.randomness import random_key
from utils.report import write_card, write_plots
from utils.run_folder import RunFolder
from utils.stream import Row, StepStream
from utils.training_arguments import TrainingArguments

# what a checkpoint keeps of a `Training`
COUNTERS = (
    "step",
    "tokens",
    "seconds",
    "skipped_steps",
    "skipped_in_a_row",
    "recent_losses",
    "best_eval_loss",
    "evaluations_since_best",
    "evaluated_step",
    "counted_step",
    "pending_evaluation",
    "ending",
)


class Training:
    """One run on this process.

    Raises:
        InputError: a resume that would not continue the same run; too many non-finite steps.
    """

    def __init__(self, arguments: TrainingArguments, folder: RunFolder):
        self.arguments, self.folder = arguments, folder
        self.is_main = int(os.environ.get("RANK", 0)) == 0
        self.stop_signal = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note_signal)
        self.accelerator = start_processes(arguments, folder.path)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        # what the ranks agree on from step to step goes over the CPU: the accelerator does not wait
        self.agreement = dist.new_group(backend="gloo") if self.world_size > 1 else None
        self.step = self.tokens = self.skipped_steps = self.skipped_in_a_row = 0
        self.seconds = 0.0  # of training, over all interruptions
        self.recent_losses: list[float] = []
        self.best_eval_loss, self.evaluations_since_best = math.inf, 0
        self.pending_evaluation = False  # the step is trained, and the caller not yet heard
        self.evaluated_step = self.counted_step = self.saved_step = None
        self.metrics_size = 0  # bytes of metrics.jsonl that the checkpoint has seen
        self.stream_states: dict[int, dict] = {}
        self.ending = ""  # why the run has come to its end
        self.stopped = False  # by a signal, to be continued
        self.data_error: InputError | None = None  # met by this rank alone

    def prepare(
        self,
        objective: torch.nn.Module,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        corpus: Corpus,
        rows_of: Callable[[int, dict | None], Iterator[Row]],
        fixed: dict[str, Any] | None = None,
        flops_per_token: Callable[[int], float] = lambda step: 0.0,
    ) -> None:
        """Build the engine and the optimizer; continue from the newest checkpoint, if any.

        Args:
            objective: holds the model; see the module's docstring.
            rows_of: (lane, its state or None) → the rows of the lane.
            fixed: what else must not change over the life of a run.
            flops_per_token: of the step with this number, for the utilization; 0: not known.
        """
        a = self.arguments
        self.objective, self.flops_per_token = objective, flops_per_token
        self.model_files = (copy.deepcopy(model.config), tokenizer)
        fixed = {
            "seed": a.seed,
            "the training data": corpus.fingerprint(),
            "the tokenizer": corpus.encode.fingerprint(),
            "model": model.config.to_diff_dict() | {"transformers_version": "any"},
            "sequence_length": a.sequence_length,
            "global_batch_size": a.global_batch_size,
            **(fixed or {}),
        }
        self.fixed = json.loads(json.dumps(fixed))  # as it comes back from a checkpoint
        self.engine = Engine(self.accelerator, objective, model, a)
        try:
            schedule = get_scheduler(
                a.lr_scheduler_type,
                torch.optim.SGD([torch.zeros(1)], lr=a.learning_rate),
                num_warmup_steps=a.warmup_steps,
                num_training_steps=a.total_steps,
                scheduler_specific_kwargs=a.lr_scheduler_kwargs,
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"lr_scheduler_kwargs: {error}") from None
        self.learning_rate_factor = schedule.lr_lambdas[0]  # of the step: nothing to restore
        if newest := self.folder.newest_checkpoint():
            self._resume(newest)
        elif a.warm_start:
            self.engine.load(Path(a.warm_start))
        per_lane = a.global_batch_size // corpus.arguments.lanes
        self.rows = StepStream(
            corpus, rows_of, per_lane, self.rank, self.world_size, self.stream_states
        ).steps()

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
            self.world_size,
        )
        while True:
            if not self.pending_evaluation:
                if a.total_steps is not None and self.step >= a.total_steps:
                    self.ending = self.ending or f"all {a.total_steps} steps are done"
                if self.ending:
                    break
                start = time.monotonic()
                try:
                    rows = next(self.rows)
                except InputError as error:
                    rows, self.data_error = [], error
                size = a.micro_batch_size(self.step)
                features = [row.features for row in rows]
                batches = [collate(features[i : i + size]) for i in range(0, len(rows), size)]
                tokens, counts = self._agree(sum(row.tokens for row in rows), batches)
                if self.stopped:
                    return self.stop()
                if self.ending:
                    break
                if not any(counts.values()):
                    continue  # single tokens at the very end of the data: nothing to predict
                self._train_step(rows, batches, counts, tokens, start)
                self.pending_evaluation = True
                if self.step == self.progress.first_step + 1:
                    seconds = seconds_since_command()
                    self._say(f"{seconds:.1f} seconds from the command to the first step")
            yield self.step
            if self.stopped:
                return self.stop()
            self.pending_evaluation = False
            if self.step % a.save_steps == 0:
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

    def any_rank(self, condition: bool) -> bool:
        """Whether it holds on any rank; notes in `stopped` that any was told to stop."""
        stop, total = self._sum([float(self.stop_signal), float(condition)])
        self.stopped = stop > 0
        return total > 0

    def gather(self, mine: list) -> list:
        """The ranks' lists, one after the other, on every rank."""
        everyone: list[list] = [mine]
        if self.agreement is not None:
            everyone = [[]] * self.world_size
            dist.all_gather_object(everyone, mine, group=self.agreement)
        return [item for part in everyone for item in part]

    def record_evaluation(self, results: dict[str, Any] | None) -> None:
        """Log an evaluation, and end the run when `eval_loss` has not improved for long enough.

        Args:
            results: None when a stop signal cut the evaluation short: a resume repeats it.
        """
        if results is None:
            return
        self.evaluated_step = self.step
        if "eval_loss" not in results:
            return
        self.log({"step": self.step, **results})
        if results["eval_loss"] < self.best_eval_loss:
            self.best_eval_loss, self.evaluations_since_best = results["eval_loss"], 0
        else:
            self.evaluations_since_best += 1
        patience = self.arguments.early_stopping_patience
        if patience is not None and self.evaluations_since_best >= patience:
            self.ending = f"the evaluation loss has not improved {patience} times"

    def forget_losses(self) -> None:
        """What comes is not to be compared with what was: in spikes, in early stopping."""
        self.recent_losses = []
        self.best_eval_loss, self.evaluations_since_best = math.inf, 0

    def record_test(self, results: dict[str, Any]) -> None:
        """Log what was measured at the end of the run: eval_loss as test_loss, and so on."""
        named = {f"test_{name.removeprefix('eval_')}": value for name, value in results.items()}
        self.log({"step": self.step, **named})

    def save(self) -> None:
        """Write checkpoints/step-…: what was trained on so far, and nothing that was prefetched."""
        if self.saved_step == self.step:
            return
        a, states = self.arguments, dict(self.gather(list(self.stream_states.items())))
        folder = self.folder.path / "checkpoints" / f"step-{self.step:08d}"
        state = {
            "counters": {name: getattr(self, name) for name in COUNTERS},
            "fixed": self.fixed,
            "limits": a.limits,
            "metrics_size": self.folder.metrics_size(),
            "world_size": self.world_size,
            "stream": states,
        }
        try:
            self.engine.save(folder, state, self._write_model_files)
        except checkpoint.CheckpointError as error:
            last = self.folder.newest_checkpoint()
            raise InputError(
                f"could not write {folder}: {error}. "
                f"The last good checkpoint is {last or 'none'}: make room and start again"
            ) from None
        self.saved_step = self.step
        if self.is_main:
            checkpoint.prune(self.folder.path, a.keep_last, a.keep_every)
            print(f"saved {folder}", flush=True)

    def _write_model_files(self, folder: Path) -> None:
        for part in self.model_files:
            part.save_pretrained(folder)

    def _log_tokens_by_source(self) -> None:
        """Once a step, though a stopped run may come here again."""
        if self.counted_step == self.step:
            return
        self.counted_step = self.step
        states = self.gather(list(self.stream_states.values()))
        record: dict[str, Any] = {"step": self.step}
        for name, key in {"tokens_by_source": "seen", "sequence_counts": "counts"}.items():
            totals: Counter[str] = Counter()
            for state in states:
                totals.update(state.get(key, {}))
            if totals:
                record[name] = dict(sorted(totals.items()))
        if self.is_main and len(record) > 1:
            self.folder.record(record)

    def conclude(self, title: str, pipeline_tag: str, usage: str, facts: dict[str, Any]) -> None:
        """Write the export, the plots and the card, and say where they are and what came out."""
        if self.is_main:
            a, path = self.arguments, self.folder.path
            facts |= {
                "training": f"{self.step} steps, {self.seconds / 3600:.2f} hours; {self.ending}",
                "processes": f"{self.world_size} x {self.accelerator.device.type}",
                "parallelism": self.engine.describe(),
                "steps skipped": self.skipped_steps,
            }
            dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
            export(self.folder.newest_checkpoint(), path / "model", dtype[a.mixed_precision])
            plots = write_plots(self.folder)
            card = write_card(self.folder, title, pipeline_tag, usage, facts)
            self.folder.finish(self.step, self.ending, a, self.fixed["the training data"])
            lines = ["finished", *(f"  {k}: {v}" for k, v in facts.items())]
            lines += [f"model: {path / 'model'}", f"card:  {card}", *(f"plot:  {p}" for p in plots)]
            print("\n".join(lines), flush=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _train_step(self, rows, batches, counts, tokens, start) -> None:
        a = self.arguments
        rate = a.learning_rate * self.learning_rate_factor(self.step)
        self.engine.set_learning_rate(rate)
        self.engine.begin_step(len(batches))
        usual = self.recent_losses
        limit = math.inf
        if len(usual) >= 20:
            limit = statistics.fmean(usual) + a.loss_spike_threshold * statistics.pstdev(usual)
        self.objective.train()
        device = self.accelerator.device
        sums = torch.zeros(len(counts), device=device)
        divisors = torch.tensor([max(n, 1) for n in counts.values()], device=device)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            torch.manual_seed(random_key(a.seed, self.step, index, self.rank))
            with nullcontext() if is_last else self.engine.accumulate():
                with self.accelerator.autocast():
                    terms = self.engine.module(**{k: v.to(device) for k, v in batch.items()})
                terms = torch.stack([terms[name].float() for name in counts])
                sums += terms.detach()
                loss = (terms / divisors).sum()
                if is_last:
                    means = self.accelerator.reduce(sums, "sum") / divisors
                    allowed = limit if a.skip_loss_spikes else math.inf
                    good = means.sum().isfinite() & (means.sum() <= allowed)
                    # every rank sees the same loss; a bad one makes the gradients non-finite, which
                    # the engine skips: no rank waits for the accelerator to decide
                    loss = loss * torch.where(good, 1.0, math.nan)
                # the engine takes the mean over the ranks, where the sum is wanted
                self.engine.backward(loss * self.world_size, is_last)
            self.engine.step(is_last)
        losses = dict(zip(counts, means.tolist(), strict=True))
        loss = sum(losses.values())
        self.step += 1
        self.tokens += tokens
        self.stream_states.update((row.lane, row.state) for row in rows)
        self.seconds += time.monotonic() - start
        record = {
            "step": self.step,
            "loss": loss,
            **(losses if len(losses) > 1 else {}),
            "learning_rate": rate,
            "grad_norm": self.engine.gradient_norm,
            "tokens": self.tokens,
        }
        self._guard(record, limit)
        is_fault = "skipped" in record or "loss_spike" in record
        if is_fault or self.step % a.logging_steps == 0 or self.step == a.total_steps:
            self.log(record)
        if self.skipped_in_a_row >= a.max_skipped_steps:
            last = self.folder.newest_checkpoint()
            raise InputError(
                f"{self.skipped_in_a_row} steps in a row, up to step {self.step}, were skipped: "
                "loss or gradient not finite, or a spike. Look at the data or the learning_rate; "
                f"the last good checkpoint: {last or 'none'}"
            )

    def _guard(self, record: dict[str, Any], limit: float) -> None:
        """Count and report spikes and skipped steps."""
        a, loss, applied = self.arguments, record["loss"], self.engine.applied
        if limit < loss < math.inf:
            record["loss_spike"] = True
            self._say(f"step {self.step}: the loss of {loss:.4f} is a spike (above {limit:.4f})")
        searches_scale = a.mixed_precision == "fp16" and math.isfinite(loss) and not applied
        if applied:
            self.skipped_in_a_row = 0
            self.recent_losses = [*self.recent_losses, loss][-100:]
        else:
            record["skipped"] = True
            self.skipped_steps += 1
            self.skipped_in_a_row += not searches_scale
            self._say(
                f"step {self.step}: skipped, loss {loss}, gradient norm {record['grad_norm']}"
            )

    def _resume(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        for name, was, now in _differences(state["fixed"], self.fixed):
            raise InputError(
                f"cannot continue {folder}: {name} was {was} and is {now}. "
                "Change it back, or choose another output_dir"
            )
        self.engine.load(folder)
        for name in COUNTERS:
            setattr(self, name, state["counters"][name])
        if state["limits"] != self.arguments.limits:
            self.ending = ""  # what has come to its end goes on within other limits
        self.saved_step, self.metrics_size = self.step, state["metrics_size"]
        lanes = {int(lane): s for lane, s in state["stream"].items()}
        # those of other ranks would be saved again as they are now
        self.stream_states = {k: s for k, s in lanes.items() if k % self.world_size == self.rank}
        self._say(f"continuing {folder}")

    def _agree(self, tokens: int, batches: list[dict]) -> tuple[int, dict[str, int]]:
        """(tokens, counts by name) of the global batch; sets `stopped` or `ending` on all ranks."""
        a = self.arguments
        spent = a.max_hours is not None and self.seconds > 3600 * a.max_hours
        flags = [float(self.stop_signal), float(spent), float(self.data_error is not None)]
        counts = {name: 0 for name in self.objective.names}
        for batch in batches:
            for name, count in self.objective.counts(batch).items():
                counts[name] += count
        stop, spent, failed, tokens, *totals = self._sum([*flags, float(tokens), *counts.values()])
        self.stopped = stop > 0
        if failed and not self.stopped:  # what stops a run may have ended its data workers, too
            if self.step > 0:
                self.save()
            raise self.data_error or SystemExit(2)  # the rank that met it says so
        if spent:
            self.ending = f"max_hours: {a.max_hours} have passed"
        elif tokens == 0:
            self.ending = "the data is spent"
        return int(tokens), {name: int(n) for name, n in zip(counts, totals, strict=True)}

    def _sum(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        if self.agreement is not None:
            dist.all_reduce(total, group=self.agreement)
        return total.tolist()

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
        if self.is_main:
            print(text, flush=True)

    def _note_signal(self, number: int, frame: Any) -> None:
        # a launcher repeats the terminal's Ctrl-C to its workers: only a later one is a second
        if number == signal.SIGINT and self.stop_signal and time.monotonic() > self.signal_time + 2:
            raise KeyboardInterrupt
        self.stop_signal, self.signal_time = number, time.monotonic()
        # not print: the signal may have come in the middle of one
        if self.is_main:
            name = signal.Signals(number).name
            os.write(1, f"{name}: stopping after this step, with a checkpoint\n".encode())

    def stop(self) -> None:
        """Save where a signal has stopped the run, and say how to continue it."""
        if self.step > 0:
            self.save()
        self._say(f"stopped after step {self.step}; resume with: {command_line()}")


def _differences(was: dict, now: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value before, value now) of what differs in nested settings."""
    for key in {**was, **now}:
        before, after = was.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after
