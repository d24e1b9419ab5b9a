import json
import pickle
import random
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertTokenizer

import example_rows as module
from conftest import DOMAINS, SYLLABLES, write_jsonl
from example_rows import check_examples, example_rows, features, fit
from masked_evaluation import MaskedEvaluation
from masking import Example, ExampleMaker, MaskingArguments
from recipes.bert.pretrain import Arguments
from sentence_encoder import SentenceEncoder
from utils.config import InputError
from utils.lanes import Corpus, Lane, Lanes
from utils.loss import IGNORE_INDEX
from utils.sources import Source, SourceArguments, held_out_documents
from utils.stream import Row, TrainingStream

OBJECTIVES = ["mlm_nsp", "mlm_sop", "mlm"]
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# of one lane: both changes come in the middle of a window
PHASES = [(32, 40), (64, 30), (128, 10)]


@pytest.fixture(scope="module")
def wordpiece() -> BertTokenizer:
    pieces = [*SYLLABLES, *(f"##{syllable}" for syllable in SYLLABLES), "Ka", ".", *"0123456789"]
    pieces += [f"##{digit}" for digit in range(10)]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *pieces])}
    return BertTokenizer(vocab=vocabulary, do_lower_case=False)


def make_texts(count: int, seed: int, sentences: float = 6) -> list[str]:
    """Of a few sentences, now and then of one or blank, a number of its own in each."""
    draw = random.Random(seed)
    texts = []
    for number in range(count):
        size = draw.choice([1, *[1 + int(draw.expovariate(1 / sentences))] * 9])
        parts = [
            f"Ka {' '.join(draw.choices(SYLLABLES, k=draw.randint(2, 14)))}." for _ in range(size)
        ]
        texts.append(f"{number} {' '.join(parts)}" if draw.random() < 0.9 else " \n")
    return texts


def write(folder: Path, texts: list[str]) -> str:
    folder.mkdir()
    draw = random.Random(0)
    records = [{"text": text, "domain": draw.choice(DOMAINS)} for text in texts]
    write_jsonl(folder / "data.jsonl", records)
    return str(folder)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Two sources of several epochs, of which the first leaves before the second."""
    folder = tmp_path_factory.mktemp("mixture")
    small, big = (
        write(folder / "small", make_texts(14, 1)),
        write(folder / "big", make_texts(50, 2)),
    )
    return [
        Source(small, "small", weight=2, epochs=3, domain_field="domain"),
        Source(big, "big", weight=1, epochs=2, domain_field="domain"),
    ]


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 32 rows each, so that a small corpus has many."""
    monkeypatch.setattr(module, "WINDOW_TOKENS", 0)


class Run:
    """A run over one mixture."""

    def __init__(self, tokenizer, sources, objective="mlm_nsp", packing=True, phases=None, **more):
        self.make = ExampleMaker(tokenizer, MaskingArguments(objective=objective))
        self.packing, self.phases = packing, phases or [(64, 0)]
        self.sources, self.encode = sources, SentenceEncoder(tokenizer)
        settings = {"lanes": 2, "shuffle_documents": 8, "seed": 0, **more}
        self.arguments = Arguments(
            train_sources=sources, global_batch_size=2 * settings["lanes"], **settings
        )
        self.lanes = self.new_lanes()

    def new_lanes(self) -> Lanes:
        return Lanes(Corpus(self.arguments), self.encode)

    def rows(self, lane: int = 0, state: dict | None = None):
        return example_rows(self.lanes, self.make, self.phases, self.packing, lane, state)

    def all_rows(self, lane: int = 0) -> list[Row]:
        """Until there are three empty ones, which are left out."""
        rows: list[Row] = []
        for row in self.rows(lane):
            rows.append(row)
            if len(rows) > 3 and not any(row.tokens for row in rows[-3:]):
                return rows[:-3]
        raise AssertionError("rows end")

    def windows(self, rows: list[Row], lane: int = 0) -> list[tuple[list, list[Example]]]:
        """The documents and examples of each window, told from where the rows say it begins."""
        reader, windows, number = Lane(self.lanes, lane), [], 0
        begins = sorted({0, *(row.state["window_row"] for row in rows)})[:-1]
        for begin in begins:
            length = self.length_at(begin)
            documents, size = [], 0
            while size < max(module.WINDOW_TOKENS, 32 * length) or len(documents) < 2:
                if (item := reader.next()) is None:
                    break
                documents.append(item)
                size += len(item[0])
            names = [document.text for _, document, _ in documents]
            made = self.make(
                [item[0] for item in documents], names, length, number, 0, "example", lane
            )
            windows.append((documents, list(made)))
            number += len(windows[-1][1])
        assert reader.next() is None
        return windows

    def length_at(self, row: int) -> int:
        lengths = [length for length, rows in self.phases for _ in range(rows)]
        return lengths[row] if row < len(lengths) else self.phases[-1][0]


