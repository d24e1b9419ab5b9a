"""What tests share: a small tokenizer and a small corpus, made on the spot."""

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoTokenizer,
    BertTokenizerFast,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from utils.lanes import Corpus
from utils.loss import IGNORE_INDEX
from utils.sources import Source
from utils.stream import StreamArguments

os.environ["TOKENIZERS_PARALLELISM"] = "false"
torch.set_num_threads(1)  # threads for tensors as small as these only wait for each other

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
DOMAINS = ["Book", "Code", "Web"]
SYLLABLES = ["ka", "to", "mi", "ren", "sul", "ba", "vor", "el", "né", "dra", "pi", "東", "🙂"]
WORDS = [first + second for first in SYLLABLES for second in SYLLABLES]


def make_documents(name: str, count: int, seed: int = 0) -> list[dict]:
    """Records as SlimPajama has them, of 3 to 120 words, each with a number of its own."""
    draw = random.Random(seed)
    return [
        {
            "text": f"{name} {number}: {' '.join(draw.choices(WORDS, k=draw.randint(3, 120)))}\n",
            "meta": {"redpajama_set_name": draw.choice(DOMAINS)},
        }
        for number in range(count)
    ]


def make_prose(name: str, count: int, seed: int = 0) -> list[dict]:
    """Records of 1 to 12 sentences of 2 to 12 words."""
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, 12))).capitalize() + "."

    return [
        {
            "text": f"{name} {number}. " + " ".join(sentence() for _ in range(draw.randint(1, 12))),
            "meta": {"redpajama_set_name": draw.choice(DOMAINS)},
        }
        for number in range(count)
    ]


def corpus_of(sources: list[Source], seed: int = 0, **settings: Any) -> Corpus:
    arguments = StreamArguments(train_sources=sources, **{"lanes": 64} | settings)
    arguments.seed, arguments.num_train_epochs = seed, None  # of the TrainingArguments beside it
    return Corpus(arguments)


def learnt_pieces(tokenizer: Any, shift_labels: Any) -> list[str]:
    """What the loss falls on, piece by piece."""
    pieces = [[]]
    for label in shift_labels:
        pieces[-1] += [label] if label != IGNORE_INDEX else []
        if label == IGNORE_INDEX and pieces[-1]:
            pieces.append([])
    return [tokenizer.decode(piece) for piece in pieces if piece]


def write_jsonl(path: Path, records: list[Any]) -> str:
    """Returns the path as it is typed."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """What a test draws does not depend on the tests that ran before it in this process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train-0.jsonl and train-1.jsonl (200 documents each) and validation.jsonl (40)."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed, (name, count) in enumerate([("train-0", 200), ("train-1", 200), ("validation", 40)]):
        write_jsonl(folder / f"{name}.jsonl", make_documents(name, count, seed))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> Path:
    """A byte-level BPE of 512 tokens, special ones included, as `AutoTokenizer` reads it."""
    pad, bos, eos = special_tokens = ["<|pad|>", "<|begin_of_text|>", "<|end_of_text|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (corpus_folder / "train-0.jsonl").read_text().splitlines()
    backend.train_from_iterator([json.loads(line)["text"] for line in lines], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prose_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl (300 documents of sentences) and validation.jsonl (40)."""
    folder = tmp_path_factory.mktemp("prose")
    for seed, (name, count) in enumerate([("train", 300), ("validation", 40)]):
        write_jsonl(folder / f"{name}.jsonl", make_prose(name, count, seed))
    return folder


@pytest.fixture(scope="session")
def wordpiece_folder(tmp_path_factory: pytest.TempPathFactory, prose_folder: Path) -> Path:
    """An uncased WordPiece of 300 tokens, special ones included, as `AutoTokenizer` reads it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    lines = (prose_folder / "train.jsonl").read_text().splitlines()
    backend.train_from_iterator([json.loads(line)["text"] for line in lines], trainer)
    folder = tmp_path_factory.mktemp("wordpiece")
    BertTokenizerFast(tokenizer_object=backend, do_lower_case=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wordpiece(wordpiece_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(wordpiece_folder)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


class Ended(NamedTuple):
    """A recipe that has ended: its exit status, what it printed and its output_dir."""

    status: int
    output: str
    error: str
    folder: Path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Iterator[Callable]:
    """call(main, words, folder): a recipe in this process, without its slow plots."""
    from accelerate.state import AcceleratorState

    from utils import plots
    from utils.config import command

    def leave(status: int) -> None:
        raise SystemExit(status)

    def run(main: Callable[[], None], words: list[str], folder: Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            command(main)
        AcceleratorState._reset_state(True)
        return Ended(end.value.code, *capfd.readouterr(), folder)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(plots, "write_plots", lambda folder: [])
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def pretrain(
    call: Callable, corpus_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> Callable[..., Ended]:
    """pretrain(name, **settings): the causal LM recipe."""
    from launching import tiny_run
    from recipes.causal_lm import pretrain as causal_lm

    def run(name: str = "run", config: Path | None = None, **settings: Any) -> Ended:
        folder = Path(settings.pop("output_dir", tmp_path / name))
        tokenizer = settings.pop("tokenizer", tokenizer_folder)
        words = tiny_run(folder, corpus_folder / "train-0.jsonl", tokenizer, **settings)
        return call(causal_lm.main, words if config is None else [str(config), *words], folder)

    return run


@pytest.fixture
def pretrain_bert(
    call: Callable, prose_folder: Path, wordpiece_folder: Path, tmp_path: Path
) -> Callable[..., Ended]:
    """pretrain_bert(name, **settings): the BERT recipe."""
    from launching import TINY_BERT, tiny_run
    from recipes.bert import pretrain as bert

    def run(name: str = "run", **settings: Any) -> Ended:
        folder = Path(settings.pop("output_dir", tmp_path / name))
        settings = TINY_BERT | settings
        tokenizer = settings.pop("tokenizer", wordpiece_folder)
        words = tiny_run(folder, prose_folder / "train.jsonl", tokenizer, **settings)
        return call(bert.main, words, folder)

    return run
