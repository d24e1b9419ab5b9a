"""Conversations: checked, written out by a chat template, and marked where the assistant speaks."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from chat_rendering import Message, check_bounded, generation_header, turn_ends
from chat_tokens import encode_conversations
from utils.config import InputError
from utils.loss import IGNORE_INDEX
from utils.program import looked_for, warn
from utils.tables import TableRow, naming_failures

# whom each role may follow; None: the beginning
FOLLOWS = {
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}

CHAT_TEMPLATES = Path(__file__).parent / "chat_templates"
# what data of other tools call the weight of a turn
WEIGHTS = ("weight", "train", "training", "loss")


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
    system_column: str = "system"  # the first turn, where a row has such a text
    history_column: str = "history"  # of instructions: [[question, answer], …], the turns before
    tools_column: str = "tools"  # JSON schemas of the tools, where a row has such a column
    source_column: str | None = None  # by which the evaluation is broken down
    # with generation marks: a name in chat_templates, or a jinja file; null: the tokenizer's
    chat_template: str | None = None
    # the tokenizer's end from now on; null: its own. Generation stops at what ends a turn, too
    eos_token: str | None = None
    # of more tokens than sequence_length; truncate: their end is cut off
    on_long_example: Literal["fail", "skip", "truncate"] = "fail"


def read_messages(row: TableRow, arguments: ConversationArguments) -> list[Message]:
    """A row as a conversation that ends with the assistant.

    Turns keep what else they have (`tool_calls`, `name`), without nulls; a turn of the assistant
    that nothing is to be learnt from has a "weight" of 0.

    Raises:
        InputError: a missing column, an unknown role, an order of turns that is none, empty text,
            a weight that is neither 0 nor 1.
    """
    a = arguments
    if row.has(a.messages_column):
        messages = row.get(a.messages_column)
    elif row.has(a.prompt_column):
        messages = [
            {"role": "user", "content": row.text(a.prompt_column)},
            {"role": "assistant", "content": row.text(a.completion_column)},
        ]
    elif row.has(a.instruction_column):
        given = row.find(a.input_column)
        if given is not None and not isinstance(given, str):
            raise InputError(f"{row.place}: {a.input_column} must be text, not {given!r}")
        parts = [row.text(a.instruction_column), given]
        messages = [
            *_history(row, a.history_column),
            {"role": "user", "content": "\n\n".join(part for part in parts if part)},
            {"role": "assistant", "content": row.text(a.output_column)},
        ]
    else:
        wanted = f"{a.messages_column!r}, {a.prompt_column!r} and {a.instruction_column!r}"
        known = ", ".join(map(str, row.values))
        raise InputError(f"{row.place}: none of the columns {wanted}; there are: {known}")
    if not isinstance(messages, list) or not messages:
        shown = shorten(repr(messages), 60)
        raise InputError(f"{row.place}: {a.messages_column} must be a list of turns, not {shown}")
    system, first = row.find(a.system_column), messages[0]
    has_system = isinstance(first, dict) and first.get("role") == "system"
    if isinstance(system, str) and system.strip() and not has_system:
        messages = [{"role": "system", "content": system}, *messages]
    turns, before = [], None
    for number, message in enumerate(messages, 1):
        where = f"{row.place}: turn {number}"
        if not isinstance(message, dict) or "role" not in message:
            shown = shorten(repr(message), 60)
            raise InputError(f"{where} must have a role and a content, not {shown}")
        role = message["role"]
        if not isinstance(role, str) or role not in FOLLOWS:
            raise InputError(f"{where}: unknown role {role!r}: there are {', '.join(FOLLOWS)}")
        if before not in FOLLOWS[role]:
            after = "cannot come first" if before is None else f"cannot follow {before!r}"
            raise InputError(f"{where}: {role!r} {after}")
        turns.append(_turn(message, where))
        before = role
    if before != "assistant":
        raise InputError(
            f"{row.place}: the last turn is that of {before!r}: nothing to learn from it"
        )
    return turns


def _history(row: TableRow, column: str) -> list[Message]:
    pairs = _parsed(row.find(column)) or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        shown = shorten(repr(pairs), 60)
        raise InputError(f"{row.place}: {column} must be [[question, answer], …], not {shown}")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]


def _turn(message: Message, where: str) -> Message:
    is_assistant = message["role"] == "assistant"
    has_calls = is_assistant and bool(message.get("tool_calls") or message.get("function_call"))
    if "content" not in message and not has_calls:
        shown = shorten(repr(message), 60)
        raise InputError(f"{where} must have a role and a content, not {shown}")
    content = message.get("content")
    if has_calls and content is None:
        content = ""
    if not isinstance(content, str) or not (content.strip() or has_calls):
        raise InputError(f"{where}: the content of {message['role']!r} is empty, or not text")
    keys = [key for key in ("role", "content", *message) if key not in WEIGHTS]
    turn = {key: message[key] for key in keys if message.get(key) is not None}
    for name in WEIGHTS:
        value = message.get(name)
        if value is not None and value not in (0, 1):
            raise InputError(f"{where}: {name} must be 0 or 1, not {shorten(repr(value), 60)}")
        if is_assistant and value == 0:
            turn["weight"] = 0
        elif value and not is_assistant and name != "weight":  # which OpenAI ignores there
            raise InputError(f"{where}: {name}: nothing is learnt from {message['role']!r}")
    return turn


def read_tools(row: TableRow, arguments: ConversationArguments) -> list[dict[str, Any]] | None:
    """The tools that a row tells the assistant of; None: there are none.

    Raises:
        InputError: no list of JSON schemas.
    """
    column = arguments.tools_column
    tools = _parsed(row.find(column)) or None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        shown = shorten(repr(tools), 60)
        raise InputError(f"{row.place}: {column} must be a list of JSON schemas, not {shown}")
    return tools


def _parsed(value: Any) -> Any:
    """A cell of a csv file is text, also where it holds JSON."""
    if isinstance(value, str):
        value = value.strip()
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def set_chat_template(tokenizer: PreTrainedTokenizerBase, arguments: ConversationArguments) -> None:
    """Give the tokenizer the template and the end token of the settings.

    Raises:
        InputError: no template, a broken one, one without generation marks, one that writes tokens
            that the tokenizer does not know, or none at which generation could stop.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} does not tell which characters a token stands "
            "for: conversations need a fast tokenizer (tokenizer.json)"
        )
    given = arguments.chat_template
    shipped = {path.stem: path for path in sorted(CHAT_TEMPLATES.glob("*.jinja"))}
    known = ", ".join(shipped)
    if given is not None:
        if given not in shipped and re.fullmatch(r"[\w-]+", given):
            raise InputError(
                f"chat_template: there is no {given}; there are {known}, or give a jinja file"
            )
        try:
            path = Path(shipped.get(given, given))
            tokenizer.chat_template = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            problem = f"{error.strerror}{looked_for(given)}"
            raise InputError(f"chat_template: cannot read {given}: {problem}") from None
    template = tokenizer.chat_template
    if isinstance(template, dict):  # another one for tools
        template = template.get("default")
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
    check_bounded(tokenizer, name)
    turn_ends(tokenizer, name)
    if generation_header(tokenizer) is None:
        warn(
            f"chat_template: {name} writes something else before an answer than with "
            "add_generation_prompt: what clients ask is not what the model was trained on"
        )


@naming_failures
def to_examples(
    rows: Sequence[TableRow],
    tokenizer: PreTrainedTokenizerBase,
    arguments: Any,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows → examples, and how many were left out or cut.

    An example has `input_ids` and `shift_labels` (int32 arrays: the token after each, -100 where
    it is not the assistant's), its `source`, its `messages` and its `tools`.

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
        source = "all" if a.source_column is None else str(row.get(a.source_column))
        examples.append(
            {
                "input_ids": ids,
                "shift_labels": labels,
                "source": source,
                "messages": messages,
                "tools": of_row,
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
