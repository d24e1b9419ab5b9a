import pickle
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import BertTokenizer, ByT5Tokenizer

from conftest import SYLLABLES, WORDS
from sentence_encoder import SentenceEncoder, Sentences
from utils.config import InputError
from utils.records import cut_into_sentences

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def wordpiece() -> BertTokenizer:
    signs = [*"[].,:!?", *"PADUNKCLSEPMASK", *SYLLABLES]
    vocabulary = dict.fromkeys([*SPECIAL_TOKENS, *signs, *(f"##{sign}" for sign in signs)])
    return BertTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, do_lower_case=False
    )


# where a text is cut


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [""]),
        ("No end", ["No end"]),
        ("One. Two! Three? Four… Five", ["One.", " Two!", " Three?", " Four…", " Five"]),
        ("Ends with it.", ["Ends with it."]),
        (
            'He said "No." Then (he left.) "So?" 2 more',
            ['He said "No."', " Then (he left.)", ' "So?"', " 2 more"],
        ),
        ("Fruit, e.g. apples, i.e. these. Next", ["Fruit, e.g. apples, i.e. these.", " Next"]),
        ("It costs 3.50 at a.b.c", ["It costs 3.50 at a.b.c"]),
        ("Wait... What?! Yes", ["Wait...", " What?!", " Yes"]),
        ("今日は。明日は！「何？」はい", ["今日は。", "明日は！", "「何？」", "はい"]),  # noqa: RUF001
        ("first\nsame\n\nsecond\n \t\nthird", ["first\nsame\n", "\nsecond\n", " \t\nthird"]),
        ("One.\nTwo.\n", ["One.", "\nTwo.\n"]),
    ],
)
def test_cut_at_the_ends_of_sentences_and_paragraphs(text, expected):
    found = cut_into_sentences(text)
    assert "".join(found) == text
    assert [piece for piece in found if piece] == [piece for piece in expected if piece]


def test_long_stretches_are_cut_at_lines_then_at_blanks_then_anywhere():
    rows = "\n".join(["a b " * 24 + "x"] * 12)  # lines of 97 characters and a line's end
    assert [len(piece) for piece in cut_into_sentences(rows)] == [391, 392, 392]
    assert all(piece.startswith("\na b") for piece in cut_into_sentences(rows)[1:])
    blanks = " ".join(["abcdefghi"] * 100)
    assert [len(piece) for piece in cut_into_sentences(blanks)] == [399, 390, 210]
    assert all(piece.startswith(" abc") for piece in cut_into_sentences(blanks)[1:])
    assert [len(piece) for piece in cut_into_sentences("x" * 1000)] == [400, 400, 200]
    assert [len(piece) for piece in cut_into_sentences("x" * 400)] == [400]
    ended = "x" * 450 + ". Next"
    assert [len(piece) for piece in cut_into_sentences(ended)] == [400, 51, 5]


def test_any_text_is_the_sum_of_its_sentences_and_none_is_longer_than_400():
    draw = random.Random(0)
    pieces = [*'...!?…\n\n\t)”"。 ab', "！", "Word", "x" * 190]  # noqa: RUF001
    lengths = []
    for _ in range(2000):
        text = "".join(draw.choices(pieces, k=draw.randint(0, 60)))
        found = cut_into_sentences(text)
        assert "".join(found) == text
        lengths += map(len, found)
    assert max(lengths) == 400
    assert len(lengths) > 10_000


def test_a_run_of_empty_lines_takes_no_longer_than_other_text():
    started = time.process_time()
    assert len(cut_into_sentences("\n" * 50_000)) == 50_000
    assert time.process_time() - started < 0.5


# token ids


