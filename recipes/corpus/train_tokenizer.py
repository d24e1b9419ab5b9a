"""Train a tokenizer: byte-level BPE for causal language models, WordPiece for BERT.

    python recipes/corpus/train_tokenizer.py recipes/corpus/configs/train_tokenizer_bpe_sample.yaml
    python recipes/corpus/train_tokenizer.py \\
        recipes/corpus/configs/train_tokenizer_wordpiece_sample.yaml

The text is streamed from whatever the pretraining recipes read: only the counts of distinct words
are kept in memory. The same text and settings give the same `tokenizer.json`, byte for byte. The
folder that comes out is read by `AutoTokenizer.from_pretrained`, alone or beside a model; what it
makes of held-out text is printed as bytes of UTF-8 per token, by domain.
"""

import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate, islice
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from utils.config import InputError, command, parse
from utils.files import written_aside
from utils.integrity import locked
from utils.program import announced
from utils.sources import BadRecords, Document, Source, SourceArguments, check_documents, documents

# Llama 3's pattern, GPT-4's in effect; no token crosses the borders that it draws. Contractions,
# words with the one sign before them, up to three digits, signs with the line breaks after them,
# line breaks, blanks.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# ids 0, 1, 2: bos and eos stand where LlamaConfig expects them. The padding token is not eos:
# a loss that leaves out padding would leave out the end of every document.
PAD, BOS, EOS = "<|pad|>", "<|begin_of_text|>", "<|end_of_text|>"
BPE_SPECIAL_TOKENS = [PAD, BOS, EOS]
WORDPIECE_SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
ENCODE_BATCH = 256  # documents
LONGEST_WORD = 1024  # bytes, or characters of a WordPiece; DNA and base64 are words of any length
PART = 2**22  # characters; regular expressions give up on ten million blanks
PROGRESS_SECONDS = 5


@dataclass(kw_only=True)
class Arguments(SourceArguments):
    """Train a byte-level BPE or a WordPiece tokenizer."""

    output_dir: str  # the tokenizer's folder; a tokenizer already there is replaced at the end
    algorithm: Literal["bpe", "wordpiece"]  # bpe: any string comes back exactly; wordpiece: BERT's
    train_sources: list[Source]  # weights share out max_train_bytes; a document is read once
    validation_sources: list[Source] = field(default_factory=list)  # for bytes per token
    # Tokens in all, special ones included. Take a multiple of 64, better of 128: the embedding and
    # the output layer have this many rows, and GPUs are slow on others.
    vocab_size: int = 32768
    # Bytes of text to learn from, read from the head of every file; null: all there is. Some
    # gigabytes are enough for any vocabulary.
    max_train_bytes: int | None = None
    min_frequency: int = 2  # a pair seen more seldom is not merged
    lowercase: bool = False  # wordpiece only: uncased, and without accents, as in bert-base-uncased
    limit_alphabet: int = 1000  # wordpiece only: characters kept; a word with any other is [UNK]
    model_max_length: int | None = None  # tokens where truncation=True cuts; null: nowhere

    def check(self) -> None:
        super().check()
        for name in ("min_frequency", "limit_alphabet", "max_train_bytes", "model_max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more, not {value}")
        if not self.train_sources:
            raise InputError("train_sources is empty: give at least one path")
        weights = [source.weight for source in self.train_sources]
        if min(weights) < 0 or sum(weights) == 0:
            raise InputError(f"the weights of train_sources must be positive, not {weights}")
        if self.algorithm == "bpe":
            if self.lowercase:
                raise InputError("lowercase is for wordpiece: bpe keeps every string as it is")
            smallest = 256 + len(BPE_SPECIAL_TOKENS)
            if self.vocab_size < smallest:
                raise InputError(
                    f"vocab_size {self.vocab_size} is too small: 256 bytes and "
                    f"{len(BPE_SPECIAL_TOKENS)} special tokens need {smallest}"
                )


def main() -> None:
    args = parse(Arguments)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python would see Ctrl-C only after the merging
    output_dir = Path(args.output_dir)
    check_output(output_dir)
    train_text = Text([s for s in args.train_sources if s.weight > 0], args)
    validation_text = Text(args.validation_sources, args)

    train = {"bpe": train_bpe, "wordpiece": train_wordpiece}[args.algorithm]
    tokenizer = train(train_text, args)
    if len(tokenizer) < args.vocab_size:
        say(
            f"warning: {len(tokenizer)} tokens came out, not {args.vocab_size}: no other pair is "
            f"seen {args.min_frequency} times; give more text, or a lower vocab_size"
        )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with locked(output_dir), written_aside(output_dir) as folder:
        tokenizer.save_pretrained(folder)
    if args.validation_sources:
        report(tokenizer, validation_text)
    for text in (train_text, validation_text):
        if text.bad_records.messages:
            print(f"skipped {len(text.bad_records.messages)} broken records")
    print(f"{output_dir}: {args.algorithm}, {len(tokenizer)} tokens")


