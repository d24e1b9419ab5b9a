"""What a run's own model and tokenizer give, kept beside its checkpoint for the export to be held
against: what leaves is what was trained."""

import json
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import psutil
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from utils.checkpoint import added
from utils.config import InputError
from utils.model_settings import architecture_of
from utils.program import say

if TYPE_CHECKING:
    from utils.training import Training

FILE = "reference.safetensors"
ROWS, TOKENS, COLUMNS = 8, 128, 1024  # compared at most
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# ‖difference‖ / ‖logits‖ at most. In float32 sums in another order differ by 1e-6 to 1e-4, with
# TF32 in convolutions by 1e-3. In bfloat16 the logits of 180 tiny architectures change by 0.008
# (the median) to 0.13: mixtures of experts, whose routers choose others. A tensor that is lost, or
# of another step, changes them by their own size.
TOLERANCES = {torch.float32: 5e-3, torch.float16: 0.1, torch.bfloat16: 0.3}


@dataclass
class Reference:
    """Rows of token ids, the logits of a model for them, and how a tokenizer reads their texts."""

    rows: torch.Tensor
    logits: dict[str, torch.Tensor]
    precision: torch.dtype = torch.float32  # in which they were computed
    readings: dict[str, list[int]] = field(default_factory=dict)  # text → token ids

    @classmethod
    def of(cls, model: "transformers.PreTrainedModel") -> "Reference":
        rows = _any_rows(model)
        return cls(rows, _logits_if_any(model.eval(), model.config, rows), model.dtype)

    def write(self, checkpoint: Path) -> None:
        more = {"precision": str(self.precision)[6:], "readings": json.dumps(self.readings)}
        with added(checkpoint, FILE) as file:
            save_file({"rows": self.rows, **self.logits}, file, metadata=more)

    def compare(
        self,
        name: Path,
        folder: Path,
        config: Any,
        tokenizer: Any,
        dtype: torch.dtype,
        rewritten: list[str],
    ) -> None:
        """Raises InputError unless what was exported to `folder` gives the same.

        Args:
            name: that the folder is to have.
            config, tokenizer: of the model.
            dtype: in which the weights were written.
            rewritten: what `compare_tensors` could not compare.
        """
        for text, tokens in self.readings.items():
            if tokenizer(text, verbose=False).input_ids != tokens:
                raise _differs(name, f"its tokenizer reads {text[:80]!r} otherwise than the run's")
        architecture = architecture_of(config)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in architecture(config).parameters())
        free = psutil.virtual_memory().available
        if not self.logits or 2 * size > free:
            reason = f"a second model needs {2 * size / 2**30:.1f} GiB of memory"
            reason = reason if self.logits else "there are none of the run's model"
            but = shorten(", ".join(rewritten), 300)
            but = f", but for {len(rewritten)} that transformers rewrites: {but}" if but else ""
            say(
                f"warning: the logits of {name} were not compared: {reason}. Its tensors are those "
                f"of the run{but}"
            )
            return
        dtype_of_client = torch.float32 if 4 * size < free else torch.bfloat16
        client = architecture.from_pretrained(folder, config=config, dtype=dtype_of_client).eval()
        compare_tensors(name, folder, client.state_dict().items())
        try:
            found = _logits(client, client.config, self.rows)
        except Exception as error:  # what the run's model took
            raise _differs(name, f"it fails with {type(error).__name__}: {error}") from None
        tolerance = max(TOLERANCES[d] for d in (self.precision, dtype, dtype_of_client))
        for key, expected in self.logits.items():
            finite = expected.isfinite()
            difference = float((found[key] - expected)[finite].norm() / expected[finite].norm())
            if not torch.equal(found[key].isfinite(), finite) or difference > tolerance:
                raise _differs(name, f"its {key} differ by {difference:.2g} of their size")


