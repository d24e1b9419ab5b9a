import pickle
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import corpus_of, make_documents, write_jsonl
from packing import DocumentEncoder, pack, packed_rows
from utils import sources
from utils.config import InputError
from utils.lanes import Lanes
from utils.loss import IGNORE_INDEX
from utils.sources import Source
from utils.stream import collate


def packed(documents: list[list[int]], length: int, offset: int = 0, packing: bool = True) -> list:
    tagged = ((np.array(tokens, dtype=np.int32), tag) for tag, tokens in enumerate(documents))
    rows = []
    for features, pieces in pack(tagged, length, offset, packing):
        if not pieces:
            return rows
        assert features.pop("lengths") == sum(piece.tokens for piece in pieces)
        rows.append(({name: array.tolist() for name, array in features.items()}, pieces))
    return rows


def test_rows_are_filled_and_documents_go_on_in_the_next():
    (first, pieces), (second, _), (third, last_pieces) = packed(
        [[10, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29], [30, 31]], 6
    )
    assert first == {
        "input_ids": [10, 11, 12, 20, 21, 22],
        "shift_labels": [11, 12, -100, 21, 22, 23],
        "position_ids": [0, 1, 2, 0, 1, 2],
    }
    assert second == {
        "input_ids": [23, 24, 25, 26, 27, 28],
        "shift_labels": [24, 25, 26, 27, 28, 29],
        "position_ids": [0, 1, 2, 3, 4, 5],
    }
    assert third == {
        "input_ids": [29, 30, 31, 0, 0, 0],
        "shift_labels": [-100, 31, -100, -100, -100, -100],
        "position_ids": [0, 0, 1, 0, 1, 2],  # padding is a document of its own
    }
    assert [tuple(piece) for piece in pieces] == [(0, 3, 3, True), (1, 3, 3, False)]
    assert [tuple(piece) for piece in last_pieces] == [(1, 1, 10, True), (2, 2, 2, True)]


def test_documents_that_fill_rows_exactly():
    rows = packed([[1, 2, 3, 4], [5, 6], [7, 8]], 4)
    assert [row["input_ids"] for row, _ in rows] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert [row["shift_labels"] for row, _ in rows] == [[2, 3, 4, -100], [6, -100, 8, -100]]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("length", [1, 2, 5, 64, 1000])
def test_every_token_once_from_any_offset_of_the_first_document(length, packing):
    documents = [list(range(100, 117)), list(range(200, 203)), list(range(300, 390))]
    flat = [token for tokens in documents for token in tokens]
    labels = [t for tokens in documents for t in [*tokens[1:], IGNORE_INDEX]]
    for offset in range(len(documents[0])):
        rows = packed(documents, length, offset, packing)
        sizes = [sum(piece.tokens for piece in pieces) for _, pieces in rows]
        assert sum(sizes) == len(flat) - offset
        for name, expected in {"input_ids": flat, "shift_labels": labels}.items():
            kept = [row[name][:size] for (row, _), size in zip(rows, sizes, strict=True)]
            assert [t for tokens in kept for t in tokens] == expected[offset:]


def test_without_packing_a_row_holds_one_document_or_a_piece_of_it():
    rows = packed([[10, 11, 12], [20, 21, 22, 23, 24, 25], [30, 31, 32, 33]], 4, packing=False)
    assert [row["input_ids"] for row, _ in rows] == [
        [10, 11, 12, 0],
        [20, 21, 22, 23],
        [24, 25, 0, 0],
        [30, 31, 32, 33],
    ]
    assert [row["shift_labels"] for row, _ in rows] == [
        [11, 12, -100, -100],
        [21, 22, 23, 24],
        [25, -100, -100, -100],
        [31, 32, 33, -100],
    ]
    assert [tuple(piece) for _, pieces in rows for piece in pieces] == [
        (0, 3, 3, True),
        (1, 4, 4, False),
        (1, 2, 6, True),
        (2, 4, 4, True),
    ]


def test_packed_documents_do_not_see_each_other():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    documents = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 16], [20, 21, 22]]
    rows = [features for features, pieces in _rows_of(documents, 20) if pieces]
    batch = collate(rows)
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits[0]
        alone = [model(input_ids=torch.tensor([d]), use_cache=False).logits[0] for d in documents]
    torch.testing.assert_close(logits[:15], torch.cat(alone), atol=1e-5, rtol=1e-5)


def _rows_of(documents, length):
    rows = pack(((np.array(tokens), None) for tokens in documents), length)
    return [next(rows), next(rows)]


def test_collate():
    batch = collate([{"a": np.array([1, 2], np.int32)}, {"a": np.array([3, 4], np.int32)}])
    assert batch["a"].dtype == torch.int64
    assert batch["a"].tolist() == [[1, 2], [3, 4]]


