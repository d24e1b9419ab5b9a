"""Texts that a model generates while it is trained: in batches, by beams, over all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import GenerationConfig, PreTrainedTokenizerBase

from text_pairs import Example, PairEncoder
from utils.config import InputError, Settings
from utils.scoring import generate_texts
from utils.training import Training

# what a pretrained model says about its tokens; all other choices are those of the run
TOKEN_SETTINGS = (
    "bos_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)


@dataclass
class GenerationArguments(Settings):
    """How texts are generated; named as in transformers.GenerationConfig."""

    num_beams: int = 1  # 1: always the likeliest token (greedy)
    length_penalty: float = 1.0  # of beams: above 0 long texts are preferred, below 0 short ones
    no_repeat_ngram_size: int = 0  # no n-gram of this size comes twice; 0: any may
    min_new_tokens: int = 0
    max_new_tokens: int | None = None  # null: max_target_length
    per_device_eval_batch_size: int = 8  # texts that are generated together

    def check(self) -> None:
        for name, least in {
            "num_beams": 1,
            "no_repeat_ngram_size": 0,
            "min_new_tokens": 0,
            "max_new_tokens": 1,
            "per_device_eval_batch_size": 1,
        }.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, not {value}")
        if self.length_penalty != 1.0 and self.num_beams == 1:
            raise InputError("length_penalty: it weighs beams against each other: raise num_beams")
        if self.min_new_tokens > self.new_tokens:  # which the recipe knows, with the targets
            raise InputError(
                f"min_new_tokens: {self.min_new_tokens} is more than max_new_tokens "
                f"{self.new_tokens}"
            )
        super().check()


def generation_config(
    model: "transformers.PreTrainedModel",
    tokenizer: PreTrainedTokenizerBase,
    arguments: GenerationArguments,
) -> GenerationConfig:
    given = {name: getattr(model.generation_config, name, None) for name in TOKEN_SETTINGS}
    options: dict[str, Any] = {"length_penalty": arguments.length_penalty}
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    return GenerationConfig(
        **{name: value for name, value in given.items() if value is not None},
        **(options if arguments.num_beams > 1 else {}),
        eos_token_id=end,
        pad_token_id=end if padding is None else padding,
        do_sample=False,
        num_beams=arguments.num_beams,
        no_repeat_ngram_size=arguments.no_repeat_ngram_size,
        min_new_tokens=arguments.min_new_tokens,
        max_new_tokens=arguments.new_tokens,
    )


def generate(
    training: Training,
    model: "transformers.PreTrainedModel",
    encode: PairEncoder,
    examples: Sequence[Example],
    batch_size: int,
) -> list[str] | None:
    """What the model writes for each source, as its generation_config says.

    None when a stop signal came in between.
    """
    sources = [example["input_ids"][: example["source_length"]] for example in examples]
    most = model.generation_config.max_new_tokens
    texts = generate_texts(training, model, encode.tokenizer, sources, most, batch_size)
    return None if texts is None else [text.strip() for text in texts]