def compare_tensors(
    name: Path, folder: Path, expected: Iterable[tuple[str, torch.Tensor]]
) -> list[str]:
    """Hold these, bit by bit after the cast, against what stands under their names in the files.

    Returns:
        Those of other names or shapes there: transformers rewrites them when it saves and loads.

    Raises:
        InputError: there are other numbers.
    """
    rewritten = []
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    written = {key: file for file in files for key in file.keys()}  # noqa: SIM118
    for key, values in expected:
        found = written[key].get_tensor(key) if key in written else None
        if found is None or found.shape != values.shape:
            rewritten.append(key)
            continue
        dtype = min(found.dtype, values.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(found.to(dtype), values.to(dtype)):
            raise _differs(name, f"{key} has other numbers")
    return sorted(rewritten)


def _differs(name: Path, what: str) -> InputError:
    return InputError(
        f"{name} would not be what was trained: {what}. It was not exported; the checkpoints stay"
    )


def read_reference(checkpoint: Path) -> Reference | None:
    """What the run has left there, if it came to its end with this checkpoint."""
    if not (checkpoint / FILE).exists():
        return None
    with safe_open(checkpoint / FILE, framework="pt") as file:
        more, found = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    readings = json.loads(more["readings"])
    return Reference(found.pop("rows"), found, getattr(torch, more["precision"]), readings)


def reference_of_run(training: "Training") -> Reference:
    """Of the model as it stands; all ranks call it together."""
    a, engine, objective = training.arguments, training.engine, training.objective
    model, tokenizer = engine.model, training.model_files.tokenizer
    seen = [rows for rows in training.ranks.gather([engine.rows]) if rows is not None]
    rows = seen[0][:ROWS, :TOKENS].contiguous() if seen else _any_rows(model)
    texts = tokenizer.batch_decode(rows)
    readings = {text: tokenizer(text, verbose=False).input_ids for text in texts}
    found: dict[str, torch.Tensor] = {}
    stance = torch.compiler.set_stance("force_eager") if a.torch_compile else nullcontext()
    objective.eval()
    # inside of whatever wraps the objective
    plain = patch.object(objective, "forward", lambda **inputs: model(**inputs))
    # a base in 4 bits is another model than the one that an adapter is exported for
    if not getattr(a, "load_in_4bit", False):
        with plain, stance, training.accelerator.autocast():
            rows_there = rows.to(training.accelerator.device)
            found = _logits_if_any(engine.module, model.config, rows_there)
    return Reference(rows, found, PRECISIONS[a.mixed_precision], readings)


def _logits_if_any(model: Any, config: Any, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    try:
        return _logits(model, config, rows)
    except Exception as error:  # not every model takes plain rows of tokens
        say(f"warning: no logits to compare: {shorten(str(error), 200)}")
        return {}


def _logits(model: Any, config: Any, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """By name, what the plain forward gives: of a vocabulary, the columns of the rows' tokens."""
    inputs = {"input_ids": rows}
    if config.is_encoder_decoder and "Classification" in config.architectures[0]:
        end = config.eos_token_id  # whose state is classified: one in each row
        inputs = {
            "input_ids": torch.cat([rows[:, :-1] % end, torch.full_like(rows[:, :1], end)], 1)
        }
    elif config.is_encoder_decoder:
        inputs["decoder_input_ids"] = rows
    torch.manual_seed(0)
    with torch.no_grad(), ExitStack() as stack:
        for c in (config, config.get_text_config()):
            if hasattr(c, "use_cache"):  # not every model stands a cache where there is no mask
                stack.enter_context(patch.object(c, "use_cache", False))
        output = model(**inputs)
    columns = rows.unique()
    found = {k: v for k, v in output.items() if k.endswith("logits") and torch.is_tensor(v)}
    return {
        key: (values[..., columns] if values.shape[-1] > COLUMNS else values).float().cpu()
        for key, values in found.items()
    }


def _any_rows(model: "transformers.PreTrainedModel") -> torch.Tensor:
    size = getattr(model.config.get_text_config(), "vocab_size", 256)  # CANINE has characters
    return (7 * torch.arange(4 * 16).view(4, 16)) % size
