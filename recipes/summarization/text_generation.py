"""Texts that a model generates: while it is trained, in batches, over all ranks; and afterwards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerBase

from text_pairs import Example, PairEncoder, decoder_inputs, languages
from utils.config import InputError, Settings
from utils.scoring import generate_texts
from utils.training import Training

TOKENS = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
# what a given model says of how it is searched for a text, and the run keeps unless it says more;
# not how it is sampled, nor how long its texts are
KEPT = (
    *TOKENS,
    "bos_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "num_beams",
    "early_stopping",
    "length_penalty",
    "exponential_decay_length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "renormalize_logits",
    "remove_invalid_values",
)
OF_BEAMS = ("early_stopping", "length_penalty")

USAGE = """
from transformers import {auto_model}, AutoTokenizer, GenerationConfig

tokenizer = AutoTokenizer.from_pretrained("{model}")
model = {auto_model}.from_pretrained("{model}")
model.generation_config = GenerationConfig.from_pretrained("{model}")  # of an adapter, too
source = "The text that is to be read."
inputs = tokenizer({prefix} + source, truncation=True, return_tensors="pt")
tokens = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
print(tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
"""
DECODER_USAGE = """
import torch
from transformers import {auto_model}, AutoTokenizer, GenerationConfig

tokenizer = AutoTokenizer.from_pretrained("{model}")
model = {auto_model}.from_pretrained("{model}")
model.generation_config = GenerationConfig.from_pretrained("{model}")  # of an adapter, too
source = "The text that is to be read."
tokens = tokenizer({prefix} + source + {suffix})["input_ids"]{without_end}
if len(tokens) > {longest}:  # of a long source the beginning
    suffix = tokenizer({suffix}, add_special_tokens=False)["input_ids"]
    beginning = tokenizer({prefix} + source)["input_ids"]{without_end}
    tokens = beginning[: {longest} - len(suffix)] + suffix
prompt = torch.tensor([tokens])
written = model.generate(prompt, attention_mask=torch.ones_like(prompt))[0, len(tokens) :]
print(tokenizer.decode(written, skip_special_tokens=True).strip())
"""


@dataclass
class GenerationArguments(Settings):
    """How texts are generated; named as in transformers.GenerationConfig.

    null: as the given model's own generation_config has it, or else as stands beside it.
    """

    num_beams: int | None = None  # 1: always the likeliest token (greedy)
    length_penalty: float | None = None  # 1; of beams: above it long texts are preferred, or short
    no_repeat_ngram_size: int | None = None  # 0: any n-gram may come twice
    min_new_tokens: int = 0
    max_new_tokens: int | None = None  # null: max_target_length, whatever the given model says
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
        if self.min_new_tokens > self.new_tokens:  # which the recipe knows, with the targets
            raise InputError(
                f"min_new_tokens: {self.min_new_tokens} is more than max_new_tokens "
                f"{self.new_tokens}"
            )
        super().check()


def settle_tokens(config: Any, tokenizer: PreTrainedTokenizerBase, arguments: Any) -> None:
    """Where an encoder-decoder's targets begin, and what padding is, if its config leaves it open.

    From scratch a type's defaults are ids of another vocabulary: BART begins with its end token, so
    with ours.
    """
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    if config.pad_token_id is None:
        config.pad_token_id = end if padding is None else padding
    if not arguments.model_name_or_path:
        names = ("bos_token_id", "pad_token_id", "eos_token_id")
        ours = {getattr(type(config), n, None): getattr(tokenizer, n) for n in names}
        for name in set(TOKENS) - arguments.model.keys():
            if getattr(config, name, None) is not None:
                setattr(config, name, ours.get(getattr(config, name)))
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id  # as T5 has it


def generation_config(
    model: "transformers.PreTrainedModel", encode: PairEncoder, arguments: Any
) -> GenerationConfig:
    """What the given model's own says, and over it what the settings say: never anything drawn.

    Texts begin as the targets do. mBART moves a target's last token, its language, to the front;
    where the language leads the targets (mBART-50, M2M100, NLLB) it is always written first.

    Args:
        model: may be empty.
        arguments: `GenerationArguments` and `ModelArguments`.

    Raises:
        InputError: a setting of beams where there are none; a start that cannot be known.
    """
    a, tokenizer = arguments, encode.tokenizer
    given = _given_config(a.model_name_or_path) or model.generation_config
    values = {name: getattr(given, name, None) for name in KEPT}
    for name in ("num_beams", "length_penalty", "no_repeat_ngram_size"):
        if getattr(a, name) is not None:
            values[name] = getattr(a, name)
    values["num_beams"] = values["num_beams"] or 1
    if values["num_beams"] == 1:
        if a.length_penalty not in (None, 1.0):
            raise InputError("length_penalty: it weighs beams against each other: raise num_beams")
        values |= dict.fromkeys(OF_BEAMS)
    if encode.is_encoder_decoder:
        start = int(decoder_inputs(model, torch.tensor([encode.target]))[0, 0])
        if start in set(encode.target) - {*encode.opening, *encode.closing}:
            raise InputError(
                f"tokenizer: {model.config.model_type} begins with the last token of a target that "
                "is no padding: give a tokenizer whose pad_token is not its eos_token"
            )
        values["decoder_start_token_id"] = start
        if languages(tokenizer):
            values["forced_bos_token_id"] = encode.opening[-1] if encode.opening else None
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    ends = given.eos_token_id if isinstance(given.eos_token_id, list) else [given.eos_token_id]
    ends = [end, *(other for other in ends if other not in (None, end))]
    return GenerationConfig(
        **{name: value for name, value in values.items() if value is not None},
        eos_token_id=ends if ends[1:] else end,
        pad_token_id=end if padding is None else padding,
        do_sample=False,
        min_new_tokens=a.min_new_tokens,
        max_new_tokens=a.new_tokens,
    )


def _given_config(name: str | None) -> GenerationConfig | None:
    """That of a folder or Hub name; older ones have it in their config.json."""
    for options in ({}, {"config_file_name": "config.json", "_from_model_config": True}):
        try:
            return GenerationConfig.from_pretrained(name, **options) if name else None
        except OSError:
            continue
    return None


def usage(auto_model: Any, encode: PairEncoder) -> str:
    """Code that generates a text with the exported folder, as the run did."""
    a, without_end = encode.arguments, "[:-1]" if encode.adds_end else ""
    code = USAGE if encode.is_encoder_decoder else DECODER_USAGE
    for name, value in {
        "auto_model": auto_model.__name__,
        "prefix": repr(encode.prefix),
        "suffix": repr(a.source_suffix),
        "longest": str(a.max_source_length),
        "without_end": without_end,
    }.items():
        code = code.replace(f"{{{name}}}", value)
    return code


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
    settings = model.generation_config
    texts = generate_texts(
        training,
        model,
        encode.tokenizer,
        sources,
        settings.max_new_tokens,
        batch_size,
        eos_token_id=settings.eos_token_id,
    )
    return None if texts is None else [text.strip() for text in texts]
