"""What a run leaves behind at its end: the export, the plots and the model card."""

from typing import Any

import torch

from utils.export import export
from utils.report import write_card, write_plots
from utils.training import Training


def conclude(
    training: Training, title: str, pipeline_tag: str, usage: str, facts: dict[str, Any]
) -> None:
    """Write them, and say where they are and what came out; the end of all processes.

    Args:
        title, pipeline_tag, usage, facts: as for `write_card`.
    """
    if training.is_main:
        a, folder = training.arguments, training.folder
        hours = f"{training.seconds / 3600:.2f} hours"
        facts |= {
            "training": f"{training.step} steps, {hours}; {training.ending}",
            "processes": f"{training.ranks.world_size} x {training.accelerator.device.type}",
            "parallelism": training.engine.describe(),
            "steps skipped": training.guard.skipped_steps,
        }
        model = folder.path / "model"
        dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        merge = getattr(a, "merge_adapter", False)
        export(training.best_checkpoint(), model, dtype[a.mixed_precision], merge)
        plots = write_plots(folder)
        card = write_card(folder, title, pipeline_tag, usage, facts)
        folder.finish(training.step, training.ending, a, training.fixed["the training data"])
        lines = ["finished", *(f"  {name}: {fact}" for name, fact in facts.items())]
        lines += [f"model: {model}", f"card:  {card}", *(f"plot:  {path}" for path in plots)]
        print("\n".join(lines), flush=True)
    training.accelerator.wait_for_everyone()
    training.accelerator.end_training()
    training.ranks.release()
