"""Loss and bits per byte of held-out documents, against a count by hand."""

import gzip
import json
import math
import re
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_documents, write_jsonl
from launching import TINY_RUN, metrics
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.pretrain import causal_lm
from recipes.pretrain.causal_lm import NextTokenLoss
from utils import evaluation
from utils.config import InputError
from utils.evaluation import baselines, check_held_out, evaluate_by_domain, held_out_documents
from utils.packing import DocumentEncoder
from utils.sources import Source

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
    return [Source(str(corpus_folder / "validation.jsonl"), name="v", domain_field=DOMAIN)]


@pytest.fixture
def encode(tokenizer):
    return DocumentEncoder(tokenizer)


class OneRank:
    """What the evaluation asks of a training."""

    rank, world_size, stopped = 0, 1, False
    any_rank = staticmethod(bool)
    gather = staticmethod(list)


class Ranks:
    """Several ranks, one after the other: none needs to know of another's rows."""

    def __init__(self, rank, world_size, parts):
        self.rank, self.world_size, self.parts = rank, world_size, parts
        self.stopped = False

    any_rank = staticmethod(bool)

    def gather(self, mine):
        self.parts += mine
        return self.parts


def score(model, sources, encode, training=None, limit=None, batch_size=4):
    def token_losses(batch):
        with torch.no_grad():
            return NextTokenLoss(model)(**batch, per_token=True)

    documents = held_out_documents(sources, limit)
    training = training or OneRank()
    return evaluate_by_domain(training, documents, encode, token_losses, LENGTH, batch_size)


def by_hand(model, encode, records):
    """Document by document, with plain transformers: domain → [loss, targets, bytes]."""
    sums = {}
    for record in records:
        (tokens,) = encode([record["text"]])
        assert (tokens[0], tokens[-1]) == (1, 2)  # from begin to end
        domain = sums.setdefault(record["meta"]["redpajama_set_name"], [0.0, 0, 0])
        domain[2] += len(record["text"].encode())
        domain[1] += len(tokens) - 1
        domain[0] += piecewise_loss(model, tokens)
    return sums


def piecewise_loss(model, tokens, first=None):
    """Of one document whose first piece has `first` tokens and all others LENGTH."""
    total, start = 0.0, 0
    while start < len(tokens):
        end = min(len(tokens), start + (first or LENGTH))
        first = None
        ids = torch.from_numpy(tokens[start:end]).long()[None]
        targets = torch.from_numpy(tokens[start + 1 : end + 1]).long()
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, : len(targets)]
        total += float(cross_entropy(logits, targets, reduction="sum"))
        start = end
    return total


def test_every_number_is_that_of_a_count_by_hand(model, encode, tmp_path):
    """Documents of one row or less, so that none is cut by the end of a row."""
    records = []
    for record in make_documents("short", 60):
        (tokens,) = encode([record["text"]])
        records.append({**record, "text": record["text"][:20]})
    file = tmp_path / "short.jsonl"
    write_jsonl(file, records)
    lengths = [len(tokens) for tokens in encode([record["text"] for record in records])]
    assert max(lengths) <= LENGTH
    # each in a row of its own: what the packing makes of them is tested below
    results = {}
    sums = {}
    for record in records:
        (tokens,) = encode([record["text"]])
        domain = sums.setdefault(record["meta"]["redpajama_set_name"], [0.0, 0, 0])
        domain[0] += piecewise_loss(model, tokens)
        domain[1] += len(tokens) - 1
        domain[2] += len(record["text"].encode())
    del results
