"""Generate text with a causal language model: an exported folder, or a name on the Hub.

The likeliest continuation, printed as its tokens come; four samples; the two best of eight beams:

    python recipes/causal_lm/generate.py --model_name_or_path runs/demo/model --prompt "def "
    python recipes/causal_lm/generate.py --model_name_or_path runs/demo/model --prompt "def " \
        --temperature 0.8 --top_p 0.95 --num_return_sequences 4
    python recipes/causal_lm/generate.py --model_name_or_path runs/demo/model --prompt "def " \
        --num_beams 8 --num_return_sequences 2

The same text sooner, drafted by a smaller model of the same tokenizer:

    python recipes/causal_lm/generate.py --model_name_or_path runs/demo/model --prompt "def " \
        --assistant_model_name_or_path runs/causal_lm/distill_demo/model

Many prompts, the texts also written to a file:

    python recipes/causal_lm/generate.py --model_name_or_path runs/demo/model \
        --prompt_file prompts.txt --batch_size 16 --output_file generated.jsonl

A conversation with a model that has a chat template: Ctrl-D ends it, /reset begins another:

    python recipes/causal_lm/generate.py --model_name_or_path runs/causal_lm/finetune_demo/model \
        --chat --max_new_tokens 512
"""

import json
import math
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import torch
import transformers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from conversations import choose_template
from prompt_files import read_prompts
from terminal_chat import add_turn_ends, chat
from text_output import Interrupt, Stream, decode
from utils.config import InputError, command, parse
from utils.files import written_aside
from utils.integrity import locked
from utils.model_settings import load_model, load_pretrained, quiet
from utils.program import looked_for


