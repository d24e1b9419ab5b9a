"""The losses of distillation, chunk by chunk and dense: time and memory, forwards and backwards.

    python -m benchmarks.divergences

4,096 hidden states of width 512 against a vocabulary of 65,536, in fp32; dense: the logits of both
models, their log-softmax, `kl_div` and `cross_entropy` as PyTorch has them. Each measurement is a
process of its own, and the two take turns. Memory is what both passes take beside the hidden states
and weights of the two models. Results: benchmarks/results/divergences.md and .json.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import cross_entropy, kl_div, linear

from benchmarks.measurement import describe, median_and_range, ratios, write_results
from utils.config import InputError, command, parse
from utils.divergences import Divergence, Logits, summed_losses
from utils.report import markdown_table

LOSSES = ("forward_kl", "reverse_kl", "jsd", "forward_kl + labels")


@dataclass
class Arguments:
    """Measure the losses of distillation beside dense ones."""

    rows: int = 4096
    vocabulary: int = 65536
    width: int = 512
    turns: int = 3
    only: Literal["chunked", "dense"] | None = None  # in this process: one of them, once
    loss: str = "forward_kl"
    results: str = "benchmarks/results/divergences"


def dense(student: Logits, labels: torch.Tensor, teacher: Logits, name: str) -> torch.Tensor:
    log_p = linear(*student[:2]).log_softmax(1)
    with torch.no_grad():
        log_q = linear(*teacher[:2]).log_softmax(1)
    if name == "reverse_kl":
        return kl_div(log_q, log_p, log_target=True, reduction="sum")
    if name == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
        parts = (kl_div(log_m, x, log_target=True, reduction="sum") for x in (log_q, log_p))
        return sum(parts) / 2
    loss = kl_div(log_p, log_q, log_target=True, reduction="sum")
    return loss + cross_entropy(log_p, labels, reduction="sum") if "labels" in name else loss


def chunked(student: Logits, labels: torch.Tensor, teacher: Logits, name: str) -> torch.Tensor:
    has_labels = "labels" in name
    given = Divergence(name.split()[0])
    hard, soft = summed_losses(student, labels if has_labels else None, teacher, given)
    return hard + soft if has_labels else soft


def measure_here(args: Arguments) -> dict[str, float]:
    """Seconds of the second of two forward and backward passes, and what they add to the memory."""
    draw = torch.Generator().manual_seed(0)

    def projection() -> Logits:
        hidden = torch.randn(args.rows, args.width, generator=draw)
        return Logits(hidden, 0.05 * torch.randn(args.vocabulary, args.width, generator=draw))

    student, teacher = projection(), projection()
    labels = torch.randint(args.vocabulary, (args.rows,), generator=draw)
    for tensor in student[:2]:
        tensor.requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        start = time.monotonic()
        loss = globals()[args.only](student, labels, teacher, args.loss)
        loss.backward()
        seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "bytes": 1024 * peak, "loss": float(loss.detach())}


def main() -> None:
    args = parse(Arguments)
    if args.only is not None:
        print(json.dumps(measure_here(args)))
        return
    facts = describe("python -m benchmarks.divergences", ("torch",))
    facts |= {name: getattr(args, name) for name in ("rows", "vocabulary", "width", "turns")}
    facts |= {"threads": torch.get_num_threads()}
    measured: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name in LOSSES:
        measured[name] = {"chunked": [], "dense": []}
        for _ in range(args.turns):
            for way, found in measured[name].items():
                words = [sys.executable, "-m", "benchmarks.divergences", *sys.argv[1:]]
                words += ["--only", way, "--loss", name]
                ended = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                found.append(json.loads(ended.stdout))
    rows = []
    for name, ways in measured.items():
        own, other = ways["chunked"], ways["dense"]
        losses = [found["loss"] for found in own + other]
        if max(losses) - min(losses) > 1e-5 * max(losses):
            raise InputError(f"{name}: the two compute other losses: {losses}")
        values = {key: [[r[key] for r in x] for x in (own, other)] for key in own[0]}
        rows.append(
            [
                name,
                *(median_and_range(x, ".1f") for x in values["seconds"]),
                median_and_range(ratios(*values["seconds"][::-1]), ".2f"),
                *(f"{max(x) / 2**20:,.0f} MiB" for x in values["bytes"]),
                f"{max(values['bytes'][0]) / min(values['bytes'][1]):.2f}",
            ]
        )
    header = ["", "seconds", "dense", "times as fast", "memory", "dense", "share"]
    write_results(args.results, markdown_table(header, rows), facts, {"measured": measured})


if __name__ == "__main__":
    command(main)
