"""The conversations of a run: to train on, to validate and to test, each part apart."""

from operator import itemgetter
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from conversations import to_examples
from utils.epochs import Mixture, digest, hold_out
from utils.tables import read_table


class ConversationData(NamedTuple):
    """What was read of the tables."""

    parts: list[list[dict[str, Any]]]  # examples to train on, to validate and to test
    mixture: Mixture  # of those to train on
    fingerprint: dict[str, str]  # what must not change over the life of a run
    facts: dict[str, Any]  # for the card: how many there are, were left out, or stand in two parts


def read_conversations(tokenizer: PreTrainedTokenizerBase, arguments: Any) -> ConversationData:
    """The examples of train_data, validation_data and test_data, with what validation_split moves.

    Args:
        tokenizer: with its chat template.
        arguments: `FinetuningArguments` and `ConversationArguments`.

    Raises:
        InputError: as `read_table`, `to_examples` and `hold_out` do.
    """
    a = arguments
    tables = (a.train_data, a.validation_data, a.test_data)
    rows = [[row for table in part for row in read_table(table)] for part in tables]
    examples = [to_examples(part, tokenizer, a) if part else ([], {}) for part in rows]
    parts, left_out = zip(*examples, strict=True)
    parts, leaks = hold_out(parts, itemgetter("messages"), a)
    train = parts[0]
    template = tokenizer.chat_template
    if isinstance(template, dict):  # whose files are listed in any order
        template = sorted(template.items())
    fingerprint = {
        "the training data": digest(e["messages"] + (e["tools"] or []) for e in train),
        "the tokenizer": digest([tokenizer.backend_tokenizer.to_str(), template]),
    }
    for example in train:
        del example["messages"], example["tools"], example["place"]  # that nothing reads again
    mixture = Mixture(train, a)
    facts = {"conversations": f"{len(train):,}", **leaks, **mixture.facts}
    for part, counts in zip(("train", "validation", "test"), left_out, strict=True):
        facts |= {f"{part} conversations {name}": n for name, n in counts.items() if n}
    return ConversationData(parts, mixture, fingerprint, facts)
