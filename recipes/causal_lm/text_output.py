"""Text as it is generated: decoded, printed token by token, and ended by Ctrl-C."""

import signal

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Stream(BaseStreamer):
    """Prints one text, its prompt first unless it is known, as its tokens come.

    transformers' TextStreamer holds each word back until the next begins, and decodes line by line,
    which loses the blank that a line begins with for tokenizers that mark the starts of words.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shows_prompt: bool = True):
        self.tokenizer, self.shows_prompt = tokenizer, shows_prompt
        self.ids: list[int] = []
        self.printed = 0  # characters

    def put(self, value: torch.Tensor) -> None:
        """`value`: first the prompt's token ids, (1, length), then each new one, (1,)."""
        is_prompt = not self.ids
        self.ids += value.flatten().tolist()
        text = decode(self.tokenizer, self.ids)
        if is_prompt and not self.shows_prompt:
            self.printed = len(text)
        elif not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a part of a character
            print(text[self.printed :], end="", flush=True)
            self.printed = len(text)

    def end(self) -> None:
        print(decode(self.tokenizer, self.ids)[self.printed :], flush=True)


class Interrupt(StoppingCriteria):
    """Ctrl-C ends generation after the token in hand, so that what was made is printed."""

    pressed = False

    def press(self, *_) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C does not wait

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        return torch.full((len(input_ids),), self.pressed, device=input_ids.device)
