"""Loss and bits per byte of held-out documents, against a count by hand."""

import gzip
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from bits_per_byte import baselines, evaluate_by_domain
from conftest import make_documents, write_jsonl
from launching import TINY_RUN, metrics
from packing import DocumentEncoder
from recipes.causal_lm.pretrain import NextTokenLoss
from utils.config import InputError
from utils.sources import Source, SourceArguments, check_documents, held_out_documents

DOMAIN = "meta.redpajama_set_name"
LENGTH = 32  # shorter than most documents: they are scored in pieces


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = AutoConfig.for_model(**TINY_RUN["model"], vocab_size=512)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def records(corpus_folder):
    return [json.loads(line) for line in (corpus_folder / "validation.jsonl").open()]


@pytest.fixture
def sources(corpus_folder):
    return [Source(str(corpus_folder / "validation.jsonl"), label="v", domain_field=DOMAIN)]


@pytest.fixture
def encode(tokenizer):
    return DocumentEncoder(tokenizer)


class Rank:
    """What the evaluation asks of a training: one of several ranks, that run one after another."""

    stopped = False
    any_rank = staticmethod(bool)  # as the longest of them sees it

    def __init__(self, rank=0, world_size=1, gathered=()):
        self.rank, self.world_size, self.gathered = rank, world_size, list(gathered)

    def gather(self, mine):
        self.gathered += mine
        return self.gathered


def score(model, documents, encode, training=None, batch_size=4, **options):
    def token_losses(batch):
        with torch.no_grad():
            return NextTokenLoss(model)(**batch, per_token=True)

    training = training or Rank()
    return evaluate_by_domain(
        training, iter(documents), encode, token_losses, LENGTH, batch_size, **options
    )


def by_hand(model, encode, records):
    """Document by document, with plain transformers: domain → [loss, targets, bytes]."""
    sums = {}
    for record in records:
        (tokens,) = encode([record["text"]])
        assert (tokens[0], tokens[-1]) == (1, 2)  # from the begin token to the end token
        domain = sums.setdefault(record["meta"]["redpajama_set_name"], np.zeros(3))
        for start in range(0, len(tokens), LENGTH):
            ids = torch.from_numpy(tokens[start : start + LENGTH]).long()
            targets = torch.from_numpy(tokens[start + 1 : start + LENGTH + 1]).long()
            with torch.no_grad():
                logits = model(ids[None], use_cache=False).logits[0, : len(targets)]
            loss = cross_entropy(logits, targets, reduction="sum").item()
            domain += [loss, len(targets), 0]
        domain[2] += len(record["text"].encode())
    return sums


def test_every_number_is_that_of_a_count_by_hand(model, sources, records, encode):
    results = score(model, held_out_documents(sources, None), encode)
    sums = by_hand(model, encode, records)
    lengths = [len(tokens) for tokens in encode([record["text"] for record in records])]
    assert min(lengths) < LENGTH < 3 * LENGTH < max(lengths)
    loss, tokens, size = sum(sums.values())
    assert results["eval_tokens"] == tokens == sum(lengths) - len(lengths)
    assert results["eval_loss"] == pytest.approx(loss / tokens, rel=1e-6)
    assert results["eval_bits_per_byte"] == pytest.approx(loss / math.log(2) / size, rel=1e-6)
    assert list(results["eval_loss_by_domain"]) == ["Book", "Code", "Web"]
    for name, (loss, tokens, size) in sums.items():
        bits = results["eval_bits_per_byte_by_domain"][name]
        assert bits == pytest.approx(loss / math.log(2) / size, rel=1e-6)
        assert results["eval_loss_by_domain"][name] == pytest.approx(loss / tokens, rel=1e-6)


def flat(results):
    numbers = {}
    for name, value in results.items():
        parts = value if isinstance(value, dict) else {"": value}
        numbers |= {f"{name}/{part}": number for part, number in parts.items()}
    return numbers


def test_batches_order_and_ranks_change_no_number(model, sources, encode):
    documents = list(held_out_documents(sources, None))
    expected = pytest.approx(flat(score(model, documents, encode)), rel=1e-6)
    for batch_size in (1, 3, 100):
        assert flat(score(model, documents, encode, batch_size=batch_size)) == expected
    assert flat(score(model, documents[::-1], encode)) == expected
    for world_size in (2, 3, 7):
        gathered = []
        for rank in range(world_size):
            training = Rank(rank, world_size, gathered)
            results = score(model, documents, encode, training)
            gathered = training.gathered
        assert flat(results) == expected


