"""A conversation in the terminal: lines of the user, answers of the model as their tokens come."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from textwrap import shorten
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from chat_answers import Message
from chat_rendering import UNWRITABLE, set_ends
from text_output import Stream, decode
from utils.config import InputError
from utils.model_settings import max_positions, quiet


def chat(
    tokenizer: PreTrainedTokenizerBase,
    model: "transformers.PreTrainedModel",
    assistant: "transformers.PreTrainedModel | None",
    arguments: Any,
) -> None:
    """Answers each line of stdin, after all that was said before it, until there are no more.

    Args:
        assistant: a model that drafts.
        arguments: those of `generate.py`.

    Raises:
        InputError: the template cannot write the conversation; a line that is no text.
    """
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  (lines can be edited, and called up again)
    try:
        _talk(tokenizer, model, assistant, arguments)
    except KeyboardInterrupt:
        print()  # the shell begins a line of its own
        raise


def _talk(
    tokenizer: PreTrainedTokenizerBase,
    model: "transformers.PreTrainedModel",
    assistant: "transformers.PreTrainedModel | None",
    arguments: Any,
) -> None:
    positions = min(max_positions(each.config)[0] for each in (model, assistant) if each)
    prompt, limit = arguments.system_prompt, arguments.max_new_tokens
    begin = [] if prompt is None else [{"role": "system", "content": prompt}]
    messages = list(begin)
    while (line := _read_line()) is not None:
        if line == "/reset":
            messages = list(begin)
        if line in ("", "/reset"):
            continue
        ids = _prompt(tokenizer, model, [*messages, {"role": "user", "content": line}])
        room = positions - len(ids)
        if room < 1:
            _tell(f"the context is full: {len(ids)} of {positions} tokens; /reset begins anew")
            continue
        with quiet() if assistant else nullcontext():
            (sequence,) = model.generate(
                torch.tensor([ids], device=model.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
                max_new_tokens=min(limit, room),
                streamer=Stream(tokenizer, shows_prompt=False),
                assistant_model=assistant,
            ).tolist()
        if sequence[-1] not in (model.generation_config.eos_token_id or ()):
            full = f"the context of {positions} tokens is full; /reset begins anew"
            _tell("cut off: " + (full if room <= limit else f"max_new_tokens is {limit}"))
        answer = decode(tokenizer, sequence[len(ids) :]).strip()
        messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


def add_turn_ends(model: "transformers.PreTrainedModel", tokenizer: Any) -> None:
    """Answers end where the template ends a turn; max_new_tokens ends them where it does not."""
    if tokenizer.is_fast:
        with suppress(InputError):
            set_ends(model.generation_config, tokenizer)


def _read_line() -> str | None:
    """None: there are no more."""
    is_asked = sys.stdin.isatty()
    try:
        line = input("> " if is_asked else "")
        line.encode()
    except EOFError:
        if is_asked:
            print()  # the shell begins a line of its own
        return None
    except UnicodeError:
        raise InputError("what was typed is not Unicode") from None
    return line.strip()


def _prompt(
    tokenizer: PreTrainedTokenizerBase, model: Any, messages: Sequence[Message]
) -> list[int]:
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    except UNWRITABLE as error:
        problem = shorten(str(error), 200)
        raise InputError(f"chat_template: it cannot write the conversation: {problem}") from None
    embeddings = model.get_input_embeddings().num_embeddings
    if max(ids, default=0) >= embeddings:
        raise InputError(
            f"token {max(ids)} is beyond the model's {embeddings} embeddings: this is not the "
            "model's tokenizer"
        )
    return ids


def _tell(message: str) -> None:
    print(f"({message})", file=sys.stderr, flush=True)