def unpacked(row: Row) -> list[tuple]:
    """The examples of a row as (input ids, labels, token types, pair label)."""
    data = {name: array.tolist() for name, array in row.features.items()}
    assert {array.dtype for array in row.features.values()} == {np.dtype(np.int32)}
    ids, length = data["sequence_ids"], len(data["sequence_ids"])
    assert {len(values) for values in data.values()} == {length}
    count = max(ids)
    assert ids == sorted(ids[: row.tokens]) + [0] * (length - row.tokens)
    assert {*ids[: row.tokens]} == {*range(1, count + 1)}
    examples, start = [], 0
    for number in range(1, count + 1):
        end = start + ids.count(number)
        assert data["position_ids"][start:end] == list(range(end - start))
        assert data["pair_labels"][start + 1 : end] == [IGNORE_INDEX] * (end - start - 1)
        names = ("input_ids", "labels", "token_type_ids")
        examples.append(
            (*(tuple(data[name][start:end]) for name in names), data["pair_labels"][start])
        )
        start = end
    left = length - start
    assert data["position_ids"][start:] == list(range(left))
    assert data["input_ids"][start:] == data["token_type_ids"][start:] == [0] * left
    assert data["labels"][start:] == data["pair_labels"][start:] == [IGNORE_INDEX] * left
    return examples


def as_unpacked(example: Example) -> tuple:
    return (*(tuple(array.tolist()) for array in example[:3]), example.pair_label)


def plain(rows: list[Row]) -> list:
    """Rows as values that are equal only when every bit of them is."""
    return [
        (row.lane, row.tokens, row.state, {k: a.tolist() for k, a in row.features.items()})
        for row in rows
    ]


def after_json(value):
    return json.loads(json.dumps(value))


# a row


def example(*tokens: int, pair_label: int = IGNORE_INDEX) -> Example:
    ids = np.array(tokens, np.int32)
    return Example(ids, ids + 100, ids % 2, pair_label, 0, len(tokens), 0, 0)


def test_features_of_a_row():
    row = features([example(5, 6, 7, pair_label=1), example(8, 9), example(4, pair_label=0)], 9)
    assert {name: array.tolist() for name, array in row.items()} == {
        "input_ids": [5, 6, 7, 8, 9, 4, 0, 0, 0],
        "labels": [105, 106, 107, 108, 109, 104, -100, -100, -100],
        "token_type_ids": [1, 0, 1, 0, 1, 0, 0, 0, 0],
        "position_ids": [0, 1, 2, 0, 1, 0, 0, 1, 2],
        "sequence_ids": [1, 1, 1, 2, 2, 3, 0, 0, 0],
        "pair_labels": [1, -100, -100, -100, -100, 0, -100, -100, -100],
    }
    empty = features([], 3)
    assert {name: array.tolist() for name, array in empty.items()} == {
        "input_ids": [0, 0, 0],
        "labels": [-100, -100, -100],
        "token_type_ids": [0, 0, 0],
        "position_ids": [0, 1, 2],
        "sequence_ids": [0, 0, 0],
        "pair_labels": [-100, -100, -100],
    }


def test_examples_are_put_where_they_fit_tightest():
    sizes = [3, 7, 2, 6, 5, 1, 10]
    examples = [example(*range(size)) for size in sizes]
    rows = [[len(made.input_ids) for made in row] for row in fit(examples, 10)]
    assert rows == [[3, 7], [2, 6, 1], [5], [10]]
    alone = [[len(made.input_ids) for made in row] for row in fit(examples, 10, packing=False)]
    assert alone == [[size] for size in sizes]
    assert fit([], 10) == fit([], 10, packing=False) == []


