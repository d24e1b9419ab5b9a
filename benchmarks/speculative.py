"""What an assistant saves: a distilled student drafts, its teacher verifies.

    make demo && accelerate launch --config_file accelerate_configs/multi_cpu.yaml \\
        recipes/causal_lm/distill.py recipes/causal_lm/configs/distill_demo.yaml
    python -m benchmarks.speculative

Beginnings of held-out documents are continued greedily by the model alone and with the assistant,
by turns, in one process. The texts have to be the same, token by token. Results:
benchmarks/results/speculative.md and .json.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.measurement import describe, median_and_range, ratios, write_results
from recipes.causal_lm import generate
from utils.config import InputError, command, parse
from utils.model_settings import quiet
from utils.report import markdown_table
from utils.sources import Source, held_out_documents

ALONE, ASSISTED = "the model alone", "with the assistant"


@dataclass
class Arguments:
    """Measure greedy generation with and without an assistant."""

    model_name_or_path: str = "runs/demo/model"
    assistant_model_name_or_path: str = "runs/causal_lm/distill_demo/model"
    texts: str = "data/sample/test.jsonl"
    prompts: int = 8
    prompt_characters: int = 200  # that a document begins with
    max_new_tokens: int = 64
    turns: int = 3
    results: str = "benchmarks/results/speculative"


class Calls:
    """How many forward passes a model makes."""

    def __init__(self, model: PreTrainedModel):
        self.count = 0
        model.register_forward_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.count += 1


def main() -> None:
    args = parse(Arguments)
    facts = describe("python -m benchmarks.speculative", ("torch", "transformers"))
    facts |= {"threads": torch.get_num_threads(), "prompts": args.prompts}
    facts |= {"prompt_characters": args.prompt_characters, "max_new_tokens": args.max_new_tokens}
    documents = held_out_documents([Source(args.texts)], args.prompts)
    given = generate.Arguments(
        args.model_name_or_path,
        args.assistant_model_name_or_path,
        prompt=[document.text[: args.prompt_characters] for document in documents],
        max_new_tokens=args.max_new_tokens,
    )
    tokenizer, model = generate.load(given.model_name_or_path, given.dtype)
    assistant = generate.load_assistant(given, tokenizer, model)
    prompts = generate.encode(
        [("prompt", text) for text in given.prompt], tokenizer, model, args.max_new_tokens
    )
    model.generation_config = GenerationConfig(
        max_new_tokens=args.max_new_tokens, min_new_tokens=args.max_new_tokens, pad_token_id=0
    )
    calls, drafts = Calls(model), Calls(assistant)
    found: dict[str, list[dict[str, float]]] = {ALONE: [], ASSISTED: []}
    texts: dict[str, list[list[int]]] = {}
    for turn in range(args.turns + 1):  # the first of them is not timed
        for way, drafter in ((ALONE, None), (ASSISTED, assistant)):
            calls.count = drafts.count = 0
            start = time.perf_counter()
            with quiet():
                made = [
                    model.generate(torch.tensor([ids]), assistant_model=drafter)[0].tolist()
                    for ids in prompts
                ]
            seconds = time.perf_counter() - start
            if texts.setdefault(way, made) != made or texts[ALONE] != made:
                raise InputError(f"{way}: other tokens than those of the model alone")
            tokens = sum(len(ids) - len(p) for ids, p in zip(made, prompts, strict=True))
            if turn:
                each = {"tokens": tokens, "seconds": seconds, "passes": calls.count}
                found[way].append(each | {"drafts": drafts.count})
    rates = {way: [x["tokens"] / x["seconds"] for x in turns] for way, turns in found.items()}
    sizes = {ALONE: model.num_parameters(), ASSISTED: assistant.num_parameters()}
    header = ["", "parameters", "tokens/s", "speed-up", "tokens a pass", "drafted for each"]
    rows = []
    for way, turns in found.items():
        speed = median_and_range(ratios(rates[way], rates[ALONE]), ".2f")
        tokens, passes = (statistics.fmean(x[name] for x in turns) for name in ("tokens", "passes"))
        drafted = statistics.fmean(x["drafts"] for x in turns) / tokens
        cells = [way, f"{sizes[way]:,}", median_and_range(rates[way], ".1f"), speed]
        rows.append([*cells, f"{tokens / passes:.2f}", f"{drafted:.2f}"])
    lines = [
        markdown_table(header, rows, "lrrrrr"),
        "",
        f"Medians (least to most) of {args.turns} turns of {args.prompts} prompts, "
        f"{args.max_new_tokens} tokens each; the parameters of the second row are the assistant's. "
        "Both wrote the same tokens.",
    ]
    write_results(args.results, "\n".join(lines), facts, {"turns": found})


if __name__ == "__main__":
    command(main)
