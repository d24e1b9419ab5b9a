"""Prompts from the command line or a file, each with the place where it stands."""

import json
from typing import Any

from utils.config import InputError


def read_prompts(args: Any) -> list[tuple[str, str]]:
    """The prompts, each with the place where it stands, for messages."""
    if args.prompt_file is None:
        texts = [args.prompt] if isinstance(args.prompt, str) else args.prompt
        prompts = [(f"prompt {number}", text) for number, text in enumerate(texts, start=1)]
    else:
        try:
            # of Windows: a byte order mark is no part of the first prompt
            with open(args.prompt_file, encoding="utf-8-sig") as file:
                lines = [line.removesuffix("\n") for line in file]
        except OSError as error:
            raise InputError(f"cannot read {args.prompt_file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{args.prompt_file} is not UTF-8 text: {error.reason}") from None
        prompts = [(f"{args.prompt_file}, line {n}", line) for n, line in enumerate(lines, start=1)]
        if args.prompt_file.endswith(".jsonl"):
            prompts = [(place, prompt_of_json(place, line)) for place, line in prompts]
    if not prompts:
        raise InputError(f"{args.prompt_file or 'prompt'} is empty: there is nothing to continue")
    for place, text in prompts:
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, or bytes that the terminal gave
            raise InputError(f"{place} is not Unicode: {text!a:.60}") from None
    return prompts


def prompt_of_json(place: str, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
        prompt.encode()  # fails on half a surrogate pair, which no tokenizer takes
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise InputError(f'{place}: expected {{"prompt": "a text"}}, not {line:.60}') from None
    return prompt