def test_ranks_call_the_model_equally_often(model, sources, encode):
    """A rank without documents goes on with empty rows while any other has some."""
    batches = []

    def token_losses(batch):
        batches.append(batch)
        return torch.ones(batch["input_ids"].shape)

    # has any failed? has any more?
    answers = iter([False, True, False, True, False, True, False, False])
    training = Rank(gathered=[("Web", [3.0, 2, 5])])
    training.any_rank = lambda mine: next(answers)
    results = evaluate_by_domain(training, iter([]), encode, token_losses, LENGTH, 2)
    assert len(batches) == 3
    for batch in batches:
        assert batch["input_ids"].shape == (2, LENGTH)
        assert (batch["shift_labels"] == -100).all()
    assert results["eval_loss"] == 1.5


def test_a_stop_signal_ends_an_evaluation(model, sources, encode):
    training = Rank()

    def any_rank(mine):
        training.stopped = True
        return mine

    training.any_rank = any_rank
    assert score(model, held_out_documents(sources, None), encode, training) is None


# which documents


def test_each_document_is_read_once_and_of_each_source_at_most_so_many(tmp_path):
    for name, count in (("a", 5), ("b", 12)):
        (tmp_path / name).mkdir()
        for number, part in enumerate(("0", "1")):
            some = make_documents(f"{name}{part}", count, seed=number)
            write_jsonl(tmp_path / name / f"{part}.jsonl", [*some, {"text": " \n "}])
    sources = [Source(str(tmp_path / "a"), weight=9.0, epochs=3), Source(str(tmp_path / "b"))]
    texts = [document.text for document in held_out_documents(sources, None)]
    expected = [
        record["text"]
        for name, count in (("a", 5), ("b", 12))
        for number, part in enumerate(("0", "1"))
        for record in make_documents(f"{name}{part}", count, seed=number)
    ]
    assert texts == expected
    texts = [document.text for document in held_out_documents(sources, 7)]
    assert texts == expected[:7] + expected[10:17]


def test_broken_records_are_fatal_or_left_out(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a"}\n{"text": 1}\n{"text": "b"}\n')
    source = Source(str(file))
    with pytest.raises(InputError) as error:
        list(held_out_documents([source], None))
    assert str(error.value).startswith(f"{file}, line 2: int, not text, in the field 'text'")
    skip = SourceArguments("skip")
    texts = [document.text for document in held_out_documents([source], None, skip)]
    assert texts == ["a", "b"]


def test_a_damaged_file_is_fatal_or_left_out_where_it_is_damaged(tmp_path, capsys):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 9)[:-4])
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    source = Source(str(tmp_path))
    with pytest.raises(InputError, match=r"a\.jsonl\.gz, after line 9: Compressed file ended"):
        list(held_out_documents([source], None))
    for _ in range(2):
        found = held_out_documents([source], None, SourceArguments("skip"))
        texts = [document.text for document in found]
        assert texts == ["a"] * 9 + ["b"]
    # every evaluation meets it; it is named once
    assert capsys.readouterr().err.count("warning: skipped ") == 1


def test_a_source_without_documents_is_refused_before_anything_runs(tmp_path, sources):
    check_documents(sources)
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": " "}\n')
    with pytest.raises(InputError, match=r"data.jsonl' is empty: no document in "):
        check_documents([*sources, Source(str(file))])


# gzip and unigrams


def test_baselines_are_those_of_a_count_by_hand(records, encode, corpus_folder, sources):
    train = [json.loads(line)["text"] for line in (corpus_folder / "train-0.jsonl").open()]
    tests = [record["text"] for record in records]
    size = sum(len(text.encode()) for text in tests)
    gzip_bits = sum(8 * len(gzip.compress(text.encode(), compresslevel=9)) for text in tests)
    # a language model pays for the end of a document, and is given its begin
    counts = Counter(token for text in train for token in encode([text])[0][1:].tolist())
    total = sum(counts.values()) + 512
    unigram_bits = sum(
        math.log2(total / (counts[token] + 1))
        for text in tests
        for token in encode([text])[0][1:].tolist()
    )
    found = baselines(
        held_out_documents(sources, None),
        held_out_documents([Source(str(corpus_folder / "train-0.jsonl"))], None),
        encode,
        512,
    )
    assert found == {
        "bits per byte under a unigram model of the same tokenizer": f"{unigram_bits / size:.4f}",
        "bits per byte under gzip -9, document by document": f"{gzip_bits / size:.4f}",
    }


