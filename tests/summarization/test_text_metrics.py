"""ROUGE, BLEU and chrF are those of the libraries that the field compares by."""

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from text_metrics import first_sentences, rouge_of_each, signatures, text_scores

PREDICTIONS = [
    "The cat sat on the mat. It was warm.",
    "Returns the sum of two numbers!",
    "",
    "Counts words\nin a file.",
]
REFERENCES = [
    "A cat was sitting on the mat. The mat was warm.",
    "Return the sum of the two numbers.",
    "Nothing is written here.",
    "Counts the words of a file.\nThen it stops.",
]


def test_rouge_is_the_mean_of_rouge_score():
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=True)
    each = [scorer.score(r, p) for r, p in zip(REFERENCES, PREDICTIONS, strict=True)]
    found = text_scores(PREDICTIONS, REFERENCES, ["rouge"])
    for name in names:
        expected = 100 * sum(score[name].fmeasure for score in each) / 4
        assert found[name] == pytest.approx(expected, abs=1e-12)
    assert len({round(found[name]) for name in names}) == 3


def test_rouge_lsum_sees_sentences():
    scorer = RougeScorer(["rougeLsum"], use_stemmer=True)
    prediction, reference = "It was warm. The cat sat.", "The cat sat. It was warm."
    by_sentence = scorer.score("The cat sat.\nIt was warm.", "It was warm.\nThe cat sat.")
    (found,) = rouge_of_each([prediction], [reference])
    assert found["rougeLsum"] == 100 * by_sentence["rougeLsum"].fmeasure == 100
    assert found["rougeL"] == pytest.approx(50)


def test_bleu_and_chrf_are_those_of_sacrebleu():
    found = text_scores(PREDICTIONS, REFERENCES, ["bleu", "chrf"])
    assert found == {
        "bleu": sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score,
        "chrf": sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score,
    }
    assert 5 < found["bleu"] < found["chrf"] < 95


def test_signatures():
    found = signatures(["rouge", "bleu", "chrf"])
    assert found["ROUGE"] == "F1, mean over the texts, stemmer, rouge_score 0.1.2"
    version = sacrebleu.__version__
    assert found["bleu"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}"
    assert found["chrf"] == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{version}"
    assert signatures(["chrf"]).keys() == {"chrf"}


def test_first_sentences():
    text = "  One is here. Two!\n\nThree? Four 3.5 is one number."
    assert first_sentences(text, 1) == "One is here."
    assert first_sentences(text, 3) == "One is here.\nTwo!\nThree?"
    assert first_sentences(text, 9).endswith("Four 3.5 is one number.")
