"""How near texts are to their references: ROUGE, BLEU and chrF, by the field's own libraries."""

import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def rouge_of_each(predictions: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """F1 of ROUGE-1, -2, -L and -Lsum of each pair, in percent.

    With Porter's stemmer; letters and digits of English alone are compared (rouge_score). Lsum
    looks at sentence after sentence: a text ends them with line breaks, or with . ! or ?.
    """
    from rouge_score.rouge_scorer import RougeScorer  # takes a second

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores = []
    for prediction, reference in zip(predictions, references, strict=True):
        pair = [SENTENCE_END.sub("\n", text) for text in (reference, prediction)]
        found = scorer.score(*pair)
        scores.append({name: 100 * found[name].fmeasure for name in ROUGE})
    return scores


def text_scores(
    predictions: Sequence[str], references: Sequence[str], metrics: Sequence[str]
) -> dict[str, float]:
    """The mean of ROUGE over the pairs, and BLEU and chrF of the corpus, all from 0 to 100.

    Args:
        metrics: of "rouge", "bleu" and "chrf".
    """
    results: dict[str, float] = {}
    if "rouge" in metrics:
        scores = rouge_of_each(predictions, references)
        results |= {name: sum(s[name] for s in scores) / len(scores) for name in ROUGE}
    for name, metric in _corpus_metrics(metrics).items():
        results[name] = metric.corpus_score(list(predictions), [list(references)]).score
    return results


def signatures(metrics: Sequence[str]) -> dict[str, str]:
    """How each metric was computed, for those who compare."""
    found = {}
    if "rouge" in metrics:
        found["ROUGE"] = f"F1, mean over the texts, stemmer, rouge_score {version('rouge_score')}"
    for name, metric in _corpus_metrics(metrics).items():
        metric.corpus_score(["a"], [["a"]])  # which the signature waits for
        found[name] = str(metric.get_signature())
    return found


def first_sentences(text: str, count: int) -> str:
    """The baseline that summaries have to beat (lead-3 in Nallapati et al. 2017)."""
    return "\n".join(line for line in SENTENCE_END.sub("\n", text.strip()).splitlines()[:count])


def _corpus_metrics(metrics: Sequence[str]) -> dict[str, Any]:
    from sacrebleu.metrics import BLEU, CHRF

    return {name: kind() for name, kind in {"bleu": BLEU, "chrf": CHRF}.items() if name in metrics}