@dataclass
class Arguments:
    """Generate text with a causal language model: an exported folder, or a name on the Hub."""

    model_name_or_path: str
    # a smaller model that drafts what this one verifies: the same text, sooner
    assistant_model_name_or_path: str | None = None
    # required, or prompt_file: a text to continue; in a YAML file also a list of them
    prompt: str | list[str] | None = None
    prompt_file: str | None = None  # a prompt a line; .jsonl: an object with a "prompt" a line
    chat: bool = False  # a conversation in the terminal instead
    system_prompt: str | None = None  # of the conversation
    # one of the tokenizer's by its name, one in chat_templates, or a jinja file; null: its own
    chat_template: str | None = None
    output_file: str | None = None  # JSON lines of "prompt" and "text"; null: only printed
    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: the likeliest token (greedy, beams); above 0: sampling
    top_k: int | None = None  # sample among this many likeliest tokens; null: among all
    top_p: float | None = None  # sample among the likeliest that hold this much probability
    repetition_penalty: float = 1.0  # above 1: tokens of the prompt and the text get less likely
    num_beams: int = 1
    num_return_sequences: int = 1  # texts per prompt
    batch_size: int = 8  # prompts that are continued together
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as it was saved
    trust_remote_code: bool = False  # run the Python that comes with the model or its tokenizer

    def check(self) -> None:
        if self.chat:
            for name in ("prompt", "prompt_file", "output_file"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name}: a chat is read from the terminal: leave it out")
            if self.num_beams * self.num_return_sequences > 1:
                raise InputError(
                    "chat: it has one answer: leave num_beams and num_return_sequences at 1"
                )
        else:
            for name in ("system_prompt", "chat_template"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name}: it is for a conversation: set chat: true")
            if self.prompt is None and self.prompt_file is None:
                raise InputError("there is nothing to continue: give prompt, prompt_file or chat")
        if self.prompt is not None and self.prompt_file is not None:
            raise InputError("prompt and prompt_file are both given: keep one of them")
        for name in ("max_new_tokens", "top_k", "num_beams", "num_return_sequences", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be 0 (no sampling) or more, not {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and self.temperature == 0:
                raise InputError(f"{name} needs sampling: set temperature above 0")
        texts = self.num_beams if self.num_beams > 1 or self.temperature == 0 else math.inf
        if self.num_return_sequences > texts:
            raise InputError(
                f"num_return_sequences ({self.num_return_sequences}) is more than num_beams "
                f"({self.num_beams}): raise num_beams, or sample (temperature above 0, one beam)"
            )
        if self.assistant_model_name_or_path and self.num_beams * self.num_return_sequences > 1:
            raise InputError(
                "assistant_model_name_or_path: it drafts one text of a prompt: leave num_beams and "
                "num_return_sequences at 1"
            )
        if self.output_file is not None and Path(self.output_file).is_dir():
            raise InputError(f"output_file {self.output_file} is a folder: name a file")
        if self.output_file is not None and not os.access(Path(self.output_file).parent, os.W_OK):
            raise InputError(f"output_file {self.output_file}: its folder is missing or read-only")


def main() -> None:
    args = parse(Arguments)
    prompts = [] if args.chat else read_prompts(args)
    tokenizer, model = load(args.model_name_or_path, args.dtype, args.trust_remote_code)
    encoded = encode(prompts, tokenizer, model, args.max_new_tokens)
    assistant, batch_size = None, args.batch_size
    if args.assistant_model_name_or_path is not None:
        assistant, batch_size = load_assistant(args, tokenizer, model), 1
        encode(prompts, tokenizer, assistant, args.max_new_tokens)  # it has to have room, too

    if args.chat:
        choose_template(tokenizer, args.chat_template)
        add_turn_ends(model, tokenizer)

    # All choices are made here: of a generation_config.json beside the model only its ends count.
    ends = end_tokens(tokenizer, model)
    padding = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, *ends, 0]
    model.generation_config = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=args.temperature > 0,
        num_beams=args.num_beams,
        num_return_sequences=args.num_return_sequences,
        repetition_penalty=args.repetition_penalty,
        eos_token_id=ends or None,
        pad_token_id=next(token for token in padding if token is not None),
    )
    if args.temperature > 0:
        model.generation_config.temperature = args.temperature
        model.generation_config.top_k = args.top_k or 0  # 0 is all tokens; None would be 50
        model.generation_config.top_p = args.top_p
    transformers.set_seed(args.seed)
    if args.chat:
        return chat(tokenizer, model, assistant, args)

    interrupt = Interrupt()
    signal.signal(signal.SIGINT, interrupt.press)
    streams = len(prompts) == args.num_return_sequences == args.num_beams == 1
    progress = tqdm(total=len(prompts), unit="prompt", disable=streams)
    rows = []
    for first in range(0, len(prompts), batch_size):
        batch = encoded[first : first + batch_size]
        length = max(map(len, batch))
        # Padding stands on the left, so that a text goes on where its prompt ends, and is a token
        # that the prompt holds: the repetition penalty of transformers 5.17 sees padding.
        input_ids = [ids[:1] * (length - len(ids)) + ids for ids in batch]
        attention_mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in batch]
        # of the settings of a draft, which are transformers' own, it warns
        with quiet() if assistant else nullcontext():
            sequences = model.generate(
                torch.tensor(input_ids, device=model.device),
                attention_mask=torch.tensor(attention_mask, device=model.device),
                streamer=Stream(tokenizer) if streams else None,
                stopping_criteria=[interrupt],
                assistant_model=assistant,
            )
        for number, sequence in enumerate(sequences.tolist()):
            row, which = divmod(number, args.num_return_sequences)
            place, prompt = prompts[first + row]
            text = decode(tokenizer, sequence[length - len(batch[row]) :])
            if not streams:
                progress.write(f"--- {place}, text {which + 1} of {args.num_return_sequences}")
                progress.write(text)
            # decoded with its prompt: alone, some tokenizers drop the blank that a text begins with
            rows.append({"prompt": prompt, "text": text[len(decode(tokenizer, batch[row])) :]})
        if interrupt.pressed:
            break
        progress.update(len(batch))
    progress.close()

    if interrupt.pressed:
        unwritten = f"; {args.output_file} is not written" if args.output_file else ""
        print(f"interrupted: what was made so far stands above{unwritten}", file=sys.stderr)
        sys.exit(130)
    if args.output_file is not None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        try:
            path = Path(args.output_file)
            with locked(path), written_aside(path) as aside:
                aside.write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {args.output_file}: {error.strerror}") from None