def train_bpe(text: "Text", args: Arguments) -> PreTrainedTokenizerBase:
    """Byte-level BPE (https://arxiv.org/abs/1508.07909, on bytes as in GPT-2): lossless.

    `tokenizer(text)` puts bos before the text, and no eos after it: a prompt is to be continued.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        min_frequency=args.min_frequency,
        special_tokens=BPE_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    learn(backend, trainer, text, args)
    # the ids of special tokens are known only now
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, backend.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",  # generation continues at the right end
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        model_max_length=args.model_max_length,
    )


def train_wordpiece(text: "Text", args: Arguments) -> PreTrainedTokenizerBase:
    """WordPiece as BERT reads it (https://arxiv.org/abs/1810.04805), its pieces found by BPE."""
    from transformers import BertTokenizer

    backend = BertTokenizer(do_lower_case=args.lowercase).backend_tokenizer
    alphabet = count_alphabet(text, backend, args)
    # The trainer numbers "##a", "##b", … in the order of a hash table, another one in every run,
    # and breaks ties between pairs by number. As special tokens they have fixed numbers.
    inner = ["##" + c for c in alphabet if len(words_of("a" + c, backend)) == 1]
    smallest = len(WORDPIECE_SPECIAL_TOKENS) + len(alphabet) + len(inner)
    if args.vocab_size < smallest:
        raise InputError(
            f"vocab_size {args.vocab_size} is too small: {len(alphabet)} characters, {len(inner)} "
            f"of them also inside words, and {len(WORDPIECE_SPECIAL_TOKENS)} special tokens need "
            f"{smallest}; a lower limit_alphabet (now {args.limit_alphabet}) needs fewer"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=args.vocab_size,
        min_frequency=args.min_frequency,
        special_tokens=WORDPIECE_SPECIAL_TOKENS + inner,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=sys.stderr.isatty(),
    )
    learn(backend, trainer, text, args)
    return BertTokenizer(
        vocab=backend.get_vocab(),
        do_lower_case=args.lowercase,
        model_max_length=args.model_max_length,
    )


def learn(backend: Tokenizer, trainer: trainers.Trainer, text: "Text", args: Arguments) -> None:
    """Count the words of the text, then merge pairs of tokens until the vocabulary is full.

    Long words are learned from in pieces: the time is quadratic in their length.
    """
    merging = ExitStack()

    def texts() -> Iterator[str]:
        for document in text.read("counting words", args.max_train_bytes):
            yield from in_parts(document.text)
        say(f"merging pairs into {args.vocab_size} tokens")
        if not sys.stderr.isatty():  # where the trainer draws a bar
            merging.enter_context(announced("merging pairs"))

    whole = backend.pre_tokenizer
    pieces = pre_tokenizers.Split(Regex(rf"[\s\S]{{{LONGEST_WORD}}}"), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([whole, pieces])
    with merging:
        backend.train_from_iterator(texts(), trainer)
    backend.pre_tokenizer = whole


def in_parts(text: str) -> Iterator[str]:
    return (text[start : start + PART] for start in range(0, len(text), PART))


def count_alphabet(text: "Text", backend: Tokenizer, args: Arguments) -> list[str]:
    """The most frequent characters of the text as the model will see it, ties by code point."""
    raw: Counter[str] = Counter()
    for document in text.read("counting characters", args.max_train_bytes):
        raw.update(document.text)
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        for normalized in "".join(words_of(character, backend)):
            counts[normalized] += count
    frequent = sorted(counts, key=lambda c: (-counts[c], c))[: args.limit_alphabet]
    return sorted(c for c in frequent if counts[c] >= args.min_frequency)


def words_of(text: str, backend: Tokenizer) -> list[str]:
    """The words in which pieces are looked for, normalized."""
    normalized = backend.normalizer.normalize_str(text)
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)]


