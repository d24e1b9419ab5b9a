"""Rows as people have them, read as conversations and as tools."""

import json
from contextlib import suppress
from textwrap import shorten
from typing import Any

from chat_answers import Message
from utils.config import InputError
from utils.tables import TableRow

# whom each role may follow; None: the beginning
FOLLOWS = {
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
# what other tools call them: OpenAI's, ShareGPT's
ROLES = {
    **{"developer": "system", "human": "user", "gpt": "assistant", "model": "assistant"},
    **{"function": "tool", "observation": "tool"},
}
SHAREGPT = "conversations"  # the column of its turns
# what data of other tools call the weight of a turn
WEIGHTS = ("weight", "train", "training", "loss")


def read_messages(row: TableRow, arguments: Any) -> list[Message]:
    """A row as a conversation that ends with the assistant.

    Turns keep what else they have (`tool_calls`, `name`), without nulls; a turn of the assistant
    that nothing is to be learnt from has a "weight" of 0.

    Args:
        arguments: `ConversationArguments`.

    Raises:
        InputError: a missing column, an unknown role, an order of turns that is none, empty text,
            a content with something else than text, a weight that is neither 0 nor 1.
    """
    a = arguments
    columns = (a.messages_column, SHAREGPT, a.prompt_column, a.instruction_column)
    column = next(filter(row.has, columns), None)
    if column is None:
        wanted = f"{', '.join(map(repr, columns[:-1]))} and {columns[-1]!r}"
        known = ", ".join(map(str, row.values))
        raise InputError(f"{row.place}: none of the columns {wanted}; there are: {known}")
    if column == a.prompt_column:
        messages = _completed(row, a)
    elif column == a.instruction_column:
        messages = _instructed(row, a)
    else:
        messages = _parsed(row.get(column))
    if not isinstance(messages, list) or not messages:
        shown = shorten(repr(messages), 60)
        raise InputError(f"{row.place}: {column} must be a list of turns, not {shown}")
    messages = [_named(message) for message in messages]
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


def _completed(row: TableRow, arguments: Any) -> list[Any]:
    """A prompt and its completion: texts, or turns, of which the prompt's are not learnt."""
    columns = arguments.prompt_column, arguments.completion_column
    prompt, completion = map(row.get, columns)
    if isinstance(prompt, list) and isinstance(completion, list):
        return [m | {"weight": 0} if isinstance(m, dict) else m for m in prompt] + completion
    question, answer = map(row.text, columns)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _instructed(row: TableRow, arguments: Any) -> list[Message]:
    a = arguments
    given = row.find(a.input_column)
    if given is not None and not isinstance(given, str):
        raise InputError(f"{row.place}: {a.input_column} must be text, not {given!r}")
    parts = [row.text(a.instruction_column), given]
    return [
        *_history(row, a.history_column),
        {"role": "user", "content": "\n\n".join(part for part in parts if part)},
        {"role": "assistant", "content": row.text(a.output_column)},
    ]


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


def _named(message: Any) -> Any:
    """The turn by the names of OpenAI: ShareGPT's are from, value, human, gpt."""
    if not isinstance(message, dict):
        return message
    if "role" not in message and "from" in message:
        named = {"role": message["from"], "content": message.get("value")}
        message = named | {k: v for k, v in message.items() if k not in ("from", "value")}
    role = message.get("role")
    if role == "function_call" and isinstance(call := _parsed(message.get("content")), dict | list):
        calls = call if isinstance(call, list) else [call]
        calls = [{"type": "function", "function": call} for call in calls]
        return message | {"role": "assistant", "content": None, "tool_calls": calls}
    return message | {"role": ROLES.get(role, role)} if isinstance(role, str) else message


def _turn(message: Message, where: str) -> Message:
    is_assistant = message["role"] == "assistant"
    has_calls = is_assistant and bool(message.get("tool_calls") or message.get("function_call"))
    if "content" not in message and not has_calls:
        shown = shorten(repr(message), 60)
        raise InputError(f"{where} must have a role and a content, not {shown}")
    content = message.get("content")
    if has_calls and content is None:
        content = ""
    if isinstance(content, list):
        content = "".join(_text(part, where) for part in content)
    if not isinstance(content, str) or not (content.strip() or has_calls):
        raise InputError(f"{where}: the content of {message['role']!r} is empty, or not text")
    keys = [key for key in ("role", "content", *message) if key not in WEIGHTS]
    turn = {key: message[key] for key in keys if message.get(key) is not None}
    turn |= {"content": content} if "content" in turn else {}
    for name in WEIGHTS:
        value = message.get(name)
        if value is not None and value not in (0, 1):
            raise InputError(f"{where}: {name} must be 0 or 1, not {shorten(repr(value), 60)}")
        if is_assistant and value == 0:
            turn["weight"] = 0
        elif value and not is_assistant and name != "weight":  # which OpenAI ignores there
            raise InputError(f"{where}: {name}: nothing is learnt from {message['role']!r}")
    return turn


def _text(part: Any, where: str) -> str:
    """Of a part of a content, as OpenAI and processors of images have it."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else None
    shown = repr(kind) if isinstance(kind, str) else shorten(repr(part), 60)
    raise InputError(f"{where}: a part of the content is {shown}: text alone is learnt from")


def read_tools(row: TableRow, arguments: Any) -> list[dict[str, Any]] | None:
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
