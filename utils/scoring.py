"""What all ranks work out together: a result of each example, texts, batches of a stream."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from utils.config import InputError
from utils.epochs import cut_by_length
from utils.files import written_aside
from utils.progress import progress_bar
from utils.ranks import Ranks
from utils.stream import collate
from utils.training import Training


def score_examples(
    training: Training,
    examples: Sequence[Any],
    score: Callable[[list[int]], Sequence[Any]],
    what: str,
    groups: list[list[int]] | None = None,
) -> list[Any] | None:
    """The result of each example, in the order of the examples, on every rank.

    The groups do not depend on the number of ranks, and so neither do the results.

    Args:
        score: a group → a result of each, which can be pickled. Every rank calls it as often, since
            a forward under ZeRO-3 is a joint act: at last perhaps with an empty one.
        what: is done, as the progress bar says.
        groups: of indices, scored together; null: by the lengths of the examples' `input_ids`.

    Returns:
        None when a stop signal came in between.
    """
    ranks = training.ranks
    if groups is None:
        a, lengths = training.arguments, [len(example["input_ids"]) for example in examples]
        groups = cut_by_length(lengths, a.per_device_batch_size * a.row_length)
    groups = groups + [[]] * (-len(groups) % ranks.world_size)
    mine: list[tuple[int, Any]] = []
    training.objective.eval()
    bar = progress_bar(len(examples), what, "examples")
    with bar, torch.no_grad(), training.accelerator.autocast():
        for start in range(0, len(groups), ranks.world_size):
            ranks.any_rank(False)  # hears of a signal to any of them
            if ranks.stopped:
                return None
            indices = groups[start + ranks.rank]
            mine += zip(indices, score(indices), strict=False)
            bar.update(sum(map(len, groups[start : start + ranks.world_size])))
    return [result for _, result in sorted(ranks.gather(mine), key=lambda item: item[0])]


def by_domain(
    domains: Sequence[str], measure: Callable[[list[int]], dict[str, Any]]
) -> dict[str, Any]:
    """What is measured of all examples and, where there are several domains, the same of each:
    {eval_loss: …, eval_loss_by_domain: {…}}.

    Args:
        domains: of each example.
        measure: examples, by their indices → the results by name.
    """
    groups: dict[str, list[int]] = {}
    for index, domain in enumerate(domains):
        groups.setdefault(domain, []).append(index)
    results = measure([*range(len(domains))])
    if len(groups) < 2:
        return results
    apart = {domain: measure(groups[domain]) for domain in sorted(groups)}
    return results | {
        f"{name}_by_domain": {d: found[name] for d, found in apart.items() if name in found}
        for name in results
    }


def generate_texts(
    training: Training,
    model: "transformers.PreTrainedModel",
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 1,
    **options: Any,
) -> list[str] | None:
    """What the model writes after each prompt or, where it has an encoder, to it.

    The texts are the same on every rank and for any number of them. Each batch is drawn from seed
    0, where anything is drawn.

    Args:
        prompts: token ids; to a decoder alone, fewer of them than it has positions.
        max_new_tokens: of a text, at most; fewer where the positions of a decoder end.
        options: more of `model.generate`.

    Returns:
        None when a stop signal came in between.
    """
    device, is_decoder = training.accelerator.device, not model.config.is_encoder_decoder
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    padding = end if padding is None else padding
    options = {"eos_token_id": end, **options}
    positions = getattr(model.config, "max_position_embeddings", 2**31)

    def texts(indices: list[int]) -> list[str]:
        rows = [prompts[index] for index in indices] or [[0]]
        longest = max(len(row) for row in rows)
        tokens = torch.full((len(rows), longest), padding or 0)
        mask = torch.zeros_like(tokens)
        for number, row in enumerate(rows):
            # a decoder goes on where its prompt ends
            where = slice(longest - len(row), None) if is_decoder else slice(len(row))
            tokens[number, where] = torch.as_tensor(row)
            mask[number, where] = 1
        room = min(max_new_tokens, positions - longest) if is_decoder else max_new_tokens
        torch.manual_seed(0)
        with training.engine.whole_root():
            written = model.generate(
                tokens.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=room,
                pad_token_id=padding,
                # where weights are gathered in every forward all ranks write until the last is done
                synced_gpus=training.ranks.world_size > 1,
                **options,
            )
        written = written[:, longest:] if is_decoder else written
        return tokenizer.batch_decode(written, skip_special_tokens=True)

    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return score_examples(training, prompts, texts, "generating", groups)


def check_finite(results: Any) -> None:
    """Raises InputError; to be called by all ranks, with the same numbers: they stop together."""
    if not np.isfinite(results).all():
        raise InputError("the model's predictions are not finite: lower the learning_rate")


def write_predictions(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    try:
        with written_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def batches(
    ranks: Ranks, rows: Iterator[tuple[dict[str, np.ndarray], list]], batch_size: int
) -> Iterator[tuple[dict[str, torch.Tensor], list[list]]]:
    """Rows, each with what it holds, to batches: as many on every rank, until none has any more.

    Ends, with `ranks.stopped` set, when a signal has come.
    """
    while True:
        failure = None
        try:
            batch = list(itertools.islice(rows, batch_size))
        except InputError as error:  # of one rank's share of the documents
            failure, batch = error, []
        if ranks.any_rank(failure is not None):
            if failure is None:
                raise SystemExit(2)  # the rank that met it says so
            raise InputError(str(failure), one_rank=True)
        if ranks.stopped or not ranks.any_rank(any(contents for _, contents in batch)):
            return
        yield collate([row for row, _ in batch]), [contents for _, contents in batch]
