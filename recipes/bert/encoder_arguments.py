"""Settings of what trains encoders on raw text: rows, phases, evaluations."""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import transformers

from masking import MaskingArguments
from utils.arguments import TrainingArguments
from utils.config import InputError
from utils.model import ModelArguments
from utils.plan import PlanArguments
from utils.sources import Source
from utils.stream import StreamArguments


@dataclass
class Phase:
    """A part of the run with its own length."""

    sequence_length: int
    steps: int
    per_device_batch_size: int | None = None  # null: that of the run


@dataclass
class EncoderArguments(
    TrainingArguments, StreamArguments, MaskingArguments, ModelArguments, PlanArguments
):
    """An encoder that is trained on a stream of raw text."""

    model: dict[str, Any] = field(default_factory=lambda: {"model_type": "bert"})
    sequence_length: int = 512  # tokens of a row; with phases, that of the last
    phases: list[Phase] = field(default_factory=list)  # their steps add up to max_steps
    packing: bool = True  # several sequences a row, which do not see each other; false: padding
    validation_sources: list[Source] = field(default_factory=list)  # each read once
    test_sources: list[Source] = field(default_factory=list)  # read once, at the end of the run
    eval_documents: int | None = None  # of each validation source; null: all
    pseudo_perplexity_documents: int = 0  # of each domain of the test, token by token: slow

    def check(self) -> None:
        lengths = [phase.sequence_length for phase in self.phases]
        if self.phases:
            steps = [phase.steps for phase in self.phases]
            if min(steps) < 1:
                raise InputError(f"phases: steps must be at least 1, not {min(steps)}")
            if sum(steps) != self.max_steps:
                raise InputError(
                    f"phases: {' + '.join(map(str, steps))} steps do not add up to max_steps "
                    f"{self.max_steps}"
                )
            if lengths != sorted(lengths):
                raise InputError(f"phases: the lengths {lengths} must not become shorter")
            if self.max_tokens is not None:
                raise InputError("max_tokens: a run in phases is given its length by max_steps")
            if self.sequence_length not in (EncoderArguments.sequence_length, self.row_length):
                raise InputError(
                    f"sequence_length: {self.sequence_length} is not the {self.row_length} of the "
                    "last of the phases: leave it out"
                )
        super().check()
        for size in {phase.per_device_batch_size for phase in self.phases} - {None}:
            self.check_batch(size)
        self.check_length(min([self.row_length, *lengths]))
        if self.eval_documents is not None and self.eval_documents < 1:
            raise InputError(f"eval_documents must be at least 1, not {self.eval_documents}")
        if self.validation_sources:
            terms = self.objective.split("_")
            parts = [f"eval_{term}_{what}" for term in terms for what in ("loss", "accuracy")]
            self.check_metric(["eval_loss", *parts])
        if self.pseudo_perplexity_documents and not self.test_sources:
            raise InputError("pseudo_perplexity_documents: give test_sources, of which they are")
        if self.packing and (self.attn_implementation or "").startswith("flash"):
            raise InputError(
                f"attn_implementation: {self.attn_implementation} takes no mask of packed rows: "
                "set sdpa or eager, or packing: false"
            )

    @property
    def auto_model(self) -> type:
        """The class of transformers with the heads that the objective needs."""
        if self.objective == "mlm":
            return transformers.AutoModelForMaskedLM
        return transformers.AutoModelForPreTraining

    def fixed(self) -> dict[str, Any]:
        # the last phase may be made longer
        phases = [[phase.sequence_length, phase.steps] for phase in self.all_phases()[:-1]]
        return super().fixed() | {"phases": phases, "packing": self.packing}

    @property
    def row_length(self) -> int:
        return self.phases[-1].sequence_length if self.phases else self.sequence_length

    def all_phases(self) -> list[Phase]:
        return self.phases or [Phase(self.sequence_length, self.total_steps or 1)]

    def phase_at(self, step: int) -> Phase:
        """That of the step after `step` steps; the last one goes on."""
        ends = accumulate(phase.steps for phase in self.all_phases())
        phases = zip(self.all_phases(), ends, strict=True)
        return next((phase for phase, end in phases if step < end), self.all_phases()[-1])

    def micro_batch_size(self, step: int) -> int:
        return self.phase_at(step).per_device_batch_size or self.per_device_batch_size

    def phase_rows(self) -> list[tuple[int, int]]:
        """(sequence_length, rows of each lane) of the phases."""
        per_lane = self.global_batch_size // self.lanes
        return [(phase.sequence_length, phase.steps * per_lane) for phase in self.all_phases()]