def test_fitting_keeps_every_example():
    draw = random.Random(0)
    for length in (8, 64, 512):
        sizes = [draw.randint(1, length) for _ in range(300)]
        examples = [example(*range(size))._replace(document=i) for i, size in enumerate(sizes)]
        rows = fit(examples, length)
        assert sorted(made.document for row in rows for made in row) == list(range(300))
        used = [sum(len(made.input_ids) for made in row) for row in rows]
        assert max(used) <= length
        assert len(rows) <= 1.03 * sum(sizes) / length + 3
        firsts = [row[0].document for row in rows]
        assert firsts == sorted(firsts)


# the rows of a lane


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_hold_every_example_once_and_whole(wordpiece, mixture, objective, packing):
    run = Run(wordpiece, mixture, objective, packing, [(32, 0)])
    for lane in (0, 1):
        rows = run.all_rows(lane)
        windows = run.windows(rows, lane)
        assert len(windows) > 4
        examples = [made for _, examples in windows for made in examples]
        found = [made for row in rows for made in unpacked(row)]
        assert Counter(found) == Counter(map(as_unpacked, examples))
        assert len(found) > 100
        for row in rows:
            assert row.lane == lane
            assert len(row.features["input_ids"]) == 32
            assert packing or len(unpacked(row)) == 1
        # window by window, in another order than that of the documents
        ends = [*sorted({row.state["window_row"] for row in rows} - {0})]
        assert len(ends) == len(windows)
        for begin, end, (_, examples) in zip([0, *ends], ends, windows, strict=False):
            inside = [made for row in rows[begin:end] for made in unpacked(row)]
            assert Counter(inside) == Counter(map(as_unpacked, examples))
            assert inside != [as_unpacked(made) for made in examples]


@pytest.mark.usefixtures("small_windows")
def test_a_document_longer_than_a_window_has_a_random_next(wordpiece, tmp_path):
    texts = [f"{number} " + "Ka to mi. " * 300 for number in range(6)]
    source = Source(write(tmp_path / "data", texts), epochs=1)
    run = Run(wordpiece, [source], lanes=1, phases=[(32, 0)])
    assert min(len(document) for document in run.encode(texts)) > 32 * 32
    rows = run.all_rows()
    assert [len(documents) for documents, _ in run.windows(rows)] == [2, 2, 2]
    counts = rows[-1].state["counts"]
    assert (counts["documents"], counts["documents_without_pair"]) == (6, 0)
    assert counts["tokens_borrowed"] > 1000


@pytest.mark.parametrize("length", [128, 512])
def test_rows_are_full(wordpiece, tmp_path, length):
    texts = make_texts(2000, 3, sentences=12)
    source = Source(write(tmp_path / "data", texts), epochs=1)
    run = Run(wordpiece, [source], phases=[(length, 0)], lanes=1)
    rows = run.all_rows()
    used = np.array([row.tokens for row in rows])
    assert used.sum() > 100_000
    assert used.mean() / length >= 0.95
    for row in rows[:20]:
        assert sum(len(made[0]) for made in unpacked(row)) == row.tokens
    padded = Run(wordpiece, [source], phases=[(length, 0)], lanes=1, packing=False).all_rows()
    assert sum(row.tokens for row in padded) == used.sum()
    assert len(padded) > 1.2 * len(rows)


@pytest.mark.usefixtures("small_windows")
def test_after_the_last_epoch_rows_are_empty_for_ever(wordpiece, mixture):
    run = Run(wordpiece, mixture, phases=PHASES)
    rows = run.all_rows()
    more = list(islice(run.rows(), len(rows), len(rows) + 50))
    for index, row in enumerate(more, 1):
        assert row.tokens == 0
        assert unpacked(row) == []
        assert row.features["input_ids"].shape == (128,)
        assert row.state["row"] == row.state["window_row"] == len(rows) + index
        for name in ("seen", "counts", "example", "lane"):
            assert row.state[name] == rows[-1].state[name] or name == "lane"
    assert plain(list(islice(run.rows(0, after_json(more[9].state)), 5))) == plain(more[10:15])


