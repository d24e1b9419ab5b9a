"""Conversations: written out by a chat template, and learnt where the assistant speaks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from chat_rendering import check_bounded, generation_header, tokens_written, turn_ends
from chat_tokens import encode_conversations
from conversation_rows import read_messages, read_tools
from utils.config import InputError
from utils.loss import IGNORE_INDEX
from utils.program import looked_for, warn
from utils.tables import TableRow, naming_failures

CHAT_TEMPLATES = Path(__file__).parent / "chat_templates"


@dataclass
class ConversationArguments:
    """How rows become conversations, and conversations tokens."""

    # The columns of the rows: turns (else ShareGPT's `conversations`), or a prompt and its
    # completion, or Alpaca's instruction, input (which may be empty) and output: the first of them
    # that a row has.
    messages_column: str = "messages"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    instruction_column: str = "instruction"
    input_column: str = "input"
    output_column: str = "output"
    system_column: str = "system"  # the first turn, where a row has such a text
    history_column: str = "history"  # of instructions: [[question, answer], …], the turns before
    tools_column: str = "tools"  # JSON schemas of the tools, where a row has such a column
    source_column: str | None = None  # by which the evaluation is broken down; null: by table
    # one of the tokenizer's by its name, one in chat_templates, or a jinja file; null: its own
    chat_template: str | None = None
    # special tokens that the template needs and the tokenizer lacks: [<|im_start|>, <|im_end|>]
    add_tokens: list[str] = field(default_factory=list)
    # the tokenizer's end from now on; null: its own. Generation stops at what ends a turn, too
    eos_token: str | None = None
    # of more tokens than sequence_length; truncate: their end is cut off
    on_long_example: Literal["fail", "skip", "truncate"] = "fail"


def choose_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    """Give the tokenizer the template of this name; null: its own. Returns what to call it.

    Raises:
        InputError: there is none.
    """
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    files = {path.stem: path for path in sorted(CHAT_TEMPLATES.glob("*.jinja"))}
    known = ", ".join(dict.fromkeys([*sorted(named), *files]))
    if name is None:
        # by name alone, the one for tools is taken where there are some
        if own is None or (named and "default" not in named):
            raise InputError(
                f"chat_template: the tokenizer {tokenizer.name_or_path} has none"
                f"{' of the name default' if named else ''}: give one of {known}, or a jinja file"
            )
        return f"that of {tokenizer.name_or_path}"
    if name in named:
        tokenizer.chat_template = named[name]
        return name
    if name not in files and re.fullmatch(r"[\w-]+", name):
        raise InputError(
            f"chat_template: there is no {name}; there are {known}, or give a jinja file"
        )
    try:
        tokenizer.chat_template = Path(files.get(name, name)).read_text(encoding="utf-8-sig")
    except OSError as error:
        problem = f"{error.strerror}{looked_for(name)}"
        raise InputError(f"chat_template: cannot read {name}: {problem}") from None
    return name


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, arguments: ConversationArguments
) -> list[str]:
    """Give the tokenizer the template, the added tokens and the end token of the settings.

    Returns:
        the tokens that were added: those that it lacked.

    Raises:
        InputError: no template, a broken one, one that writes tokens that the tokenizer does not
            know, none at which generation could stop, or not what the assistant says.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} does not tell which characters a token stands "
            "for: conversations need a fast tokenizer (tokenizer.json)"
        )
    own = tokenizer.chat_template
    own = [*own.values(), own] if isinstance(own, dict) else [own]
    name = choose_template(tokenizer, arguments.chat_template)
    if not all(token.strip() for token in arguments.add_tokens):
        raise InputError("add_tokens: a token of blanks is none")
    vocabulary = tokenizer.get_vocab()
    added = [token for token in dict.fromkeys(arguments.add_tokens) if token not in vocabulary]
    tokenizer.add_tokens(added, special_tokens=True)
    check_bounded(tokenizer, name)
    lacking = []
    if tokenizer.chat_template not in own:
        lacking = sorted(tokens_written(tokenizer) - tokenizer.get_vocab().keys())
    if lacking:
        raise InputError(
            f"chat_template: {name} writes {lacking[0]}, which is no token of the tokenizer "
            f"{tokenizer.name_or_path}: choose a template that suits it, or set add_tokens: "
            f"[{', '.join(lacking)}]"
        )
    if arguments.eos_token is not None:
        if arguments.eos_token not in tokenizer.get_vocab():
            raise InputError(f"eos_token: {arguments.eos_token} is no token of the tokenizer")
        tokenizer.eos_token = arguments.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks are made of lengths, never of this token
    turn_ends(tokenizer, name)
    if generation_header(tokenizer) is None:
        warn(
            f"chat_template: {name} writes something else before an answer than with "
            "add_generation_prompt: what clients ask is not what the model was trained on"
        )
    return added


@naming_failures
def to_examples(
    rows: Sequence[TableRow],
    tokenizer: PreTrainedTokenizerBase,
    arguments: Any,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows → examples, and how many were left out or cut.

    An example has `input_ids` and `shift_labels` (int32 arrays: the token after each, -100 where
    it is not the assistant's), its `source`, its `messages`, its `tools`, its `place` and its
    `table`.

    Args:
        arguments: `ConversationArguments` with a `sequence_length`.

    Raises:
        InputError: a row that is no conversation, one too long, or one without a target.
    """
    a, length = arguments, arguments.sequence_length
    conversations = [read_messages(row, a) for row in rows]
    tools = [read_tools(row, a) for row in rows]
    examples, counts = [], {"skipped": 0, "truncated": 0}
    places = [row.place for row in rows]
    encoded = encode_conversations(conversations, places, tokenizer, tools)
    for row, messages, of_row, example in zip(rows, conversations, tools, encoded, strict=True):
        ids, is_target = example["input_ids"], example["is_target"]
        if not is_target[1:].any():
            raise InputError(
                f"{row.place}: every turn of the assistant has weight 0: nothing to learn from it"
                if any(message.get("weight") == 0 for message in messages)
                else f"{row.place}: the chat template marks no token of it as the assistant's"
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
        source = row.table if a.source_column is None else str(row.get(a.source_column))
        examples.append(
            {
                "input_ids": ids,
                "shift_labels": labels,
                "source": source,
                "messages": messages,
                "tools": of_row,
                "place": row.place,
                "table": row.table,
            }
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
