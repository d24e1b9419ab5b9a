"""What a chat template writes: the text, what of it the assistant says, where its turns end."""

import json
import os
import re
import resource
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from os import _exit
from textwrap import shorten
from typing import Any, NamedTuple

import jinja2
import psutil
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from chat_answers import (
    Message,
    Span,
    UnknownAnswer,
    calls_tools,
    find_answers,
    has_words,
)
from utils.config import InputError

# keys of a turn, by their names, without which it would be another conversation
MEANINGFUL = (
    ("tool_calls",),
    ("function_call",),
    ("reasoning_content", "reasoning", "thinking"),
    ("name",),
)
UNWRITABLE = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError),
    *(RecursionError, TypeError, ValueError),
)
TEMPLATE_SECONDS, TEMPLATE_BYTES = 5, 2**30  # that it may take to write a few turns
PROBE = [
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "Here."},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "Here."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {}}}
CALLS = [
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "Here.", "name": "look", "tool_call_id": CALL["id"]},
    {"role": "assistant", "content": "Here."},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


class Text(NamedTuple):
    """A conversation in characters."""

    text: str
    spans: list[Span]  # of the characters that are the assistant's


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: list[dict] | None = None,
    **options: Any,
) -> Text:
    """What `apply_chat_template` writes, and where it marks the assistant, if it does."""
    template = tokenizer.get_chat_template(None, tools)
    is_marked = has_marks(template)
    (text,), spans = render_jinja_template(
        [plain_messages(messages)],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=is_marked,
        **tokenizer.special_tokens_map,
        **options,
    )
    return Text(text, [span for span in spans[0] if span[0] < span[1]] if is_marked else [])


def answered_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: list[dict] | None = None,
    ends: Sequence[int] = (),
) -> Text:
    """What `apply_chat_template` writes, and where the assistant speaks, marked or not.

    Args:
        ends: tokens at which generation stops.

    Raises:
        UnknownAnswer: it is not marked, and cannot be told.
    """
    written = render_chat(tokenizer, messages, tools)
    if has_marks(tokenizer.get_chat_template(None, tools)):
        return written

    def write(messages: Sequence[Message], **options: bool) -> str:
        return render_chat(tokenizer, messages, tools, **options).text

    stops = tokenizer.convert_ids_to_tokens([*ends])
    return Text(written.text, find_answers(write, messages, written.text, stops))


def has_marks(template: str) -> bool:
    return re.search(r"{%-?\s*generation\b", template) is not None


def plain_messages(messages: Sequence[Message]) -> list[Message]:
    """As templates and clients know them."""
    return [{k: v for k, v in message.items() if k != "weight"} for message in messages]


def check_bounded(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises InputError where the template takes too long, or too much memory, for a few turns.

    It is tried in a process of its own, which can be ended: no signal interrupts `9 ** (9 ** 9)`.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            used = psutil.Process().memory_info().vms
            _limit(resource.RLIMIT_CPU, TEMPLATE_SECONDS)
            _limit(resource.RLIMIT_AS, used + TEMPLATE_BYTES)
            for messages, asks in ((PROBE, False), (PROBE[:-1], True), (CALLS, False)):
                with suppress(*UNWRITABLE):
                    render_chat(tokenizer, messages, add_generation_prompt=asks)
            status = 0
        finally:
            _exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        much = f"{TEMPLATE_SECONDS} seconds" if status < 0 else f"{TEMPLATE_BYTES >> 30} GiB"
        raise InputError(
            f"chat_template: {name} takes more than {much} to write four short turns: "
            "it has a loop without an end, or makes something without a bound"
        )


def _limit(resource_: int, most: int) -> None:
    _, hard = resource.getrlimit(resource_)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource_, (most, most))


