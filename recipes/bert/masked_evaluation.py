"""What an encoder knows of held-out documents: masked tokens, pairs, pseudo-perplexity."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from example_rows import features, fit
from masking import Example, ExampleMaker
from sentence_encoder import SentenceEncoder, Sentences
from utils.config import InputError
from utils.lanes import encode_documents
from utils.loss import IGNORE_INDEX
from utils.run_state import RunState
from utils.scoring import batches
from utils.sources import BadRecords, Document, held_out_documents
from utils.training import Training

WINDOW_DOCUMENTS = 64

# batch → term → (loss, whether the most likely one was right) of each target, row by row
Scores = Callable[[dict[str, torch.Tensor]], dict[str, tuple[torch.Tensor, torch.Tensor]]]

USAGE = """
from transformers import pipeline

fill = pipeline("fill-mask", "{model}")
print(fill(f"the sum of two {fill.tokenizer.mask_token}.")[0]["sequence"])
"""


@dataclass
class MaskedEvaluation:
    """Scores held-out documents with the encoder in training; all ranks call it together.

    The results are None when a stop signal came in between.
    """

    training: Training
    encode: SentenceEncoder
    make_examples: ExampleMaker
    scores: Scores
    packing: bool

    def validation(self, step: int) -> dict[str, Any] | None:
        """Of the validation sources after `step` steps, at the length of that step's phase."""
        a = self.training.arguments
        if not a.validation_sources:
            return {}
        documents = held_out_documents(a.validation_sources, a.eval_documents, a)
        return self.loss_and_accuracy(documents, a.phase_at(max(step - 1, 0)).sequence_length)

    def test(self) -> dict[str, Any] | None:
        """Of the test sources, by the best weights, at the length of the last phase."""
        self.training.load_best()
        a = self.training.arguments
        documents, length = partial(held_out_documents, a.test_sources, None, a), a.row_length
        results = self.loss_and_accuracy(documents(), length)
        if results is None or not (per_domain := a.pseudo_perplexity_documents):
            return results
        more = self.pseudo_perplexity(documents(), per_domain, length)
        return None if more is None else results | more

    def loss_and_accuracy(
        self, documents: Iterator[Document], sequence_length: int
    ) -> dict[str, Any] | None:
        """Mean loss and accuracy of each term over its targets, in all and by domain.

        The examples are made as in training, of 64 documents at a time, with draws of their own:
        they depend neither on the step nor on the number of ranks.
        """

        def examples(window: list[Document], index: int) -> Iterator[tuple[Example, str]]:
            window, sentences = self._encoded(window)
            names = [(document.file, document.position) for document in window]
            seed = self.training.arguments.seed
            for example in self.make_examples(
                sentences, names, sequence_length, 0, seed, "evaluation", index
            ):
                yield example, window[example.document].domain

        windows = iter(lambda: list(itertools.islice(documents, WINDOW_DOCUMENTS)), [])
        sums = self._score(windows, examples, sequence_length)
        if sums is None:
            return None
        for term in self.make_examples.arguments.objective.split("_"):
            if term not in sums:
                raise InputError(
                    f"nothing to evaluate on: no held-out document has a target of {term}"
                )
        results: dict[str, Any] = {"eval_loss": 0.0}
        for term, by_domain in sums.items():
            loss, right, count = sum(by_domain.values())
            results["eval_loss"] += loss / count
            results |= {
                f"eval_{term}_loss": loss / count,
                f"eval_{term}_accuracy": right / count,
                f"eval_{term}_targets": int(count),
                f"eval_{term}_loss_by_domain": {d: v[0] / v[2] for d, v in by_domain.items()},
                f"eval_{term}_accuracy_by_domain": {d: v[1] / v[2] for d, v in by_domain.items()},
            }
        return results

    def pseudo_perplexity(
        self, documents: Iterator[Document], per_domain: int, sequence_length: int
    ) -> dict[str, Any] | None:
        """exp of the mean loss of each token when it alone is masked (Salazar et al. 2020).

        Of the beginning of the first `per_domain` documents of each domain, as far as a row
        reaches.
        """
        counts: dict[str, int] = {}

        def chosen() -> Iterator[Document]:
            for document in documents:
                counts[document.domain] = counts.get(document.domain, 0) + 1
                if counts[document.domain] <= per_domain:
                    yield document

        def examples(window: list[Document], index: int) -> Iterator[tuple[Example, str]]:
            for document, sentences in zip(*self._encoded(window), strict=True):
                tokens = sentences.tokens[: sequence_length - 2]
                for place in range(1, len(tokens) + 1):
                    yield self.make_examples.with_one_masked(tokens, place), document.domain

        windows = ([document] for document in chosen())
        sums = self._score(windows, examples, sequence_length)
        if sums is None:
            return None
        if not sums:
            raise InputError("nothing to evaluate on: no held-out document has a token")
        by_domain = sums["mlm"]
        loss, _, count = sum(by_domain.values())
        return {
            "eval_pseudo_perplexity": math.exp(loss / count),
            "eval_pseudo_perplexity_by_domain": {
                d: math.exp(v[0] / v[2]) for d, v in by_domain.items()
            },
        }

    def _encoded(self, window: list[Document]) -> tuple[list[Document], list[Sentences]]:
        """The documents of a window and their sentences, without what the tokenizer fails on."""
        report = BadRecords(self.training.arguments.on_bad_record, one_rank=True).report
        pairs = zip(window, encode_documents(self.encode, window, report), strict=True)
        kept = [pair for pair in pairs if pair[1] is not None]
        return [document for document, _ in kept], [sentences for _, sentences in kept]

    def _score(
        self,
        windows: Iterator[list[Document]],
        examples: Callable[[list[Document], int], Iterator[tuple[Example, str]]],
        length: int,
    ) -> dict[str, dict[str, np.ndarray]] | None:
        """Term → domain → [loss, right, targets], float64, over all ranks; None when stopped."""
        ranks, domains = self.training.ranks, {}

        def rows() -> Iterator[tuple[dict[str, np.ndarray], list[int]]]:
            """Every rank takes every world_size-th window; then empty rows, for ever."""
            mine = itertools.islice(enumerate(windows), ranks.rank, None, ranks.world_size)
            for index, window in mine:
                made = list(examples(window, index))
                numbers = {id(e): domains.setdefault(d, len(domains)) for e, d in made}
                for group in fit([example for example, _ in made], length, self.packing):
                    places = [(numbers[id(e)], len(e.input_ids)) for e in group]
                    yield features(group, length), places
            while True:
                yield features([], length), []

        sums: dict[str, np.ndarray] = {}
        size = self.training.arguments.micro_batch_size(max(self.training.state.step - 1, 0))
        for batch, contents in batches(ranks, rows(), size):
            of_position = np.zeros((len(contents), length), np.int64)
            for row, places in enumerate(contents):
                numbers, sizes = zip(*places, strict=True) if places else ((), ())
                of_position[row, : sum(sizes)] = np.repeat(numbers, sizes)
            labels = {"mlm": batch["labels"]}
            for term, (losses, right) in self.scores(batch).items():
                mask = labels.get(term, batch["pair_labels"]).numpy() != IGNORE_INDEX
                domain = of_position[mask]
                values = (losses.double().cpu().numpy(), right.double().cpu().numpy(), None)
                added = [np.bincount(domain, v, minlength=len(domains)) for v in values]
                before = sums.get(term, np.zeros((3, 0)))
                sums[term] = np.pad(before, [(0, 0), (0, len(domains) - before.shape[1])]) + added
        if ranks.stopped:
            return None
        found = [
            (term, name, values[:, number])
            for term, values in sums.items()
            for name, number in domains.items()
            if number < values.shape[1]
        ]
        totals: dict[str, dict[str, np.ndarray]] = {}
        for term, name, values in sorted(ranks.gather(found), key=lambda item: item[:2]):
            if values[2]:
                by_domain = totals.setdefault(term, {})
                by_domain[name] = by_domain.get(name, 0) + values
        return totals


def forget_losses(state: RunState) -> None:
    """What comes is not to be compared with what was: in spikes, in early stopping."""
    state.recent_losses = []
    state.best_metric = state.best_step = None
    state.evaluations_since_best = 0


def facts_of_test(results: dict[str, Any]) -> dict[str, str]:
    """What a card says of them."""
    return {
        f"{name.removeprefix('eval_').replace('_', ' ')} of the test documents": f"{v:.4f}"
        for name, v in results.items()
        if isinstance(v, float)
    }


def facts_of_sequences(records: list[dict[str, Any]]) -> dict[str, str]:
    """What a card says of the examples that were trained on, as they were counted last."""
    counted = (r["sequence_counts"] for r in reversed(records) if "sequence_counts" in r)
    return {name.replace("_", " "): f"{count:,}" for name, count in next(counted, {}).items()}
