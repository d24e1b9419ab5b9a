"""What an assistant has learnt: loss and accuracy over its answers' tokens, and answers to read."""

from collections.abc import Callable
from typing import Any

import torch

from conversations import collate
from utils.loss import IGNORE_INDEX
from utils.scoring import batches_of
from utils.training import Training


def evaluate_answers(
    training: Training,
    examples: list[dict[str, Any]],
    token_scores: Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]],
    budget: int,
) -> dict[str, Any] | None:
    """Means over the answers' tokens, in all and by source: sums in float64 over all ranks.

    Args:
        token_scores: batch → (loss, whether the label is the most likely token) by position.
        budget: tokens of a batch, padding included.

    Returns:
        None when a stop signal came in between.
    """
    sums: dict[str, torch.Tensor] = {}  # source → [loss, right, tokens]
    lengths = [len(example["input_ids"]) for example in examples]
    for indices in batches_of(training.ranks, lengths, budget):
        batch = collate([[examples[index]] for index in indices] or [[]])
        losses, are_right = (values.double().cpu() for values in token_scores(batch))
        counted = (batch["shift_labels"] != IGNORE_INDEX).double()
        by_row = torch.stack([losses * counted, are_right * counted, counted]).sum(2)
        for row, index in enumerate(indices):
            source = examples[index]["source"]
            sums[source] = sums.get(source, 0) + by_row[:, row]
    if training.stopped:
        return None
    totals: dict[str, torch.Tensor] = {}
    for source, values in sorted(training.ranks.gather(list(sums.items())), key=lambda x: x[0]):
        totals[source] = totals.get(source, 0) + values
    loss, right, tokens = sum(totals.values()).tolist()
    results: dict[str, Any] = {
        "eval_loss": loss / tokens,
        "eval_token_accuracy": right / tokens,
        "eval_tokens": int(tokens),
    }
    if len(totals) > 1:
        by_source = {source: values.tolist() for source, values in totals.items()}
        results["eval_loss_by_source"] = {s: v[0] / v[2] for s, v in by_source.items()}
        results["eval_token_accuracy_by_source"] = {s: v[1] / v[2] for s, v in by_source.items()}
    return results


def write_answers(
    training: Training, model: Any, tokenizer: Any, examples: list[dict[str, Any]]
) -> list[dict[str, str]]:
    """What the model says first in each conversation: at most 100 tokens, each the most likely."""
    samples = []
    positions = getattr(model.config, "max_position_embeddings", 2**31)
    model.eval()
    for example in examples:
        turns = example["messages"]
        first = next(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
        prompt = tokenizer.apply_chat_template(
            turns[:first], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(training.accelerator.device)
        count = prompt["input_ids"].shape[1]
        room = min(100, positions - count)
        if room < 1:
            continue
        with torch.no_grad(), training.accelerator.autocast():
            output = model.generate(
                **prompt,
                max_new_tokens=room,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                synced_gpus=training.ranks.world_size > 1,
            )
        text = tokenizer.decode(output[0, count:], skip_special_tokens=True)
        samples.append({"prompt": turns[first - 1]["content"], "text": f"\n\n{text}"})
    return samples
