"""A conversation as the chat template writes it, in tokens, and those that the assistant learns.

A prompt has the tokens that a client gives it, who has not heard the answer yet; an answer those
that follow them, up to and with the one at which generation stops.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from chat_answers import Message, Span
from chat_rendering import Text, checked_chat, generation_header, turn_ends
from utils.config import InputError
from utils.progress import in_batches


class Tokens(NamedTuple):
    """A conversation in tokens."""

    ids: list[int]
    offsets: list[Span]  # the characters of each, from and to
    begins: list[int]  # of the marked spans: their first tokens


def encode_conversations(
    conversations: Sequence[list[Message]],
    places: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[list[dict] | None] | None = None,
) -> list[dict[str, np.ndarray]]:
    """{"input_ids", "is_target"} of each: whether the assistant says the token.

    Args:
        conversations: turns, which may have a "weight" of 0: nothing is learnt from them.
        places: where each was read.
        tools: of each.

    Raises:
        InputError: the template cannot write such a conversation, or leaves something out; a turn
            does not end with a token at which generation stops.
    """
    stops, header, examples = turn_ends(tokenizer), generation_header(tokenizer) or "", []
    tools = tools or [None] * len(conversations)
    for first, batch in in_batches(conversations, "conversations"):
        texts = []
        for number, messages in enumerate(batch, first):
            text, spans = checked_chat(tokenizer, messages, tools[number], places[number], stops)
            # what clients write is not the assistant's, marked or not
            begun = [start + len(header) * text.startswith(header, start) for start, _ in spans]
            texts.append(Text(text, [(a, b) for a, (_, b) in zip(begun, spans, strict=True)]))
        for number, tokens in enumerate(_as_generated(texts, tokenizer), first):
            text = texts[number - first]
            is_target = np.zeros(len(tokens.ids), bool)
            ends = _ends(text, tokens, stops)
            kept = _kept(conversations[number], ends, places[number])
            for begin, end, (_, to), is_kept in zip(
                tokens.begins, ends, text.spans, kept, strict=True
            ):
                if end is None:
                    end = sum(from_ < to for from_, _ in tokens.offsets)
                is_target[begin:end] = is_kept
            examples.append({"input_ids": np.array(tokens.ids, np.int32), "is_target": is_target})
    return examples


def _as_generated(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """The tokens of each text, cut where an answer begins if they were joined over that place.

    Which is rare: a template without a token of its own before the answer, an answer that begins
    with a blank or a new line.
    """

    def encode(texts: list[str]) -> list[tuple[list[int], list[Span]]]:
        if not texts:
            return []
        encoded = tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    added = {*tokenizer.added_tokens_decoder}
    wholes = encode([text for text, _ in texts])
    prompts: dict[str, list[int]] = {}
    for (text, spans), whole in zip(texts, wholes, strict=True):
        prompts |= {_section(text, *whole, start, added)[1]: [] for start, _ in spans}
    for prompt, (ids, _) in zip(prompts, encode([*prompts]), strict=True):
        prompts[prompt] = ids
    found = []
    for (text, spans), (ids, offsets) in zip(texts, wholes, strict=True):
        begins: list[int] = []
        for start, _ in spans:
            part, prompt, answer = _section(text, ids, offsets, start, added)
            if begins and part.start < begins[-1]:  # a second mark in one turn: nobody asks there
                begins.append(sum(to <= start for _, to in offsets))
                continue
            head = prompts[prompt]
            begins.append(part.start + len(head))
            if ids[part.start : begins[-1]] != head:
                more, places = _continuation(answer, head, ids[part], encode, tokenizer)
                ids = ids[: part.start] + head + more + ids[part.stop :]
                places = [(start + from_, start + to) for from_, to in places]
                places = [(start - len(prompt), start)] * len(head) + places
                offsets = offsets[: part.start] + places + offsets[part.stop :]
        found.append(Tokens(ids, offsets, begins))
    return found


def _section(
    text: str, ids: list[int], offsets: list[Span], start: int, added: set[int]
) -> tuple[slice, str, str]:
    """From the added token before a character to the one behind it: what is tokenized by itself.

    Returns:
        (its tokens without the last, the text before the character, the text from it on).
    """
    places = range(len(ids))
    first = next((i for i in reversed(places) if ids[i] in added and offsets[i][1] <= start), 0)
    last = (i for i in places[first:] if ids[i] in added and offsets[i][0] >= start)
    last = next(last, len(ids))
    from_ = offsets[first][0] if first else 0
    to = offsets[last][0] if last < len(ids) else len(text)
    return slice(first, last), text[from_:start], text[start:to]


def _continuation(
    text: str,
    head: list[int],
    joined: list[int],
    encode: Callable[[list[str]], list[tuple[list[int], list[Span]]]],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[int], list[Span]]:
    """Tokens of a text that go on after those of `head`, and their offsets.

    Args:
        joined: the tokens of both as one text.
    """
    expected = tokenizer.decode(joined, clean_up_tokenization_spaces=False)
    # at the beginning of a text some tokenizers put a blank
    for before in ("", "\n", "a"):
        ((lead, _), (ids, offsets)) = encode([before, before + text])
        if ids[: len(lead)] == lead:
            more = ids[len(lead) :]
            if tokenizer.decode(head + more, clean_up_tokenization_spaces=False) == expected:
                places = offsets[len(lead) :]
                return more, [(a - len(before), b - len(before)) for a, b in places]
    return encode([text])[0]


def _ends(text: Text, tokens: Tokens, stops: Sequence[int]) -> list[int | None]:
    """Of each span the index after the token that ends it; None: there is none.

    Blanks may stand between it and the end of the span, on either side.
    """
    places = [
        (index + 1, *tokens.offsets[index]) for index, id in enumerate(tokens.ids) if id in stops
    ]
    ends = []
    for begin, (_, end) in zip(tokens.begins, text.spans, strict=True):
        ends.append(
            next(
                (
                    index
                    for index, from_, to in places
                    if index > begin and not text.text[min(to, end) : max(from_, end)].strip()
                ),
                None,
            )
        )
    return ends


def _kept(messages: list[Message], ends: list[int | None], place: str) -> list[bool]:
    """Whether each marked span is to be learnt.

    Raises:
        InputError: a turn without an end; a weight for a turn that has no span of its own.
    """
    turns = [n for n, message in enumerate(messages, 1) if message["role"] == "assistant"]
    weights = [messages[turn - 1].get("weight", 1) for turn in turns]
    is_one_each = len(ends) == len(turns)
    if 0 in weights and not is_one_each:
        raise InputError(
            f"{place}: a turn has weight 0, and which it is cannot be told: the chat_template "
            f"marks {len(ends)} parts of the {len(turns)} turns of the assistant"
        )
    endless = [number for number, end in enumerate(ends) if end is None]
    # one turn may have several marks, the last of which ends it
    if endless and (len(ends) - len(endless) < len(turns) or endless[-1] == len(ends) - 1):
        turn = f"turn {turns[endless[0]]}" if is_one_each else "a turn of the assistant"
        raise InputError(
            f"{place}: the chat_template writes no token after {turn} at which generation stops: "
            "write {{ eos_token }} there"
        )
    return [weight != 0 for weight in weights] if is_one_each else [True] * len(ends)