class Text:
    """The documents of some sources, for as many readings as it takes.

    Raises:
        InputError: a source without any document; with on_bad_record "fail" a broken record.
    """

    def __init__(self, sources: list[Source], arguments: SourceArguments):
        self.bad_records = BadRecords(arguments.on_bad_record, shown=math.inf)
        self.longest = arguments.max_document_bytes
        self.files: list[tuple[Source, str, float]] = []  # with their shares of the bytes
        found = check_documents(sources, arguments)
        for source, files in zip(sources, found, strict=True):
            self.files += [(source, file, source.weight / len(files)) for file in files]

    def read(self, doing: str, max_bytes: int | None = None) -> Iterator[Document]:
        """Documents, file by file, with progress on stderr.

        Of `max_bytes` a source has a share by its weight and each of its files an equal part, read
        from its head; what a file does not fill goes to those after it. The document that goes
        over a share is the last.
        """
        limit = math.inf if max_bytes is None else max_bytes
        sizes = [os.path.getsize(file) if os.path.exists(file) else 0 for _, file, _ in self.files]
        all_files = sum(sizes) or math.inf
        shares_left = list(accumulate(share for _, _, share in reversed(self.files)))[::-1]
        text_bytes = file_bytes = 0
        started = shown = time.monotonic()
        for (source, file, share), left, size in zip(self.files, shares_left, sizes, strict=True):
            if text_bytes >= limit:
                break
            stop = text_bytes + (limit - text_bytes) * share / left
            for document in documents(source, [file], self.bad_records.report, self.longest):
                if text_bytes >= stop:
                    break
                size_said = f"{doing}: {document.size / 1e6:.1f} MB of one document"
                with announced(size_said) if document.size > PART else nullcontext():
                    yield document
                text_bytes += document.size
                if time.monotonic() - shown > PROGRESS_SECONDS:
                    shown = time.monotonic()
                    position = document.end if file.endswith(".jsonl") else 0  # else rows or lines
                    # reading ends with the limit or with the files, whichever comes first
                    done = max(text_bytes / limit, (file_bytes + position) / all_files)
                    say(f"{doing}: {text_bytes / 1e6:.1f} MB of text{time_left(started, done)}")
            file_bytes += size
        seconds = time.monotonic() - started
        say(f"{doing}: {text_bytes / 1e6:.1f} MB of text in {seconds:.0f} s")


def time_left(started: float, done: float) -> str:
    """`, 12%, 0:01:30 left`, or nothing while it is not known which part is done."""
    if not done:
        return ""
    seconds = (time.monotonic() - started) * (1 / min(done, 1) - 1)
    return f", {min(done, 1):.0%}, {timedelta(seconds=round(seconds))} left"


def say(line: str) -> None:
    # on a terminal the trainer draws a bar on the current line: start over on it
    start = "\r\033[K" if sys.stderr.isatty() else ""
    print(f"{start}{line}", file=sys.stderr, flush=True)


def check_output(output_dir: Path) -> None:
    """Raises InputError for a file, a folder with other things in it, no permission to write."""
    parent = next(path for path in output_dir.absolute().parents if path.exists())
    for path in (parent, output_dir):
        if path.exists() and not path.is_dir():
            raise InputError(f"output_dir {output_dir}: {path} is a file, not a folder")
    if not os.access(parent, os.W_OK):
        raise InputError(f"output_dir {output_dir}: no permission to write in {parent}")
    if output_dir.exists():
        others = sorted({path.name for path in output_dir.iterdir()} - TOKENIZER_FILES)
        if others:
            raise InputError(
                f"output_dir {output_dir} holds more than a tokenizer ({', '.join(others[:3])}): "
                "name another folder"
            )


def report(tokenizer: PreTrainedTokenizerBase, text: Text) -> None:
    """Print bytes of UTF-8 per token (special tokens not counted) by domain and in all."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # their names in a text are text
    counts: dict[str, Counter[str]] = {}
    documents = text.read("held-out text")
    while batch := list(islice(documents, ENCODE_BATCH)):
        parts = [(d.domain, part) for d in batch for part in in_parts(d.text)]
        with announced("reading held-out text"):
            encodings = backend.encode_batch_fast([t for _, t in parts], add_special_tokens=False)
        for (domain, text), encoding in zip(parts, encodings, strict=True):
            count = counts.setdefault(domain, Counter())
            count["bytes"] += len(text.encode())
            count["tokens"] += len(encoding.ids)
            count["unknown"] += encoding.ids.count(tokenizer.unk_token_id)
    rows = [*sorted(counts.items()), ("total", sum(counts.values(), Counter()))]
    width = max(len(name) for name, _ in rows)
    print(f"{'held-out text':{width}}  {'bytes':>12}  {'tokens':>12}  bytes per token")
    for name, count in rows:
        ratio = count["bytes"] / max(count["tokens"], 1)
        line = f"{name:{width}}  {count['bytes']:12,}  {count['tokens']:12,}  {ratio:15.3f}"
        if tokenizer.unk_token is not None:
            line += f"  {count['unknown'] / max(count['tokens'], 1):.2%} unknown"
        print(line)


if __name__ == "__main__":
    command(main)
