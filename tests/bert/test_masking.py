"""Tokens of made-up documents tell where they come from, so that every one can be followed."""

import pickle
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import binom
from transformers import BertTokenizer

from conftest import SYLLABLES
from masking import ExampleMaker, MaskingArguments, WordStarts, _fitting
from sentence_encoder import SentenceEncoder, Sentences
from utils.config import InputError
from utils.loss import IGNORE_INDEX
from utils.randomness import Draws, random_key

PAD, UNKNOWN, CLS, SEP, MASK = range(5)
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BASE, STRIDE = 10**6, 10**4  # a traced token is BASE + document * STRIDE + its place
OBJECTIVES = ["mlm_nsp", "mlm_sop", "mlm"]


@pytest.fixture(scope="module")
def wordpiece() -> BertTokenizer:
    pieces = [*SYLLABLES, "ik", "so"]
    vocabulary = [*SPECIAL_TOKENS, *pieces, *(f"##{piece}" for piece in pieces), *".,:!?"]
    return BertTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, do_lower_case=False
    )


@pytest.fixture(scope="module")
def byte_level(tokenizer):
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    names = ("cls_token", "sep_token", "mask_token")
    tokenizer.add_special_tokens({name: f"<|{name}|>" for name in names})
    return tokenizer


def maker(tokenizer, objective: str = "mlm_nsp", **settings) -> ExampleMaker:
    return ExampleMaker(tokenizer, MaskingArguments(objective=objective, **settings))


def traced(sizes: list[list[int]]) -> list[Sentences]:
    """A document for each list of the sizes of its sentences."""
    return [
        Sentences(
            np.arange(sum(counts), dtype=np.int32) + BASE + index * STRIDE,
            np.cumsum(counts).tolist(),
        )
        for index, counts in enumerate(sizes)
    ]