def load(
    name: str, dtype: str, trust_remote_code: bool = False
) -> tuple[PreTrainedTokenizerBase, "transformers.PreTrainedModel"]:
    """The tokenizer, and the model: on the GPU if there is one, spread over all if several."""
    part = "tokenizer"
    try:
        tokenizer = load_pretrained(transformers.AutoTokenizer, name, trust_remote_code)
        part = "causal language model"
        auto_model, options = transformers.AutoModelForCausalLM, {"device_map": "auto"}
        model, missing = load_model(auto_model, name, trust_remote_code, dtype=dtype, **options)
    except InputError:
        raise
    except Exception as error:  # each file format and each kind of name fails in its own way
        where = name if Path(name).is_dir() else f"{name} (no such folder, so a name on the Hub)"
        reason = " ".join(str(error).split()) + looked_for(name)
        raise InputError(f"{where} has no {part} that loads: {reason}") from None
    if missing:
        named = ", ".join(sorted(missing)[:3])
        raise InputError(f"{name} has no causal language model: it lacks the weights {named}")
    return tokenizer, model


def load_assistant(
    args: Arguments, tokenizer: PreTrainedTokenizerBase, model: "transformers.PreTrainedModel"
) -> "transformers.PreTrainedModel":
    """The model that drafts (Leviathan et al. 2023), with as many words as the one that verifies.

    Raises:
        InputError: another tokenizer, or a model that cannot take back what it has read.
    """
    name, others = args.assistant_model_name_or_path, args.model_name_or_path
    own, assistant = load(name, args.dtype, args.trust_remote_code)
    if own.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"assistant_model_name_or_path: {name} has another tokenizer than {others}: it must "
            "draft the same tokens"
        )
    for path, each in ((others, model), (name, assistant)):
        if getattr(each, "_is_stateful", False):
            raise InputError(
                f"assistant_model_name_or_path: {path} ({each.config.model_type}) is recurrent and "
                "cannot take back a draft"
            )
    size, held = (m.config.get_text_config().vocab_size for m in (model, assistant))
    if size != held:  # padding at the end: a draft of it is as likely as one of the end
        with quiet():
            assistant.resize_token_embeddings(size, mean_resizing=False)
        end = end_tokens(tokenizer, model)[:1] or [0]
        for layer in (assistant.get_input_embeddings(), assistant.get_output_embeddings()):
            layer.weight.data[held:] = layer.weight.data[end]
            if getattr(layer, "bias", None) is not None:
                layer.bias.data[held:] = layer.bias.data[end]
    assistant.generation_config = GenerationConfig()
    return assistant


def encode(
    prompts: list[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    model: "transformers.PreTrainedModel",
    max_new_tokens: int,
) -> list[list[int]]:
    """Token ids of the prompts, as the tokenizer's own template begins a text.

    So does transformers' pipeline, and a tokenizer that the recipes have trained with begins a text
    as they begin a document. What a template adds after a text is left out: it is to be continued.
    """
    plain, whole = (tokenizer.encode("a", add_special_tokens=added) for added in (False, True))
    places = range(len(whole))
    opening = next((i for i in places if whole[i:][: len(plain)] == plain), 0)
    closing = len(whole) - opening - len(plain)
    begin = tokenizer.bos_token_id
    begin = tokenizer.eos_token_id if begin is None else begin
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    embeddings = model.get_input_embeddings().num_embeddings
    encoded = []
    for place, text in prompts:
        ids = tokenizer.encode(text)
        ids = ids[: len(ids) - closing]
        if not ids and begin is None:
            raise InputError(f"{place}: the tokenizer has no bos or eos token to begin a text with")
        ids = ids or [begin]
        if len(ids) + max_new_tokens > positions:
            raise InputError(
                f"{place}: {len(ids)} tokens and max_new_tokens ({max_new_tokens}) are more than "
                f"the model's max_position_embeddings ({positions}): shorten one of them"
            )
        if max(ids) >= embeddings:
            raise InputError(
                f"{place}: token {max(ids)} is beyond the model's {embeddings} embeddings: "
                "this is not the model's tokenizer"
            )
        encoded.append(ids)
    return encoded


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, model: "transformers.PreTrainedModel"
) -> list[int]:
    """At which a text ends: those of the model's generation_config, and the tokenizer's."""
    given = model.generation_config.eos_token_id
    given = given if isinstance(given, list) else [given]
    return [*dict.fromkeys(end for end in (*given, tokenizer.eos_token_id) if end is not None)]


if __name__ == "__main__":
    command(main)