# resuming


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize(
    ("objective", "packing", "phases"),
    [
        ("mlm_nsp", True, PHASES),
        ("mlm_sop", False, PHASES),
        ("mlm", True, PHASES),
        ("mlm_nsp", True, [(32, 5), (48, 1), (64, 0)]),  # two changes in one window
        ("mlm_nsp", True, [(64, 0)]),
    ],
)
def test_resuming_after_any_row(wordpiece, mixture, objective, packing, phases):
    run = Run(wordpiece, mixture, objective, packing, phases)
    count = len(run.all_rows()) + 5
    rows = list(islice(run.rows(), count + 3))
    assert [row.state["row"] for row in rows] == list(range(1, len(rows) + 1))
    assert len({row.state["window_row"] for row in rows[:-8]}) > 2
    expected = plain(rows)
    for done in range(1, count + 1):
        state = after_json(rows[done - 1].state)
        resumed = plain(list(islice(run.rows(0, state), 3)))
        assert resumed == expected[done : done + 3], f"after row {done}"
    for done in (1, count // 3, count // 2):
        state = after_json(rows[done - 1].state)
        assert plain(list(islice(run.rows(0, state), count - done))) == expected[done:count]


@pytest.mark.usefixtures("small_windows")
def test_resuming_again_and_again(wordpiece, mixture):
    run = Run(wordpiece, mixture, phases=PHASES)
    expected = run.all_rows()
    rows: list[Row] = []
    while len(rows) < len(expected):
        state = after_json(rows[-1].state) if rows else None
        rows += islice(run.rows(0, state), 1 + len(rows) % 4)
    assert plain(rows[: len(expected)]) == plain(expected)


@pytest.mark.usefixtures("small_windows")
def test_a_resume_tokenizes_its_window_again_and_no_more(wordpiece, mixture):
    run = Run(wordpiece, mixture)
    rows = run.all_rows()
    encode, texts = run.lanes.encode, []
    run.lanes.encode = lambda batch: texts.extend(batch) or encode(batch)
    for done in (10, len(rows) // 2, len(rows) - 10):
        texts.clear()
        next(run.rows(0, after_json(rows[done - 1].state)))
        tokens = sum(len(document) for document in encode(texts))
        assert tokens < 3 * 32 * 64


# phases


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_example_is_lost_or_made_twice_over_a_phase_change(
    wordpiece, mixture, objective, packing
):
    run = Run(wordpiece, mixture, objective, packing, PHASES)
    rows = run.all_rows()
    lengths = [len(row.features["input_ids"]) for row in rows]
    assert lengths[:40] == [32] * 40
    assert lengths[40:70] == [64] * 30
    assert {*lengths[70:]} == {128}
    begins = {row.state["window_row"] for row in rows}
    assert not begins & {40, 70}  # in the middle of a window
    found = Counter(made for row in rows for made in unpacked(row))
    windows = run.windows(rows)
    assert found == Counter(as_unpacked(made) for _, examples in windows for made in examples)
    if packing:
        # what is left of a window fills the longer rows
        used = np.array([row.tokens for row in rows]) / lengths
        assert used[40:70].mean() > 0.85
        assert max(len(unpacked(row)) for row in rows[40:44]) > 1
    last = rows[-1].state
    assert last["example"] == last["counts"]["sequences"] == found.total()


# steps


class ForkingLoader(torch.utils.data.DataLoader):
    """Workers that start at once; those that runs have are spawned, which takes seconds."""

    def __init__(self, *args, multiprocessing_context, **settings):
        context = multiprocessing_context and "fork"
        super().__init__(*args, multiprocessing_context=context, **settings)


def steps_of(run: Run, count: int, world_size: int, states: dict | None = None) -> list[list[Row]]:
    """Two rows a lane and step, those of all ranks together."""
    ranks = []
    for rank in range(world_size):
        lanes = run.new_lanes()
        rows_of = partial(example_rows, lanes, run.make, run.phases, run.packing)
        # a worker gets a pickled copy
        stream = pickle.loads(pickle.dumps(TrainingStream(lanes, rows_of, run.arguments)))
        ranks.append(stream.rows(rank, world_size, states))
    steps = []
    for _ in range(count):
        rows = [row for rank in ranks for row in next(rank)]
        steps.append(sorted(rows, key=lambda row: row.lane))
    return steps


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_world_sizes_and_workers_do_not_change_a_step(wordpiece, mixture, objective, monkeypatch):
    settings = {"lanes": 8, "phases": [(32, 8), (64, 0)]}
    run = Run(wordpiece, mixture, objective, **settings)
    steps = steps_of(run, 14, 1)
    expected = list(map(plain, steps))
    assert len({str(step) for step in expected}) == 14
    assert [len(step[0].features["labels"]) for step in steps] == [32] * 4 + [64] * 10
    for world_size in (2, 4):
        assert list(map(plain, steps_of(run, 14, world_size))) == expected
    monkeypatch.setattr(torch.utils.data, "DataLoader", ForkingLoader)
    workers = Run(wordpiece, mixture, objective, dataloader_num_workers=2, **settings)
    for world_size in (1, 2, 4):
        assert list(map(plain, steps_of(workers, 14, world_size))) == expected
    # at another world size, from before the change of the length and from after it
    for done in (3, 4, 5, 9):
        states = {row.lane: after_json(row.state) for row in steps[done - 1]}
        assert list(map(plain, steps_of(run, 3, 4, states))) == expected[done : done + 3]
        assert list(map(plain, steps_of(workers, 3, 1, states))) == expected[done : done + 3]


@pytest.mark.usefixtures("small_windows")
def test_state_is_small(wordpiece, tmp_path):
    names = ["CommonCrawl", "C4", "Github", "Book", "ArXiv", "Wikipedia", "StackExchange"]
    sources = [
        Source(write(tmp_path / name, make_texts(200, seed)), name, weight=1 + seed)
        for seed, name in enumerate(names)
    ]
    run = Run(wordpiece, sources, lanes=64, phases=[(128, 0)])
    states = {}
    for lane in range(64):
        state = after_json(list(islice(run.rows(lane), 2))[-1].state)
        # numbers as they are late in a run over terabytes
        state["seen"] = dict.fromkeys(names, 10**11)
        state["counts"] = dict.fromkeys(state["counts"], 10**11)
        state |= {"row": 10**9, "window_row": 10**9, "example": 10**9}
        state["lane"]["tokens"] = [10**11] * 7
        state["lane"]["places"] = [[99, 9999, 10**11, 511]] * 7
        states[lane] = state
    assert len(json.dumps(states)) < 100_000


# what is counted


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("phases", [[(32, 0)], PHASES])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_counts_add_up(wordpiece, mixture, objective, phases):
    run = Run(wordpiece, mixture, objective, phases=phases)
    rows = run.all_rows()
    windows = run.windows(rows)
    seen, expected, tokens = Counter(), Counter(), 0
    for documents, examples in windows:
        paired = {made.document for made in examples if made.pair_label != IGNORE_INDEX}
        for sentences, document, _ in documents:
            tokens += len(sentences)
            assert document.domain in DOMAINS
        for made in examples:
            _, document, source = documents[made.document]
            seen[f"{source.log_name}/{document.domain}"] += made.own
        expected += Counter(
            sequences=len(examples),
            pairs=sum(made.pair_label != IGNORE_INDEX for made in examples),
            tokens_borrowed=sum(made.borrowed for made in examples),
            tokens_cut=sum(made.cut for made in examples),
        )
        if objective != "mlm":
            expected += Counter(
                documents=len(documents), documents_without_pair=len(documents) - len(paired)
            )
    last = rows[-1].state
    assert last["seen"] == seen
    assert len(seen) == 6
    counts = {name: count for name, count in last["counts"].items() if count}
    assert counts == dict(expected)
    assert sum(seen.values()) + expected["tokens_cut"] == tokens
    assert (expected["tokens_borrowed"] > 0) == (objective == "mlm_nsp")
    assert (expected["tokens_cut"] > 0) == (objective != "mlm")
    if objective != "mlm":
        assert expected["documents"] == last["lane"]["documents"]
        assert expected["documents_without_pair"] > 5

    # row by row: each tells of itself
    sequences = used = 0
    for row in rows:
        examples = unpacked(row)
        sequences += len(examples)
        used += row.tokens - sum(3 if types[-1] else 2 for _, _, types, _ in examples)
        assert row.state["counts"]["sequences"] == sequences
        borrowed = row.state["counts"]["tokens_borrowed"]
        assert sum(row.state["seen"].values()) + borrowed == used


@pytest.mark.usefixtures("small_windows")
def test_documents_without_a_token_at_the_end_are_counted(wordpiece, tmp_path):
    # 256 documents of 8 tokens are the first window, and these are all that is left
    texts = ["Ka to mi. Ka ren sul."] * 256 + ["\x01"] * 5
    source = Source(write(tmp_path / "data", texts), epochs=1)
    run = Run(wordpiece, [source], lanes=1, shuffle_documents=1)
    assert len(run.encode(texts[:1])[0]) == 8
    counts = list(islice(run.rows(), 100))[-1].state["counts"]
    assert counts["documents"] == 261
    assert counts["documents_without_pair"] == 5


# a corpus without pairs

PAIR, SINGLE = "Ka to. Ka mi.", "Ka to mi"


def check(wordpiece, folder: Path, texts: list[list[str]], objective: str) -> None:
    sources = [Source(write(folder / str(index), part)) for index, part in enumerate(texts)]
    check_examples(sources, SentenceEncoder(wordpiece), objective)


@pytest.mark.parametrize(
    ("texts", "objectives"),
    [
        ([[PAIR, PAIR]], OBJECTIVES),
        ([[SINGLE, " ", PAIR]], OBJECTIVES),
        ([[SINGLE], [PAIR]], OBJECTIVES),
        ([[PAIR]], ["mlm_sop", "mlm"]),
        ([[SINGLE]], ["mlm"]),
        ([[SINGLE] * 999 + [PAIR]], OBJECTIVES),
    ],
)
def test_a_corpus_with_examples(wordpiece, tmp_path, texts, objectives):
    for objective in objectives:
        (tmp_path / objective).mkdir()
        check(wordpiece, tmp_path / objective, texts, objective)


def test_a_corpus_of_one_document_has_no_random_next(wordpiece, tmp_path):
    with pytest.raises(InputError) as error:
        check(wordpiece, tmp_path, [[PAIR, " "]], "mlm_nsp")
    assert str(error.value) == (
        f"objective: mlm_nsp takes random next segments from other documents; {tmp_path}/0 holds "
        "only one: set objective: mlm, or give other documents"
    )


@pytest.mark.parametrize("objective", ["mlm_nsp", "mlm_sop"])
@pytest.mark.parametrize(
    ("texts", "found"), [([[SINGLE] * 3, [SINGLE]], 4), ([[SINGLE] * 1200, [SINGLE, " "]], 1001)]
)
def test_a_corpus_of_single_sentences_has_no_pairs(wordpiece, tmp_path, objective, texts, found):
    with pytest.raises(InputError) as error:
        check(wordpiece, tmp_path, texts, objective)
    assert str(error.value) == (
        f"objective: {objective} needs documents of two sentences or more; the first {found} of "
        f"{tmp_path}/0, {tmp_path}/1 have one at most: set objective: mlm, or give other documents"
    )


def test_documents_on_which_the_tokenizer_fails(wordpiece, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"Ka{n}. Ka mi."} for n in (1, 2, 3)])
    encode = SentenceEncoder(wordpiece)

    def fail(texts: list[str]) -> list:
        if any("Ka2" in text for text in texts):
            raise ValueError("no")
        return encode(texts)

    window = list(held_out_documents([Source(path)], None))
    for policy in ("skip", "fail"):
        training = SimpleNamespace(arguments=SimpleNamespace(on_bad_record=policy))
        evaluation = MaskedEvaluation(training, fail, None, None, packing=True)
        if policy == "fail":
            with pytest.raises(
                InputError, match="line 2: the tokenizer fails on its 11 characters"
            ):
                evaluation._encoded(window)
        else:
            documents, sentences = evaluation._encoded(window)
            assert documents == [window[0], window[2]]
            assert [len(s) for s in sentences] == [
                len(s) for s in encode([d.text for d in documents])
            ]
    check_examples([Source(path)], fail, "mlm_nsp", SourceArguments("skip"))
    with pytest.raises(InputError, match="line 2: the tokenizer fails"):
        check_examples([Source(path)], fail, "mlm_nsp")