def test_tokens_are_those_of_each_sentence(wordpiece, tokenizer):
    tokenizer = with_encoder_tokens(tokenizer)
    draw = random.Random(0)
    texts = [
        " ".join(draw.choice(WORDS) + draw.choice(["", "", ".", "!", "\n\n"]) for _ in range(count))
        for count in [0, 1, 2, 30, 400]
    ]
    texts += ["  \n ", "東。東！ né", "One. \n\n  \n\nTwo."]  # noqa: RUF001
    for kind in (wordpiece, tokenizer):
        documents = SentenceEncoder(kind)(texts)
        assert len(documents) == len(texts)
        for text, document in zip(texts, documents, strict=True):
            ids = [
                kind(piece, add_special_tokens=False).input_ids
                for piece in cut_into_sentences(text)
                if piece.strip()
            ]
            assert document.tokens.dtype == np.int32
            assert document.tokens.tolist() == [token for piece in ids for token in piece]
            assert document.ends == np.cumsum([len(piece) for piece in ids]).tolist()
            assert len(document) == sum(map(len, ids))


def test_blank_pieces_vanish(wordpiece, tokenizer):
    for kind in (wordpiece, with_encoder_tokens(tokenizer)):
        empty, blank, two = SentenceEncoder(kind)(["", " \n\n \t\n\n", "ka.\n\n \n\nTo.\n"])
        assert (len(empty), empty.ends) == (len(blank), blank.ends) == (0, [])
        assert empty.tokens.dtype == np.int32
        assert len(two.ends) == 2
        assert two.ends[-1] == len(two)


def test_stretches_of_sentences():
    document = Sentences(np.arange(10, dtype=np.int32), [3, 4, 10])
    assert document.between(0, 1).tolist() == [0, 1, 2]
    assert document.between(1, 3).tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert document.between(0, 3).tolist() == list(range(10))
    assert [document.size(0, 1), document.size(1, 2), document.size(0, 3)] == [3, 1, 10]


def test_special_tokens_in_a_text_are_text(wordpiece, tokenizer):
    for kind in (wordpiece, with_encoder_tokens(tokenizer)):
        names = [kind.cls_token, kind.sep_token, kind.mask_token, kind.pad_token]
        text = f"ka {names[0]} to {names[1]}{names[2]}. {names[3]}"
        encode = SentenceEncoder(kind)
        copy = pickle.loads(pickle.dumps(encode))  # a data worker gets one
        for document in (*encode([text]), *copy([text])):
            ids = document.tokens.tolist()
            assert not {*ids} & {*kind.all_special_ids}
            assert kind.decode(ids).replace(" ", "") == text.replace(" ", "")
        # the tokenizer itself goes on reading them as special
        assert kind.mask_token_id in kind(text).input_ids


def test_settings_of_the_tokenizer_do_not_cut_or_pad_sentences(wordpiece):
    texts = ["ka. " + "to " * 50, "ka"]
    expected = SentenceEncoder(wordpiece)(texts)
    wordpiece(texts, truncation=True, padding=True, max_length=8)  # leaves both switched on
    found = SentenceEncoder(wordpiece)(texts)
    assert [document.tokens.tolist() for document in found] == [
        document.tokens.tolist() for document in expected
    ]
    assert len(found[0]) > 50
    assert len(found[1]) == 1


# tokenizers that are not made for it


def with_encoder_tokens(tokenizer):
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    names = ("cls_token", "sep_token", "mask_token")
    tokenizer.add_special_tokens({name: f"<|{name}|>" for name in names})
    return tokenizer


def test_tokenizers_without_the_tokens_of_encoders(tokenizer):
    complete = with_encoder_tokens(tokenizer)
    for name in ("mask_token", "cls_token", "sep_token"):
        lacking = pickle.loads(pickle.dumps(complete))
        setattr(lacking, name, None)
        with pytest.raises(InputError) as error:
            SentenceEncoder(lacking)
        assert str(error.value) == (
            f"tokenizer: {tokenizer.name_or_path} has no {name}, which masked language modelling "
            "needs"
        )
    with pytest.raises(InputError, match="has no mask_token, which masked"):
        SentenceEncoder(tokenizer)


def test_slow_tokenizers():
    slow = ByT5Tokenizer()
    slow.name_or_path = "google/byt5-small"
    for kind in (slow, SimpleNamespace(name_or_path=slow.name_or_path)):
        with pytest.raises(InputError) as error:
            SentenceEncoder(kind)
        assert str(error.value) == "google/byt5-small: streaming needs a fast tokenizer"
