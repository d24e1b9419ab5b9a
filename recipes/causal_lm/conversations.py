"""Conversations: checked, written out by a chat template, and marked where the assistant speaks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import jinja2
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from utils.config import InputError
from utils.loss import IGNORE_INDEX
from utils.progress import in_batches
from utils.tables import TableRow

# whom each role may follow; None: the beginning
FOLLOWS = {
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}

CHAT_TEMPLATES = Path(__file__).parent / "chat_templates"

Message = dict[str, str]


@dataclass
class ConversationArguments:
    """How rows become conversations, and conversations tokens."""

    # The columns of the rows: conversations, or else a prompt and its completion, or else Alpaca's
    # instruction, input (which may be empty) and output. The first of them that a row has is taken.
    messages_column: str = "messages"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    instruction_column: str = "instruction"
    input_column: str = "input"
    output_column: str = "output"
    source_column: str | None = None  # by which the evaluation is broken down
    # with generation marks: a name in chat_templates, or a jinja file; null: the tokenizer's
    chat_template: str | None = None
    eos_token: str | None = None  # what ends a turn in the template; null: the tokenizer's
    # of more tokens than sequence_length; truncate: their end is cut off
    on_long_example: Literal["fail", "skip", "truncate"] = "fail"


def read_messages(row: TableRow, arguments: ConversationArguments) -> list[Message]:
    """A row as a conversation that ends with the assistant.

    Raises:
        InputError: a missing column, an unknown role, an order of turns that is none, empty text.
    """
    a, values = arguments, row.values
    if a.messages_column in values:
        messages = values[a.messages_column]
    elif a.prompt_column in values:
        messages = [
            {"role": "user", "content": row.text(a.prompt_column)},
            {"role": "assistant", "content": row.text(a.completion_column)},
        ]
    elif a.instruction_column in values:
        parts = [row.text(a.instruction_column), values.get(a.input_column) or ""]
        messages = [
            {"role": "user", "content": "\n\n".join(part for part in parts if part)},
            {"role": "assistant", "content": row.text(a.output_column)},
        ]
    else:
        wanted = f"{a.messages_column!r}, {a.prompt_column!r} and {a.instruction_column!r}"
        known = ", ".join(map(str, values))
        raise InputError(f"{row.place}: none of the columns {wanted}; there are: {known}")
    if not isinstance(messages, list) or not messages:
        shown = shorten(repr(messages), 60)
        raise InputError(f"{row.place}: {a.messages_column} must be a list of turns, not {shown}")
    before = None
    for number, message in enumerate(messages, 1):
        where = f"{row.place}: turn {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            shown = shorten(repr(message), 60)
            raise InputError(f"{where} must have a role and a content, not {shown}")
        role, content = message["role"], message["content"]
        if role not in FOLLOWS:
            raise InputError(f"{where}: unknown role {role!r}: there are {', '.join(FOLLOWS)}")
        if before not in FOLLOWS[role]:
            after = "cannot come first" if before is None else f"cannot follow {before!r}"
            raise InputError(f"{where}: {role!r} {after}")
        if not isinstance(content, str) or not content.strip():
            raise InputError(f"{where}: the content of {role!r} is empty, or not text")
        before = role
    if before != "assistant":
        raise InputError(
            f"{row.place}: the last turn is that of {before!r}: nothing to learn from it"
        )
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, arguments: ConversationArguments) -> None:
    """Give the tokenizer the template and the end token of the settings.

    Raises:
        InputError: no template, a broken one, one without generation marks, or one that writes
            tokens that the tokenizer does not know.
    """
    given = arguments.chat_template
    shipped = {path.stem: path for path in sorted(CHAT_TEMPLATES.glob("*.jinja"))}
    known = ", ".join(shipped)
    if given is not None:
        if given not in shipped and re.fullmatch(r"[\w-]+", given):
            raise InputError(
                f"chat_template: there is no {given}; there are {known}, or give a jinja file"
            )
        try:
            tokenizer.chat_template = Path(shipped.get(given, given)).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"chat_template: cannot read {given}: {error.strerror}") from None
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise InputError(
            f"chat_template: the tokenizer {tokenizer.name_or_path} has none: give one of {known}, "
            "or a jinja file"
        )
    name = given or f"that of {tokenizer.name_or_path}"
    if not re.search(r"{%-?\s*generation\b", template):
        raise InputError(
            f"chat_template: {name} does not mark what the assistant says: enclose it in "
            "{% generation %} and {% endgeneration %}, else there is nothing to train on"
        )
    vocabulary = tokenizer.get_vocab()
    for token in sorted(set(re.findall(r"<\|[^|>]+\|>", template))):
        if token not in vocabulary:
            raise InputError(
                f"chat_template: {name} writes {token}, which is no token of the tokenizer "
                f"{tokenizer.name_or_path}: choose a template that suits it"
            )
    if arguments.eos_token is not None:
        if arguments.eos_token not in vocabulary:
            raise InputError(f"eos_token: {arguments.eos_token} is no token of the tokenizer")
        tokenizer.eos_token = arguments.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks are made of lengths, never of this token


def encode_conversations(
    conversations: Sequence[list[Message]],
    places: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, np.ndarray]]:
    """{"input_ids", "is_target"} of each: whether the assistant says the token.

    Args:
        places: where each was read.

    Raises:
        InputError: the template cannot write such a conversation.
    """
    examples = []
    for start, batch in in_batches(conversations, "conversations"):
        try:
            encoded = tokenizer.apply_chat_template(
                list(batch),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            _name_unwritable(batch, places[start:], tokenizer)
            problem = shorten(str(error), 200)
            raise InputError(f"chat_template: cannot write the conversations: {problem}") from None
        for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
            examples.append(
                {"input_ids": np.array(ids, np.int32), "is_target": np.array(mask, bool)}
            )
    return examples


def _name_unwritable(
    conversations: Sequence[list[Message]],
    places: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for conversation, place in zip(conversations, places, strict=False):
        try:
            tokenizer.apply_chat_template(conversation, tokenize=False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            problem = shorten(str(error), 200)
            raise InputError(
                f"{place}: the chat_template cannot write the conversation: {problem}"
            ) from None


def to_examples(
    rows: Sequence[TableRow],
    tokenizer: PreTrainedTokenizerBase,
    arguments: Any,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows → examples, and how many were left out or cut.

    An example has `input_ids` and `shift_labels` (int32 arrays: the token after each, -100 where
    it is not the assistant's), its `source` and its `messages`.

    Args:
        arguments: `ConversationArguments` with a `sequence_length`.

    Raises:
        InputError: a row that is no conversation, one too long, or one without a target.
    """
    a, length = arguments, arguments.sequence_length
    conversations = [read_messages(row, a) for row in rows]
    examples, counts = [], {"skipped": 0, "truncated": 0}
    encoded = encode_conversations(conversations, [row.place for row in rows], tokenizer)
    for row, messages, example in zip(rows, conversations, encoded, strict=True):
        ids, is_target = example["input_ids"], example["is_target"]
        if not is_target[1:].any():
            raise InputError(
                f"{row.place}: the chat template marks no token of it as the assistant's"
            )
        if len(ids) > length:
            if a.on_long_example == "fail":
                raise InputError(
                    f"{row.place}: {len(ids)} tokens are more than sequence_length {length}: make "
                    "it longer, or set on_long_example to skip or truncate"
                )
            ids, is_target = ids[:length], is_target[:length]
            if a.on_long_example == "skip" or not is_target[1:].any():
                counts["skipped"] += 1
                continue
            counts["truncated"] += 1
        labels = np.full(len(ids), IGNORE_INDEX, np.int32)
        labels[:-1] = np.where(is_target[1:], ids[1:], IGNORE_INDEX)
        source = "all" if a.source_column is None else str(row.get(a.source_column))
        examples.append(
            {"input_ids": ids, "shift_labels": labels, "source": source, "messages": messages}
        )
    if not examples:
        raise InputError(
            f"every conversation of {rows[0].file} is longer than sequence_length {length}"
        )
    return examples, counts


def collate(rows: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
    """Examples of rows → int64 tensors of shape (rows, the longest row), padded on the right.

    `position_ids` restart with every example, and where the padding begins; `lengths` are those
    of the rows before it.
    """
    length = max(1, *(sum(len(example["input_ids"]) for example in row) for row in rows))
    batch = {
        "input_ids": np.zeros((len(rows), length), np.int64),
        "shift_labels": np.full((len(rows), length), IGNORE_INDEX, np.int64),
    }
    places = np.broadcast_to(np.arange(length), (len(rows), length)).copy()
    for index, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example["input_ids"])
            for name in ("input_ids", "shift_labels"):
                batch[name][index, start:end] = example[name]
            places[index, start:] -= places[index, start]
            start = end
        places[index, start:] -= places[index, start] if start < length else 0
    batch["position_ids"] = places
    batch["lengths"] = np.array([sum(len(example["input_ids"]) for example in row) for row in rows])
    return {name: torch.from_numpy(values) for name, values in batch.items()}
