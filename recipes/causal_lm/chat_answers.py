"""Where the assistant speaks in what a chat template writes that does not mark it.

Found by writing the conversation again: up to the turn, as a client who asks for it does, and with
another word in the place of what the turn says.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

Message = dict[str, Any]
Span = tuple[int, int]

CALL_KEYS = ("tool_calls", "function_call")


class UnknownAnswer(Exception):
    """Which part of the text a turn is cannot be told."""


def find_answers(
    write: Callable[..., str], messages: Sequence[Message], whole: str, stops: Sequence[str] = ()
) -> list[Span]:
    """The characters of each turn of the assistant: what follows the prompt of a client who asks
    for it, to the first of `stops` behind its words, or to their end where there is none.

    Args:
        write: messages and `add_generation_prompt` → the text.
        whole: the text of all messages.
        stops: tokens at which generation stops.

    Raises:
        UnknownAnswer: the template leaves out the turn, or does not write it in one place.
    """
    free = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in whole)
    turn_end = re.compile("|".join(map(re.escape, stops)) or r"(?!)")
    spans: list[Span] = []

    def write_other(index: int, to: int | None = None) -> str:
        other = _with_words(messages[index], free)
        return write([*messages[:index], other, *messages[index + 1 : to]])

    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        turn, calls = f"turn {index + 1}", calls_tools(message)
        other = write_other(index)
        if other == whole and has_words(message):
            raise UnknownAnswer(f"{turn}: the chat_template does not write what it says")
        first, end = _common(whole, other), len(whole) - _common(whole[::-1], other[::-1])
        prompt = write(messages[:index], add_generation_prompt=True)
        start = len(prompt)
        if not whole.startswith(prompt):
            # what was asked is written in another way where the conversation goes on
            alone, lead = write(messages[: index + 1]), ""
            if alone.startswith(prompt):
                lead = alone[start : _common(alone, write_other(index, index + 1))]
            elif calls:
                raise UnknownAnswer(
                    f"{turn}: where its call begins cannot be told: with add_generation_prompt the "
                    "chat_template writes something else before it"
                )
            start = first - len(lead) * whole.endswith(lead, 0, first)
        if first < start or (spans and start < spans[-1][1]):
            raise UnknownAnswer(f"{turn}: the chat_template does not write it in one place")
        end = max(start, end)
        stop = turn_end.search(whole, end)
        between = whole[end : stop.start()].strip() if stop else ""
        if between and calls:  # what closes a call, before the next turn says something
            is_last = index + 1 == len(messages)
            following = len(whole) if is_last else _common(whole, write_other(index + 1))
            between = between if stop.end() > following else ""
        spans.append((start, stop.end() if stop and not between else end))
    return spans


def calls_tools(message: Message) -> bool:
    return any(message.get(key) for key in CALL_KEYS)


def has_words(message: Message) -> bool:
    return bool((message.get("content") or "").strip())


def _with_words(message: Message, words: str) -> Message:
    """The message, which says `words` and has them in the arguments of its calls."""
    other = message | ({"content": words} if has_words(message) else {})
    for key in CALL_KEYS:
        if message.get(key):
            other[key] = _with_arguments(message[key], words)
    return other


def _with_arguments(call: Any, words: str) -> Any:
    if isinstance(call, list):
        return [_with_arguments(each, words) for each in call]
    if "function" in call:
        return call | {"function": _with_arguments(call["function"], words)}
    return call | {"arguments": _replaced(call.get("arguments"), words)}


def _replaced(value: Any, words: str) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(each, words) for key, each in value.items()}
    if isinstance(value, list):
        return [_replaced(each, words) for each in value]
    return words if isinstance(value, str) else value


def _common(one: str, other: str) -> int:
    """How many characters they begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