# tokens of documents

STRANGE = [
    "plain text",
    "  leading, trailing and  inner   blanks \n\n\t\r\n ",
    "ünïcödé 東京 🙂 e\u0301 \u200d\u202e\x00\x7f\ufeff",
    "<|begin_of_text|> and <|end_of_text|><|pad|>",
    "".join(chr(i) for i in range(0x250)),
]


def test_every_text_comes_back(tokenizer):
    encode = DocumentEncoder(tokenizer)
    for text, tokens in zip(STRANGE, encode(STRANGE), strict=True):
        assert tokens.dtype == np.int32
        assert tokens[0] == tokenizer.bos_token_id
        assert tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens[1:-1]) == text


def test_special_tokens_in_a_text_are_text(tokenizer):
    encode = DocumentEncoder(tokenizer)
    special = set(tokenizer.all_special_ids)
    for tokens in encode(STRANGE):
        assert not special & set(tokens[1:-1].tolist())
    # the tokenizer itself goes on reading them as special
    assert tokenizer.eos_token_id in tokenizer(STRANGE[3]).input_ids
    # a data worker gets a pickled copy
    copy = pickle.loads(pickle.dumps(encode))
    assert all(np.array_equal(a, b) for a, b in zip(copy(STRANGE), encode(STRANGE), strict=True))


def test_settings_of_the_tokenizer_do_not_cut_or_pad_documents(tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    texts = ["short", "long " * 100]
    expected = DocumentEncoder(tokenizer)(texts)
    tokenizer(texts, truncation=True, padding=True, max_length=8)  # leaves both switched on
    got = DocumentEncoder(tokenizer)(texts)
    assert [len(tokens) for tokens in got] == [len(tokens) for tokens in expected]
    assert len(got[0]) < len(got[1])


def test_tokenizers_that_cannot_be_streamed(tokenizer_folder):
    from transformers import AutoTokenizer, BertTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.bos_token = None
    assert DocumentEncoder(tokenizer)(["a"])[0][0] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(InputError) as error:
        DocumentEncoder(tokenizer)
    assert str(error.value) == (
        f"tokenizer: {tokenizer_folder} has no eos_token, which causal language modelling needs"
    )
    with pytest.raises(InputError, match="has no eos_token, which"):
        DocumentEncoder(BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}))


# rows of a lane


@pytest.fixture
def make_lanes(tmp_path, tokenizer):
    def make(lanes: int = 1, count: int = 30, **settings) -> Lanes:
        write_jsonl(tmp_path / "data.jsonl", make_documents("data", count))
        source = Source(str(tmp_path), label="data", epochs=1, **settings)
        corpus = corpus_of([source], lanes=lanes)
        return Lanes(corpus, DocumentEncoder(tokenizer))

    return make


def test_tokens_seen_are_counted_by_domain(make_lanes, tokenizer):
    lanes = make_lanes(domain_field="meta.redpajama_set_name")
    encode = DocumentEncoder(tokenizer)
    expected: Counter[str] = Counter()
    for record in make_documents("data", 30):
        key = f"data/{record['meta']['redpajama_set_name']}"
        expected[key] += len(encode([record["text"]])[0])
    counted = 0
    for row in packed_rows(lanes, 32, 0, None):
        if row.tokens == 0:
            break
        counted += row.tokens
        assert sum(row.state["seen"].values()) == counted
    assert row.state["seen"] == expected


def test_a_lane_without_documents_has_rows_without_targets(make_lanes):
    lanes = make_lanes(lanes=8, count=1)
    rows_of_lanes = [packed_rows(lanes, 16, lane, None) for lane in range(8)]
    firsts = [next(rows) for rows in rows_of_lanes]
    assert sum(row.tokens > 0 for row in firsts) == 1
    for rows, first in zip(rows_of_lanes, firsts, strict=True):
        if first.tokens == 0:
            for row in (first, next(rows), next(rows)):
                assert (row.features["shift_labels"] == IGNORE_INDEX).all()
                assert row.features["position_ids"].tolist() == list(range(16))
                assert row.state["seen"] == {}


@pytest.mark.parametrize("checked", [1000, 10])
def test_a_domain_of_every_document_is_refused(checked, make_lanes, monkeypatch):
    """Before the first step, or as late as the first documents are no example."""
    monkeypatch.setattr(sources, "HELD_OUT_CHECKED", checked)
    told = pytest.raises(InputError, match="domain_field 'text' has more than 256 values: name a")
    with told if checked == 1000 else nullcontext():
        lanes = make_lanes(count=300, domain_field="text")
    with told if checked == 10 else nullcontext():
        for _ in packed_rows(lanes, 512, 0, None) if checked == 10 else ():
            pass