def random_sizes(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Of documents with 0 to 40 sentences, one in ten of a single one."""
    draw = random.Random(seed)
    counts = [draw.choice([0, 1, 1, 2, 3, *[draw.randint(4, 40)] * 5]) for _ in range(count)]
    return [[draw.randint(1, longest) for _ in range(count)] for count in counts]


def originals(example) -> np.ndarray:
    return np.where(example.labels == IGNORE_INDEX, example.input_ids, example.labels)


def segments(example) -> list[list[int]]:
    """The tokens of A, and of B where there is one, as they were before they were masked."""
    tokens, types = originals(example).tolist(), example.token_type_ids.tolist()
    assert (tokens[0], tokens[-1]) == (CLS, SEP)
    size = types.count(0)
    assert types == [0] * size + [1] * (len(types) - size)
    assert tokens[size - 1] == SEP
    found = [tokens[1 : size - 1]] + ([tokens[size:-1]] if size < len(tokens) else [])
    assert all(found)
    assert not {CLS, SEP} & {token for segment in found for token in segment}
    return found


def assert_share(hits: int, count: int, share: float) -> None:
    """Inside the 99.9% confidence interval."""
    low, high = binom.interval(0.999, count, share)
    assert low <= hits <= high, f"{hits / count:.5f} of {count} is not {share:.5f}"


def documents_of(tokenizer, tokens: int, seed: int = 0) -> list[Sentences]:
    """Sentences of random ordinary tokens."""
    draw = np.random.default_rng(seed)
    special = {*tokenizer.all_special_ids}
    ordinary = np.array([i for i in range(len(tokenizer)) if i not in special], np.int32)
    documents = []
    while tokens > 0:
        ends = draw.integers(1, 40, draw.integers(2, 60)).cumsum().tolist()
        documents.append(Sentences(draw.choice(ordinary, ends[-1]), ends))
        tokens -= ends[-1]
    return documents


def examples_of(make, documents, length=128, key=("masking", 0)) -> list:
    return list(make(documents, range(len(documents)), length, 0, *key))


# how much is masked, over a million tokens


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("mlm_nsp", {}),
        ("mlm_sop", {}),
        ("mlm", {}),
        ("mlm", {"mlm_probability": 0.3}),
        ("mlm", {"mlm_probability": 0.4, "mask_replace_prob": 1.0, "random_replace_prob": 0.0}),
        ("mlm_sop", {"mlm_probability": 0.2, "mask_replace_prob": 0.5, "random_replace_prob": 0.5}),
        ("mlm_nsp", {"mask_replace_prob": 0.0, "random_replace_prob": 0.3}),
    ],
)
def test_shares_over_a_million_tokens(wordpiece, objective, settings):
    make = maker(wordpiece, objective, **settings)
    documents = documents_of(wordpiece, 1_100_000)
    examples = examples_of(make, documents)
    tokens, labels, types = (
        np.concatenate([getattr(example, name) for example in examples])
        for name in ("input_ids", "labels", "token_type_ids")
    )
    # what the examples were made of: their parts, with the two or three special tokens of each
    special = sum(3 if example.token_type_ids[-1] else 2 for example in examples)
    count = len(tokens) - special
    assert count == sum(example.own + example.borrowed for example in examples)
    assert count >= 1_000_000
    assert types.max() == (objective != "mlm")

    arguments = make.arguments
    predicted = labels != IGNORE_INDEX
    assert_share(predicted.sum(), count, arguments.mlm_probability)
    tokens, labels = tokens[predicted], labels[predicted]
    same_by_chance = arguments.random_replace_prob / (len(wordpiece) - len(SPECIAL_TOKENS))
    kept = 1 - arguments.mask_replace_prob - arguments.random_replace_prob + same_by_chance
    changed = (tokens != MASK) & (tokens != labels)
    assert_share((tokens == MASK).sum(), len(tokens), arguments.mask_replace_prob)
    assert_share(changed.sum(), len(tokens), arguments.random_replace_prob - same_by_chance)
    assert_share((tokens == labels).sum(), len(tokens), kept)

    # any ordinary token may replace another, and no special one
    if arguments.random_replace_prob:
        assert {*tokens[changed].tolist()} == {*range(len(SPECIAL_TOKENS), len(wordpiece))}
        counts = np.bincount(tokens[changed], minlength=len(wordpiece))[len(SPECIAL_TOKENS) :]
        for hits in counts:
            low, high = binom.interval(1 - 1e-6, changed.sum(), 1 / len(counts))
            assert low <= hits <= high
    assert labels.min() >= len(SPECIAL_TOKENS)

    pairs = Counter(example.pair_label for example in examples)
    if objective == "mlm":
        assert pairs == {IGNORE_INDEX: len(examples)}
    else:
        assert pairs[0] + pairs[1] > 0.9 * len(examples)
        assert_share(pairs[1], pairs[0] + pairs[1], 0.5)


@pytest.mark.parametrize("objective", ["mlm_nsp", "mlm_sop"])
def test_half_of_the_pairs_are_random_or_swapped(wordpiece, objective):
    documents = documents_of(wordpiece, 1_000_000)
    examples = examples_of(maker(wordpiece, objective), documents, 32)
    pairs = Counter(example.pair_label for example in examples)
    assert pairs[0] + pairs[1] > 20_000
    assert_share(pairs[1], pairs[0] + pairs[1], 0.5)


def test_every_place_is_masked_alike(wordpiece):
    examples = examples_of(
        maker(wordpiece, "mlm", short_seq_prob=0), documents_of(wordpiece, 10**6)
    )
    labels = np.array([example.labels for example in examples if len(example.labels) == 128])
    predicted = (labels != IGNORE_INDEX).sum(0)
    assert predicted[[0, -1]].tolist() == [0, 0]
    low, high = binom.interval(1 - 1e-5, len(labels), 0.15)
    assert low <= predicted[1:-1].min()
    assert predicted[1:-1].max() <= high
    # as many in every sequence as the rate says: 126 x 0.15 = 18.9
    assert {*(labels != IGNORE_INDEX).sum(1).tolist()} == {18, 19}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_labels_are_the_tokens_and_others_stay(wordpiece, objective):
    documents = traced(random_sizes(200))
    kinds = Counter()
    for example in examples_of(maker(wordpiece, objective), documents):
        assert {array.dtype for array in example[:3]} == {np.dtype(np.int32)}
        assert len(example.input_ids) == len(example.labels) == len(example.token_type_ids)
        # a traced token stands at the place that its neighbours give it
        for segment in segments(example):
            assert segment == list(range(segment[0], segment[0] + len(segment)))
            assert segment[0] >= BASE
        for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
            if label != IGNORE_INDEX:
                assert label >= BASE
                kind = "mask" if token == MASK else "kept" if token == label else "random"
                assert kind != "random" or token in range(len(SPECIAL_TOKENS), len(wordpiece))
                kinds[kind] += 1
            else:
                assert token in (CLS, SEP) or token >= BASE
    assert min(kinds[kind] for kind in ("mask", "kept", "random")) > 500


# whole words


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_words_of_wordpiece_are_masked_whole(wordpiece, probability):
    make = maker(wordpiece, "mlm_nsp", whole_word_masking=True, mlm_probability=probability)
    examples = examples_of(make, documents_of(wordpiece, 1_050_000))
    tokens = np.concatenate([originals(example) for example in examples])
    masked = np.concatenate([example.labels for example in examples]) != IGNORE_INDEX
    is_text = (tokens != CLS) & (tokens != SEP)
    goes_on = np.array(
        [token.startswith("##") for token in wordpiece.convert_ids_to_tokens(range(len(wordpiece)))]
    )[tokens]
    # each special token is a word here, and what truncation left of a word is one
    begins = ~goes_on
    begins[1:] |= ~is_text[:-1]
    starts = np.flatnonzero(begins)
    sizes = np.diff([*starts, len(tokens)])
    masked_of_word = np.add.reduceat(masked.astype(int), starts)
    assert ((masked_of_word == 0) | (masked_of_word == sizes)).all()
    of_text = is_text[starts]
    assert not masked_of_word[~of_text].any()
    assert is_text.sum() >= 1_000_000
    assert np.bincount(sizes[of_text])[1:5].min() > 10_000
    assert_share((masked_of_word[of_text] > 0).sum(), of_text.sum(), probability)


def test_words_of_byte_level_bpe_are_masked_whole(byte_level):
    draw = random.Random(0)
    syllables = [syllable for syllable in SYLLABLES if syllable.isascii()]
    letters = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(50)]
    choices = [*letters, *["0", "7", "12", "345", "6789"], ",", ".", "!?", "..."]
    texts = [" ".join(draw.choices(choices, k=draw.randint(50, 400))) for _ in range(300)]
    texts = [text.replace(" ,", ",").replace(" .", ".").replace(" !", "!") for text in texts]
    encode = SentenceEncoder(byte_level)
    # one sentence each, so that the words of a document are those that the tokenizer cuts
    backend = encode.backend
    documents, words = [], []
    for text in texts:
        encoding = backend.encode(text, add_special_tokens=False)
        documents.append(Sentences(np.array(encoding.ids, np.int32), [len(encoding.ids)]))
        words.append(encoding.word_ids)
    assert Counter(Counter(word for word in words[0]).values())[1] > 10
    make = maker(byte_level, "mlm", whole_word_masking=True)
    place, document, masked, count, longer = 0, 0, 0, 0, 0
    for example in examples_of(make, documents):
        if example.document != document:
            assert place == len(documents[document])
            place, document = 0, example.document
        ids = words[document][place : place + example.own]
        is_masked = example.labels[1:-1] != IGNORE_INDEX
        start = 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or ids[end] != ids[start]:
                (whole,) = {*is_masked[start:end].tolist()}
                count, masked, longer = count + 1, masked + whole, longer + (end - start > 1)
                start = end
        place += example.own
    assert count > 50_000
    assert longer > 10_000
    assert_share(masked, count, 0.15)


def starts(tokenizer, text: list[str]) -> list[str]:
    """The tokens of [CLS] text [SEP] that begin a word; a | stands for another [SEP]."""
    cls, sep = tokenizer.cls_token, tokenizer.sep_token
    tokens = [cls, *(sep if token == "|" else token for token in text), sep]
    ids = np.array(tokenizer.convert_tokens_to_ids(tokens))
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    begins = WordStarts(tokenizer)(ids, np.array([token not in (cls, sep) for token in tokens]))
    assert begins.shape == (len(tokens),)
    return [token for token, begin in zip(tokens, begins, strict=True) if begin]


def test_word_starts_of_wordpiece(wordpiece):
    text = ["ka", "##to", ".", "東", "##ka", "##mi", "!", "?"]
    assert starts(wordpiece, text) == ["ka", ".", "東", "!", "?"]
    # what truncation left of a word begins a segment; special tokens belong to none
    text = ["##to", "##mi", "ka", "|", "##el", "##so", "ka"]
    assert starts(wordpiece, text) == ["##to", "ka", "##el", "ka"]


def test_word_starts_of_byte_level_bpe(byte_level):
    text = ["k", "a", "Ġ", "k", "a", ",", "Ġ", "m", "1", "2", ".", "5", "x", "!", "?", ")", "a"]
    assert starts(byte_level, text) == ["k", "Ġ", ",", "Ġ", "1", ".", "5", "x", "!", "a"]
    assert starts(byte_level, ["a", "b", "|", "c", "d", "Ċ", "Ġ", "d"]) == ["a", "c", "Ċ", "Ġ"]
    text = ["Ġren", "ka", "Ġto", ".", "Ġmi"]
    assert starts(byte_level, text) == ["Ġren", "Ġto", ".", "Ġmi"]


@pytest.mark.parametrize("word", ["élan", "caféine", "über", "東方"])
def test_letters_beyond_ascii_do_not_cut_words(byte_level, word):
    ((pieces, _),) = byte_level.backend_tokenizer.pre_tokenizer.pre_tokenize_str(word)
    assert starts(byte_level, [*pieces]) == [pieces[0]]


def test_a_blank_belongs_to_the_digit_after_it(byte_level):
    assert starts(byte_level, ["a", "Ġ", "1", "2"]) == ["a", "Ġ"]


# pairs of segments


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("length", [8, 32, 128])
def test_every_token_once_in_its_own_document(wordpiece, objective, length):
    sizes = random_sizes(150, seed=length)
    documents = traced(sizes)
    make = maker(wordpiece, objective)
    text: list[list[int]] = [[] for _ in documents]
    cut = Counter()
    borrowed = 0
    for example in examples_of(make, documents, length):
        assert len(example.input_ids) <= length
        found = segments(example)
        assert (len(found) == 2) == (example.pair_label != IGNORE_INDEX)
        first = found[0]
        if objective == "mlm_nsp" and example.pair_label == 1:
            own = first
        elif objective == "mlm_sop" and example.pair_label == 1:
            own = found[1] + first
        else:
            own = [token for segment in found for token in segment]
        assert example.own == len(own)
        assert example.borrowed == sum(map(len, found)) - len(own)
        assert {(token - BASE) // STRIDE for token in own} == {example.document}
        # more than the length is cut to the length, and no further
        assert not example.cut or len(example.input_ids) == length or example.pair_label == 1
        if not example.cut:
            assert own == list(range(own[0], own[0] + len(own)))
        text[example.document] += own
        cut[example.document] += example.cut
        borrowed += example.borrowed
    for index, (document, tokens) in enumerate(zip(documents, text, strict=True)):
        assert len(tokens) + cut[index] == len(document)
        assert sorted(tokens) == sorted({*tokens})  # once at most
        assert {*tokens} <= {*document.tokens.tolist()}
        if not cut[index]:
            assert tokens == document.tokens.tolist()  # in order, too
    if objective == "mlm":
        assert not cut.total()
    else:
        assert cut.total() > 0
        assert sum(1 for index in range(150) if not cut[index] and len(sizes[index]) > 2) > (
            10 if length == 128 else -1
        )
    assert (borrowed > 0) == (objective == "mlm_nsp")


def test_a_random_next_comes_from_another_document_and_begins_at_a_sentence(wordpiece):
    sizes = [counts for counts in random_sizes(60) if counts] + [[]]
    documents = traced(sizes)
    names = [("file", index % 7) for index in range(len(sizes))]
    starts_of = [{0, *document.ends} for document in documents]
    make = maker(wordpiece)
    partners, started = Counter(), set()
    whole = 0
    for round in range(30):
        for example in make(documents, names, 96, 0, "next", round):
            if example.pair_label != 1:
                continue
            second = segments(example)[1]
            (other,) = {(token - BASE) // STRIDE for token in second}
            assert names[other] != names[example.document]
            place = (second[0] - BASE) % STRIDE
            partners[other] += 1
            if len(example.input_ids) < 96:  # nothing was cut
                whole += 1
                assert place in starts_of[other]
                assert place + len(second) in starts_of[other]
                started.add((other, place))
    assert whole > 300
    # every document, and any sentence of it, may be next
    assert {*partners} == {*range(len(sizes) - 1)}
    assert len({place for _, place in started}) > 100
    assert sum(place == 0 for _, place in started) < len(started) / 4


def test_a_pair_is_contiguous_text_once_it_is_swapped_back(wordpiece):
    documents = traced([[3] * 30] * 40)
    swapped = 0
    for example in examples_of(maker(wordpiece, "mlm_sop"), documents, 300):
        if example.pair_label == IGNORE_INDEX:
            continue
        first, second = segments(example)
        if example.pair_label == 1:
            first, second, swapped = second, first, swapped + 1
        assert first + second == list(range(first[0], second[-1] + 1))
        assert (second[0] - BASE) % STRIDE % 3 == 0  # cut between two sentences
    assert swapped > 10


def test_segment_a_ends_after_any_sentence(wordpiece):
    documents = traced([[5] * 4] * 2000)
    for objective in ("mlm_sop", "mlm_nsp"):
        make = maker(wordpiece, objective, short_seq_prob=0)
        sizes = Counter()
        for example in examples_of(make, documents, 60):
            if example.pair_label == 0 and (segments(example)[0][0] - BASE) % STRIDE == 0:
                sizes[len(segments(example)[0])] += 1
        assert {*sizes} == {5, 10, 15}
        for size in sizes:
            assert_share(sizes[size], sizes.total(), 1 / 3)


def test_documents_that_give_no_pair(wordpiece):
    documents = traced([[7], [], [300], [4, 4]])
    for objective in ("mlm_nsp", "mlm_sop"):
        short, long, *_ = examples_of(maker(wordpiece, objective, short_seq_prob=0), documents, 32)
        for example, size, lost in ((short, 7, 0), (long, 30, 270)):
            assert example.pair_label == IGNORE_INDEX
            assert not example.token_type_ids.any()
            assert (example.own, example.borrowed, example.cut) == (size, 0, lost)
            assert len(segments(example)[0]) == size
    # without another document there is no random next: neither of one nor of the same twice
    only = traced([[4] * 10])
    for names, count in (([0], 1), ([0, 0], 2)):
        examples = list(maker(wordpiece)(only * count, names, 32, 0, "one"))
        assert {example.pair_label for example in examples} == {IGNORE_INDEX}
        assert sum(example.own + example.cut for example in examples) == 40 * count
    examples = list(maker(wordpiece, "mlm_sop")(only, [0], 32, 0, "one"))
    assert {example.pair_label for example in examples} & {0, 1}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_some_sequences_are_short(wordpiece, objective):
    documents = traced([[1] * 2000] * 40)
    short = {}
    for probability in (0, 0.1, 1):
        make = maker(wordpiece, objective, short_seq_prob=probability)
        # so is what is left at the end of a document, and what follows a random sentence
        sizes = [
            (len(example.input_ids), example.document)
            for example in examples_of(make, documents, 64)
            if objective != "mlm_nsp" or example.pair_label == 0
        ]
        sizes = [size for (size, index), (_, after) in pairwise(sizes) if index == after]
        assert max(sizes) == 64
        short[probability] = (sum(size < 64 for size in sizes), sizes)
    assert short[0][0] == 0
    count, sizes = short[0.1]
    # a target drawn from 2 to the room is the room itself once in so many
    room = 62 if objective == "mlm" else 61
    assert_share(count, len(sizes), 0.1 * (1 - 1 / (room - 1)))
    count, sizes = short[1]
    assert {*sizes} == {*range(64 - room + 2, 65)}
    assert_share(sum(size <= 33 for size in sizes), len(sizes), (33 - (64 - room + 1)) / (room - 1))


# truncation


def fitting_token_by_token(first: int, second: int, room: int) -> tuple[int, int]:
    """truncate_seq_pair of BERT's create_pretraining_data.py."""
    while first + second > room:
        if first > second:
            first -= 1
        else:
            second -= 1
    return first, second


def test_the_longer_segment_is_cut_as_bert_does():
    for first in range(1, 40):
        for second in range(1, 40):
            for room in range(2, 50):
                expected = fitting_token_by_token(first, second, room)
                assert _fitting(first, second, room) == expected, (first, second, room)


def test_truncation_takes_from_both_ends(wordpiece):
    draw = random.Random(0)
    sizes = [[draw.randint(1, 300), draw.randint(1, 300)] for _ in range(600)]
    documents = traced(sizes)
    front, cut = Counter(), Counter()
    for example in examples_of(maker(wordpiece, "mlm_sop", short_seq_prob=0), documents, 128):
        found = segments(example)
        found = found[::-1] if example.pair_label else found
        edges = [0, *documents[example.document].ends]
        counts = sizes[example.document]
        given = counts[::-1] if example.pair_label else counts
        expected = fitting_token_by_token(*given, 125)
        assert [len(segment) for segment in segments(example)] == [*expected]
        for which, segment in enumerate(found):
            place = (segment[0] - BASE) % STRIDE
            assert edges[which] <= place
            assert place + len(segment) <= edges[which + 1]
            assert segment == list(range(segment[0], segment[0] + len(segment)))
            front[which] += place - edges[which]
            cut[which] += counts[which] - len(segment)
    for which in (0, 1):
        assert cut[which] > 20_000
        assert_share(front[which], cut[which], 0.5)


# draws


@pytest.mark.parametrize("objective", ["mlm", "mlm_sop"])
def test_examples_depend_on_their_number_and_not_on_those_before(wordpiece, objective):
    documents = documents_of(wordpiece, 20_000)
    make = maker(wordpiece, objective, whole_word_masking=True)
    examples = examples_of(make, documents)
    for index in range(1, len(documents)):
        number = next(n for n, example in enumerate(examples) if example.document == index)
        alone = list(
            make(documents[index:], range(index, len(documents)), 128, number, "masking", 0)
        )
        expected = [
            example._replace(document=example.document - index) for example in examples[number:]
        ]
        assert plain(alone) == plain(expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_examples_depend_on_the_key(wordpiece, objective):
    documents = documents_of(wordpiece, 5_000)
    make = maker(wordpiece, objective)
    expected = plain(examples_of(make, documents))
    assert plain(examples_of(maker(wordpiece, objective), documents)) == expected
    assert plain(examples_of(pickle.loads(pickle.dumps(make)), documents)) == expected
    others = [expected]
    for key, number in ((("masking", 1), 0), (("masking", 0), 1)):
        others.append(plain(make(documents, range(len(documents)), 128, number, *key)))
    labels = [str([example[1] for example in examples]) for examples in others]
    assert len({*labels}) == 3


def plain(examples) -> list:
    """Values that are equal only when every bit of the examples is."""
    return [
        [x.tolist() if isinstance(x, np.ndarray) else x for x in example] for example in examples
    ]


def test_one_token_masked(wordpiece):
    example = maker(wordpiece).with_one_masked(np.array([7, 8, 9], np.int32), 2)
    assert example.input_ids.tolist() == [CLS, 7, MASK, 9, SEP]
    assert example.labels.tolist() == [-100, -100, 8, -100, -100]
    assert example.token_type_ids.tolist() == [0] * 5
    assert (example.pair_label, example.own, example.borrowed, example.cut) == (-100, 3, 0, 0)


def test_draws_are_the_same_for_ever():
    draw = Draws("seed", 0)
    assert [draw.below(1000) for _ in range(5)] == [196, 486, 701, 246, 781]
    assert [draw.chance(0.5) for _ in range(8)] == [
        True,
        False,
        False,
        False,
        True,
        True,
        False,
        True,
    ]
    assert draw.uniform(3).tolist() == [0.2823553513521653, 0.8984827393761544, 0.9438670730757731]
    assert draw.permutation(8) == [6, 7, 3, 4, 0, 1, 2, 5]
    assert random_key("seed", 0) == 2295701711082502147
    assert Draws("seed", 0).below(1000) == 196
    assert Draws("seed", 1).below(2**60) != Draws("seed", 0).below(2**60)


def test_statistics_of_draws():
    draw = Draws("statistics", 0)
    count = 100_000
    for size in (1, 2, 7, 10):
        found = Counter(draw.below(size) for _ in range(count))
        assert {*found} == {*range(size)}
        for hits in found.values():
            assert_share(hits, count, 1 / size)
    for share in (0, 0.1, 0.5, 1):
        assert_share(sum(draw.chance(share) for _ in range(count)), count, share)
    values = draw.uniform(count)
    assert values.shape == (count,)
    assert 0 <= values.min() < 1e-3
    assert 1 - 1e-3 < values.max() < 1
    for tenth in range(10):
        assert_share(((10 * values).astype(int) == tenth).sum(), count, 0.1)
    orders = Counter(tuple(draw.permutation(4)) for _ in range(24_000))
    assert len(orders) == 24
    low, high = binom.interval(1 - 1e-5, 24_000, 1 / 24)
    assert all(low <= hits <= high for hits in orders.values())
    assert draw.permutation(0) == []


# settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mlm_probability": 1.5}, "mlm_probability must lie between 0 and 1, not 1.5"),
        ({"mlm_probability": 0}, "mlm_probability: 0 leaves nothing to learn"),
        ({"short_seq_prob": -1}, "short_seq_prob must lie between 0 and 1, not -1"),
        (
            {"mask_replace_prob": 0.8, "random_replace_prob": 0.3},
            "mask_replace_prob and random_replace_prob are shares of the masked tokens: "
            "0.8 and 0.3 are not",
        ),
        (
            {"mask_replace_prob": 1.0, "random_replace_prob": -0.1},
            "mask_replace_prob and random_replace_prob are shares of the masked tokens: "
            "1.0 and -0.1 are not",
        ),
    ],
)
def test_settings_that_make_no_examples(settings, message):
    with pytest.raises(InputError) as error:
        MaskingArguments(**settings).check()
    assert str(error.value) == message


def test_rows_too_short_for_a_pair():
    MaskingArguments().check_length(8)
    with pytest.raises(InputError) as error:
        MaskingArguments().check_length(7)
    assert str(error.value) == "sequence_length: 7 is too short for a pair: at least 8"
