"""What fine-tuning needs on each GPU where a part of the model, or an adapter, is trained.

Known from the configuration alone: nothing is loaded.
"""

from typing import Any

import torch
import transformers

from utils.adapters import AdapterArguments, add_adapter, freeze
from utils.memory import count_parameters, memory_section
from utils.model import empty_model


def finetuning_plan(config: Any, arguments: Any) -> str:
    """What `--dry_run` prints: parameters, and memory by ZeRO stage and number of GPUs."""
    a, parts = arguments, parameter_parts(config, arguments)
    total, tokens = parts["trained"] + parts["frozen"], a.per_device_batch_size * a.sequence_length
    lines = [
        f"model        {config.model_type}, {total:,} parameters, of which "
        f"{parts['trained']:,} are trained ({parts['trained'] / total:.2%})",
        f"step         {a.global_batch_size:,} examples of at most {a.sequence_length:,} tokens",
        f"micro-batch  at most {tokens:,} tokens",
    ]
    if any(table.weight != 1 for table in a.train_data):
        shown = (f"{table.log_name} x {table.weight:g}" for table in a.train_data)
        lines.append(f"data         {', '.join(shown)}")
    text = config.get_text_config()
    if a.gradient_checkpointing and hasattr(text, "num_hidden_layers"):
        kept = text.num_hidden_layers * tokens * text.hidden_size
        kept *= 4 if a.mixed_precision == "no" else 2
        lines.append(
            f"activations  {kept / 2**30:.1f} GiB kept between layers, and one layer's own"
        )
    settings = {"half_frozen": a.has_adapter, "load_in_4bit": a.load_in_4bit, "optim": a.optim}
    lines += memory_section(parts, a.mixed_precision, world_sizes=(1, 8), **settings)
    return "\n".join(lines)


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


def check_trained_part(config: Any, arguments: AdapterArguments) -> "transformers.PreTrainedModel":
    """The model without storage, as it will be trained, to be looked at before anything is written.

    Raises:
        InputError: as `freeze` and `add_adapter` do.
    """
    model = empty_model(config)
    with torch.device("meta"):
        freeze(model, arguments.freeze)
        if arguments.lora is not None:
            add_adapter(model, arguments, "CAUSAL_LM", 0)
    return model
