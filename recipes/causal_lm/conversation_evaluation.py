"""What an assistant has learnt: loss and accuracy over its answers' tokens, and answers to read."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from chat_rendering import plain_messages, turn_ends
from conversations import collate
from utils.loss import IGNORE_INDEX
from utils.scoring import by_domain, generate_texts, score_examples
from utils.training import Training


def evaluate_answers(
    training: Training,
    examples: list[dict[str, Any]],
    token_scores: Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Means over the answers' tokens, in all and by source, and of each example; summed in float64.

    Args:
        token_scores: batch → (loss, whether the label is the most likely token) by position.

    Returns:
        None when a stop signal came in between.
    """

    def score(indices: list[int]) -> list[list[float]]:
        batch = collate([[examples[index]] for index in indices] or [[]])
        losses, are_right = (values.double().cpu() for values in token_scores(batch))
        counted = (batch["shift_labels"] != IGNORE_INDEX).double()
        return torch.stack([losses * counted, are_right * counted, counted]).sum(2).T.tolist()

    found = score_examples(training, examples, score, "evaluating")
    if found is None:
        return None
    sums = np.array(found)  # of each example's losses, right tokens and tokens

    def means(indices: list[int]) -> dict[str, Any]:
        loss, right, tokens = sums[indices].sum(0).tolist()
        return {"loss": loss / tokens, "token_accuracy": right / tokens, "tokens": int(tokens)}

    def measure(indices: list[int]) -> dict[str, Any]:
        return {f"eval_{name}": value for name, value in means(indices).items()}

    places = [example["place"] for example in examples]
    each = [{"row": place} | means([index]) for index, place in enumerate(places)]
    return by_domain([example["source"] for example in examples], measure), each


def write_answers(
    training: Training, model: Any, tokenizer: Any, examples: list[dict[str, Any]]
) -> list[dict[str, str]] | None:
    """`first_answers` to be read below each other."""
    found = first_answers(training, model, tokenizer, examples)
    if found is None:
        return None
    written = filter(None, found)
    return [{"prompt": one["prompt"], "text": f"\n\n{one['prediction']}"} for one in written]


def score_answers(
    training: Training, model: Any, tokenizer: Any, examples: list[dict[str, Any]]
) -> tuple[dict[str, float], list[dict[str, Any]]] | None:
    """How often `first_answers` are those of the data to the letter, how near by ROUGE-L; and each.

    Both in percent, but for blanks at the ends; ROUGE-L is the F1 of rouge_score with Porter's
    stemmer, which reads letters and digits of English. None when a stop signal came in between.
    """
    from rouge_score.rouge_scorer import RougeScorer  # takes a second

    found = first_answers(training, model, tokenizer, examples)
    if found is None:
        return None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    written = [*filter(None, found)]
    for one in written:
        texts = one["reference"].strip(), one["prediction"].strip()
        one["exact_match"] = 100.0 * (texts[0] == texts[1])
        one["rougeL"] = 100 * scorer.score(*texts)["rougeL"].fmeasure
    names = ("exact_match", "rougeL")
    return {f"eval_{n}": float(np.mean([one[n] for one in written])) for n in names}, found


def first_answers(
    training: Training, model: Any, tokenizer: Any, examples: list[dict[str, Any]]
) -> list[dict[str, Any]] | None:
    """What the model says first in each conversation: at most 100 tokens, each the most likely.

    {} of a conversation that leaves it no position. None when a stop signal came in between.
    """
    asked: list[dict[str, Any]] = []
    prompts = []
    positions = getattr(model.config, "max_position_embeddings", 2**31)
    for example in examples:
        turns = example["messages"]
        first = next(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
        prompt = tokenizer.apply_chat_template(
            plain_messages(turns[:first]),
            tools=example["tools"],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        asked.append({})
        if len(prompt) < positions:
            asked[-1]["prompt"] = turns[first - 1]["content"]
            asked[-1]["reference"] = turns[first]["content"] or ""
            prompts.append(prompt)
    texts = generate_texts(
        training, model, tokenizer, prompts, 100, eos_token_id=turn_ends(tokenizer), do_sample=False
    )
    if texts is None:
        return None
    for turn, text in zip(filter(None, asked), texts, strict=True):
        turn["prediction"] = text
    return asked