# in a run


def test_evaluations_of_a_run(pretrain, corpus_folder, monkeypatch, encode, records, sources):
    """When they come, of what, and that the numbers are those of the weights of that step."""
    validation = {"path": str(corpus_folder / "validation.jsonl"), "domain_field": DOMAIN}
    ended = pretrain(
        max_steps=7,
        eval_steps=3,
        save_steps=3,
        keep_last=3,
        validation_sources=[validation],
        test_sources=[validation],
        baselines=True,
    )
    evaluations = [record for record in metrics(ended.folder) if "eval_loss" in record]
    assert [record["step"] for record in evaluations] == [3, 6, 7]
    trained = AutoModelForCausalLM.from_pretrained(ended.folder / "model").eval()
    expected = score(trained, held_out_documents(sources, None), encode)
    last = {name: value for name, value in evaluations[-1].items() if name != "step"}
    assert flat(last) == pytest.approx(flat(expected), rel=1e-6)
    assert f"step 7  eval_loss {last['eval_loss']:.4f}  eval_bits_per_byte" in ended.output
    # the test documents are the same here
    bits = f"bits per byte of the test documents: {last['eval_bits_per_byte']:.4f}"
    assert bits in ended.output
    assert re.search(r"under gzip -9, document by document: \d\.\d{4}\n", ended.output)
    card = (ended.folder / "README.md").read_text()
    assert f"{last['eval_bits_per_byte']:.4f}" in card

    few = pretrain("few", max_steps=1, eval_documents=3, validation_sources=[validation])
    (record,) = (record for record in metrics(few.folder) if "eval_loss" in record)
    expected = sum(len(tokens) - 1 for tokens in encode([r["text"] for r in records[:3]]))
    assert record["eval_tokens"] == expected


def test_samples(pretrain):
    ended = pretrain(max_steps=4, eval_steps=2, sample_prompts=["ka", "東 "])
    records = [record for record in metrics(ended.folder) if "samples" in record]
    assert [record["step"] for record in records] == [2, 4]
    for record in records:
        assert [sample["prompt"] for sample in record["samples"]] == ["ka", "東 "]
        assert all(isinstance(sample["text"], str) for sample in record["samples"])
    again = pretrain("again", max_steps=4, eval_steps=2, sample_prompts=["ka", "東 "])
    assert metrics(again.folder) == metrics(ended.folder)


def test_samples_end_at_the_last_position_of_the_model(pretrain):
    model = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    prompts = ["ka", "kato mi renka " * 3, "kato mi renka " * 30]
    ended = pretrain(max_steps=1, model=model, sample_prompts=prompts)
    assert ended.status == 0, ended.error
    (record,) = (record for record in metrics(ended.folder) if "samples" in record)
    assert len(record["samples"]) == 3


def test_a_document_on_which_the_tokenizer_fails_is_named_or_left_out(
    model, sources, encode, capsys
):
    first = next(held_out_documents(sources, None))

    def fail(texts: list[str]) -> list[np.ndarray]:
        if first.text in texts:
            raise ValueError("no")
        return encode(texts)

    with pytest.raises(InputError, match=r"line 1: the tokenizer fails on its .* characters: no;"):
        score(model, held_out_documents(sources, None), fail)
    rest = [document for document in held_out_documents(sources, None) if document != first]
    expected = score(model, rest, encode)
    found = score(model, held_out_documents(sources, None), fail, on_bad_record="skip")
    assert found == expected
    assert capsys.readouterr().err.count("warning: skipped ") == 1
    counted = baselines(iter([first, *rest]), iter(rest), fail, 512, "skip")
    assert counted == baselines(iter(rest), iter(rest), encode, 512)
