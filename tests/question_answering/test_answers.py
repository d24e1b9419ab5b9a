"""Windows lose no token and no answer; the best span is the best of all spans of all windows."""

import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BatchEncoding, PreTrainedTokenizerFast

from answers import best_answers, best_spans, check_tokenizer, collate_windows, make_windows
from conftest import WORDS
from questions import Answer, Question
from utils.config import InputError
from utils.loss import IGNORE_INDEX

LENGTH, STRIDE = 40, 10


def roberta_tokenizer():
    """Byte-level, as RoBERTa's: blanks belong to the words after them, two separators."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)], trainer)
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    names = ("bos_token", "pad_token", "eos_token", "unk_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="<s>",
        sep_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
        **dict(zip(names, special, strict=True)),
    )


@pytest.fixture(scope="module", params=["bert", "roberta"])
def any_tokenizer(request, wordpiece):
    return wordpiece if request.param == "bert" else roberta_tokenizer()


def question_about(context, answers, text="ka to mi?", place="rows.jsonl, line 1"):
    return Question("1", text, context, answers, place)


def make_questions(count, words, answer_words, seed=0):
    draw = random.Random(seed)
    questions = []
    for number in range(count):
        chosen = [draw.choice(WORDS) for _ in range(draw.randint(1, words))]
        context = " ".join(chosen)
        first = draw.randrange(len(chosen))
        text = " ".join(chosen[first : first + draw.randint(1, answer_words)])
        start = len(" ".join(chosen[:first])) + (first > 0)
        answers = [Answer(text, start)] if number % 4 else []
        questions.append(question_about(context, answers))
    return questions


def tokens_of(text, tokenizer):
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(zip(encoded["input_ids"], map(tuple, encoded["offset_mapping"]), strict=True))


def test_windows_hold_every_token_in_order(any_tokenizer):
    questions = make_questions(60, 80, 3)
    windows = make_windows(questions, any_tokenizer, LENGTH, STRIDE, keep_offsets=True)
    most = 0
    for number, question in enumerate(questions):
        own = [window for window in windows if window["question"] == number]
        found = []
        for window in own:
            begin, end = window["context"]
            assert len(window["input_ids"]) <= LENGTH
            assert window["input_ids"][window["cls"]] == any_tokenizer.cls_token_id
            ids = window["input_ids"][begin:end].tolist()
            part = list(zip(ids, map(tuple, window["offsets"].tolist()), strict=True))
            if found:
                assert found[-STRIDE:] == part[:STRIDE]  # what neighbours share
                part = part[STRIDE:]
            found += part
        assert found == tokens_of(question.context, any_tokenizer)
        most = max(most, len(own))
    assert most > 3


def test_labels_are_the_answer_in_every_window_that_holds_it(any_tokenizer):
    questions = make_questions(200, 60, 4, seed=1)
    windows = make_windows(questions, any_tokenizer, LENGTH, STRIDE, keep_offsets=True)
    held = {number: 0 for number, question in enumerate(questions) if question.answers}
    for window in windows:
        question = questions[window["question"]]
        (from_, *_), (*_, to) = window["offsets"][0], window["offsets"][-1]
        answer = question.answers[0] if question.answers else None
        first = window["context"][0]
        if answer and from_ <= answer.start and answer.end <= to:
            start = window["offsets"][window["start"] - first][0]
            end = window["offsets"][window["end"] - first][1]
            assert question.context[start:end].strip() == answer.text
            held[window["question"]] += 1
        elif window["start"] != IGNORE_INDEX:
            assert window["start"] == window["end"] == window["cls"]
    lengths = {
        number: len(tokens_of(questions[number].answers[0].text, any_tokenizer)) for number in held
    }
    for number, count in held.items():
        if lengths[number] <= STRIDE:  # +1, but for the blank that may belong to its first token
            assert count > 0
    assert max(held.values()) > 1


def test_an_answer_that_no_window_holds_is_no_target(wordpiece):
    context = " ".join(WORDS[:60])
    windows = make_windows(
        [question_about(context, [Answer(context, 0)])], wordpiece, LENGTH, STRIDE
    )
    assert len(windows) > 2
    assert {(window["start"], window["end"]) for window in windows} == {(IGNORE_INDEX,) * 2}
    assert "offsets" not in windows[0]


def test_blanks_around_an_answer_do_not_hide_it(any_tokenizer):
    context = "kato miren sulba"
    for answer in (Answer("miren", 5), Answer(" miren ", 4), Answer("iren", 6), Answer("mire", 5)):
        (window,) = make_windows(
            [question_about(context, [answer])], any_tokenizer, LENGTH, STRIDE, keep_offsets=True
        )
        first = window["context"][0]
        start = window["offsets"][window["start"] - first][0]
        end = window["offsets"][window["end"] - first][1]
        assert answer.text.strip() in context[start:end]
        assert context[start:end].strip() in "miren"


def test_special_tokens_in_a_text_are_read_as_text(wordpiece):
    question = question_about("kato [SEP] miren [CLS]", [Answer("miren", 11)], "[SEP] kato?")
    (window,) = make_windows([question], wordpiece, LENGTH, STRIDE, keep_offsets=True)
    ids = window["input_ids"].tolist()
    assert ids.count(wordpiece.sep_token_id) == 2
    assert ids.count(wordpiece.cls_token_id) == 1
    start = window["offsets"][window["start"] - window["context"][0]][0]
    assert start == 11


def test_a_question_that_leaves_no_room(wordpiece):
    question = question_about("kato", [], " ".join(WORDS[:30]))
    tokens = len(tokens_of(question.text, wordpiece))
    with pytest.raises(InputError) as error:
        make_windows([question], wordpiece, LENGTH, STRIDE)
    assert str(error.value) == (
        f"rows.jsonl, line 1: the question has {tokens} tokens, which leaves a window of "
        f"sequence_length {LENGTH} no more than doc_stride {STRIDE} tokens of the context: raise "
        "sequence_length, or lower doc_stride"
    )
    make_windows([question], wordpiece, tokens + 3 + STRIDE + 1, STRIDE)  # one more is enough
    with pytest.raises(InputError):
        make_windows([question], wordpiece, tokens + 3 + STRIDE, STRIDE)


def test_what_has_no_token_is_refused(wordpiece):
    with pytest.raises(InputError) as error:
        make_windows([question_about("ka\u200b to", [Answer("\u200b", 2)])], wordpiece, 40, 10)
    assert str(error.value) == "rows.jsonl, line 1: the tokenizer makes no token of '\\u200b'"
    with pytest.raises(InputError) as error:
        make_windows([question_about("\u200b", [])], wordpiece, 40, 10)
    assert str(error.value) == "rows.jsonl, line 1: the tokenizer makes no token of the context"


def test_tokenizers_that_are_refused(wordpiece, tokenizer):
    check_tokenizer(wordpiece)
    with pytest.raises(InputError, match=r"^tokenizer: it has no \[CLS\] token"):
        check_tokenizer(tokenizer)

    class Slow:
        is_fast = False

    with pytest.raises(InputError, match=r"^tokenizer: Slow does not tell .* a fast tokenizer"):
        check_tokenizer(Slow())

    class Losing(type(wordpiece)):
        """As tokenizers 0.23.2 cuts a long text."""

        def __call__(self, *texts, **options):
            found = super().__call__(*texts, **options)
            return BatchEncoding(found.data, found.encodings[:2])

    losing = Losing(tokenizer_object=wordpiece.backend_tokenizer)
    with pytest.raises(InputError, match=r"loses windows of a long text: install tokenizers"):
        check_tokenizer(losing)


def test_best_spans_are_the_best_of_all():
    draw = np.random.default_rng(0)
    for width, n_best in ((1, 3), (4, 7), (30, 40)):
        start_logits, end_logits = draw.normal(size=(2, 20)).astype(np.float32)
        window = {
            "context": (5, 17),
            "cls": 0,
            "offsets": np.array([(10 * i, 10 * i + 9) for i in range(12)]),
        }
        no_answer, spans = best_spans(window, start_logits, end_logits, width, n_best)
        expected = sorted(
            (
                (float(start_logits[i]) + float(end_logits[j]), 10 * (i - 5), 10 * (j - 5) + 9)
                for i in range(5, 17)
                for j in range(i, min(17, i + width))
            ),
            reverse=True,
        )
        assert spans == expected[:n_best]
        assert no_answer == float(start_logits[0]) + float(end_logits[0])


def test_best_answer_over_the_windows_of_a_question():
    context = "one two three"
    questions = [question_about(context, []), question_about(context, [])]
    windows = [{"question": 0}, {"question": 1}, {"question": 0}]
    found = [
        (3.0, [(2.0, 0, 3), (1.0, 4, 7)]),
        (0.5, [(4.0, 7, 13)]),
        (-1.0, [(1.5, 4, 7), (1.0, 3, 7), (0.0, 0, 3)]),
    ]
    first, second = best_answers(questions, windows, found, 3)
    assert first[:3] == ("one", -3.0, [("one", 2.0), ("two", 1.5), ("two", 1.0)])
    assert second[:3] == ("three", -3.5, [("three", 4.0)])


def test_batch_of_windows(wordpiece):
    short = question_about("kato", [Answer("kato", 0)])
    long = question_about("kato miren sulba", [])
    windows = make_windows([short, long], wordpiece, LENGTH, STRIDE)
    batch = collate_windows(windows, 7)
    lengths = [len(window["input_ids"]) for window in windows]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert set(batch["input_ids"][0, lengths[0] :].tolist()) == {7}
    for row, window in enumerate(windows):
        places = batch["is_candidate"][row].nonzero().flatten().tolist()
        assert places == [window["cls"], *range(*window["context"])]
        question_tokens = batch["token_type_ids"][row].tolist()
        assert question_tokens[: window["context"][0]] == [0] * window["context"][0]
        assert set(question_tokens[window["context"][0] : lengths[row]]) == {1}
    assert batch["start_positions"].tolist() == [windows[0]["start"], 0]
    empty = collate_windows([], 7)
    assert empty["input_ids"].shape == (1, 1)
    assert empty["start_positions"].tolist() == [IGNORE_INDEX]
    assert not torch.any(empty["is_candidate"])
