"""What fine-tuning needs on each GPU where a part of the model, or an adapter, is trained.

Known from the configuration alone: nothing is loaded.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import transformers

from utils.adapters import AdapterArguments, add_adapter, base_dtype, freeze
from utils.memory import count_parameters, parameter_count
from utils.model import empty_model
from utils.plan import flops_per_token, plan


def finetuning_plan(config: Any, arguments: Any) -> str:
    """What `--dry_run` prints: the weights of tables, and the `plan` with what is frozen."""
    a, mixture = arguments, ""
    if any(table.weight != 1 for table in a.train_data):
        shown = (f"{table.log_name} x {table.weight:g}" for table in a.train_data)
        mixture = f"data         {', '.join(shown)}\n"
    return mixture + plan(
        config,
        a,
        flops=partial(finetuning_flops, config, a),
        parts=parameter_parts(config, a),
        build=partial(check_trained_part, arguments=a, dtype=base_dtype(a)),
        half_frozen=a.has_adapter,
        load_in_4bit=a.load_in_4bit,
    )


def finetuning_flops(config: Any, arguments: Any, context: int) -> int:
    """Of a token that stands in so many, as `flops_per_token`, less what is frozen.

    Under an adapter that is the gradients of the weights, else all of their backward.
    """
    counts, parts = parameter_count(config), parameter_parts(config, arguments)
    looked_up = counts["total"] - counts["without_input_embeddings"]
    frozen = max(0, parts["frozen"] - looked_up)
    adapter = max(0, parts["trained"] + parts["frozen"] - counts["total"])
    less = (2 if arguments.has_adapter else 4) * frozen
    return flops_per_token(config, context) + 6 * adapter - less


def mean_context(lengths: Sequence[int]) -> int:
    """Of the tokens of these texts, each of which stands in a text of its length."""
    return round(sum(length**2 for length in lengths) / sum(lengths))


def parameter_parts(config: Any, arguments: AdapterArguments) -> dict[str, int]:
    """Numbers of parameters: "trained", and of them the "embeddings"; "frozen"; "quantizable",
    those that 4-bit loading takes: of the linear layers but the head. The model is built without
    storage.
    """
    linear = empty_model(config).base_model.modules()
    linear = sum(m.weight.numel() for m in linear if isinstance(m, torch.nn.Linear))
    # an adapter stands inside of the model
    model = check_trained_part(config, arguments)
    trained = count_parameters(p for p in model.parameters() if p.requires_grad)
    embeddings = (m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding))
    return {
        "trained": trained,
        "embeddings": count_parameters(weight for weight in embeddings if weight.requires_grad),
        "frozen": count_parameters(model.parameters()) - trained,
        "quantizable": linear,
    }


def check_trained_part(
    config: Any, arguments: AdapterArguments, dtype: torch.dtype = torch.float32
) -> "transformers.PreTrainedModel":
    """The model without storage, as it will be trained, to be looked at before anything is written.

    Args:
        dtype: of the base.

    Raises:
        InputError: as `freeze` and `add_adapter` do.
    """
    model = empty_model(config).to(dtype)
    with torch.device("meta"):
        freeze(model, arguments.freeze)
        if arguments.lora is not None:
            add_adapter(model, arguments, "CAUSAL_LM", 0)
    return model