def tokens_written(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """What has the form of a token, <|so|>, in what the template writes."""

    def written(messages: Sequence[Message], tools: list[dict] | None = None) -> str:
        with suppress(*UNWRITABLE):
            return render_chat(tokenizer, messages, tools).text
        return ""

    knows_calls = CALL["function"]["name"] in written(CALLS[:2])
    texts = [
        written(PROBE),
        written([SYSTEM, *PROBE]),
        written(CALLS, TOOLS) if knows_calls else "",
    ]
    return set(re.findall(r"<\|[^|>\s]+\|>", "\n".join(texts)))


def turn_ends(tokenizer: PreTrainedTokenizerBase, name: str = "it") -> list[int]:
    """Where generation is to stop: what ends a turn in the template, and the tokenizer's own end.

    Args:
        name: of the template.

    Raises:
        InputError: the template writes no such token, or not what the assistant says, or marks
            something else.
    """
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        text, spans = answered_chat(tokenizer, PROBE)
    except UnknownAnswer as error:
        raise InputError(
            f"chat_template: {name}: in a conversation of four turns: {error}"
        ) from None
    except UNWRITABLE:
        return own  # the first conversation that it cannot write will be named
    answer = PROBE[1]["content"]
    if answer in text and spans and not any(answer in text[slice(*span)] for span in spans):
        raise InputError(
            f"chat_template: {name} marks something else than what the assistant says: "
            "{% generation %} cannot stand in a macro or a block that is set"
        )
    ends = _ends_of(text, spans, tokenizer)
    if ends and ends[-1] is None:
        raise InputError(
            f"chat_template: {name} writes no token after the assistant's last turn at which "
            "generation could stop: write {{ eos_token }} there"
        )
    tools = TOOLS if isinstance(tokenizer.chat_template, dict) else None  # it has one for them
    for turns in (CALLS[:2], CALLS):
        with suppress(*UNWRITABLE):  # some end a turn that calls a tool in another way
            text, spans = render_chat(tokenizer, turns, tools)
            if CALL["function"]["name"] in text:
                ends += _ends_of(text, spans or [(0, len(text))], tokenizer)
    return [end for end in dict.fromkeys(ends + own) if end is not None]


def _ends_of(text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase) -> list[int | None]:
    """The added token that is the last in each span, or else the first behind it; or None."""
    added = {*tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    tokens = [(token, from_) for token, (from_, to) in pairs if text[from_:to].strip()]
    ends = []
    for _, end in spans:
        inside = [token for token, from_ in tokens if from_ < end]
        near = [*inside[-1:], *(token for token, from_ in tokens if from_ >= end)][:2]
        ends.append(next((token for token in near if token in added), None))
    return ends


def generation_header(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What of a marked span `add_generation_prompt` writes already: mostly nothing.

    None: that prompt is not what stands before an answer.
    """
    try:
        text, spans = answered_chat(tokenizer, PROBE)
        prompt, _ = render_chat(tokenizer, PROBE[:-1], add_generation_prompt=True)
    except UNWRITABLE:
        return ""
    start = spans[-1][0] if spans else 0
    return prompt[start:] if text.startswith(prompt) and start <= len(prompt) else None


def set_ends(settings: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have generation stop where a turn ends, and where the given model stops already.

    Args:
        settings: a GenerationConfig.
    """
    given = settings.eos_token_id
    given = given if isinstance(given, list) else [given]
    ends = list(dict.fromkeys([*turn_ends(tokenizer), *given]))
    ends = [end for end in ends if end is not None]
    settings.eos_token_id = ends[0] if len(ends) == 1 else ends
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id


def checked_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict] | None,
    place: str,
    ends: Sequence[int],
) -> Text:
    """As `answered_chat`; raises InputError where the template does not write all of it."""
    write = partial(render_chat, tokenizer)

    def is_read(whole: Text, *without: Any) -> bool:
        try:
            return write(*without).text != whole.text
        except UNWRITABLE:
            return True

    said = [keys for keys in MEANINGFUL if any(_says(m, key) for m in messages for key in keys)]
    try:
        if said or tools:
            # turns that are nothing but calls have no content
            filled = [{"content": "", **message} for message in messages]
            whole = write(filled, tools)
            for keys in said:
                without = [{k: m[k] for k in m if k not in keys} for m in filled]
                if not is_read(whole, without, tools):
                    key = next(key for key in keys if any(_says(m, key) for m in messages))
                    raise _silent(place, key)
            if tools and not is_read(whole, filled):
                raise _silent(place, "tools")
        written = answered_chat(tokenizer, messages, tools, ends)
        kinds = [(m["role"], calls_tools(m)) if has_words(m) else None for m in messages]
        for kind in dict.fromkeys(filter(None, kinds)):
            other = [
                m | {"content": f"{m['content']}."} if of_m == kind else m
                for m, of_m in zip(messages, kinds, strict=True)
            ]
            if not is_read(written, other, tools):
                raise _silent(place, f"what {kind[0]!r} says" + " beside a call" * kind[1])
        for text in filter(None, map(_arguments_in_text, messages)):
            if json.dumps(text, ensure_ascii=False) in written.text:
                raise InputError(
                    f"{place}: the chat_template writes the arguments of a call as a text in "
                    "quotes, not as JSON: give a mapping, not text"
                )
    except UnknownAnswer as error:
        raise InputError(f"{place}: {error}") from None
    except UNWRITABLE as error:
        problem = shorten(str(error), 200)
        raise InputError(
            f"{place}: the chat_template cannot write the conversation: {problem}"
        ) from None
    return written


def _arguments_in_text(message: Message) -> str | None:
    """Of the first call, where they are the text of JSON, as OpenAI has them."""
    calls = message.get("tool_calls") or [{"function": message.get("function_call")}]
    arguments = (calls[0].get("function") or {}).get("arguments")
    return arguments if isinstance(arguments, str) and arguments.startswith("{") else None


def _silent(place: str, key: str) -> InputError:
    return InputError(
        f"{place}: the chat_template does not write {key}: choose one that does, or take it out of "
        "the data"
    )


def _says(message: Message, key: str) -> bool:
    # a tool's result stands behind its call: some templates need no name to connect them
    return bool(message.get(key)) and not (key == "name" and message["role"] == "tool")
