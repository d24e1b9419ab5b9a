"""Pretrain a causal language model on a stream of raw text, from scratch or from a checkpoint.

One CPU process, two, one GPU, eight GPUs with ZeRO-2, several nodes with ZeRO-3:

    python recipes/causal_lm/pretrain.py recipes/causal_lm/configs/pretrain_smoke.yaml
    accelerate launch --config_file accelerate_configs/multi_cpu.yaml \\
        recipes/causal_lm/pretrain.py recipes/causal_lm/configs/pretrain_smoke.yaml
    accelerate launch --config_file accelerate_configs/single_gpu.yaml \\
        recipes/causal_lm/pretrain.py recipes/causal_lm/configs/pretrain_125m.yaml
    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 8 \\
        recipes/causal_lm/pretrain.py recipes/causal_lm/configs/pretrain_7b_slimpajama.yaml
    sbatch accelerate_configs/slurm_multi_node.sh \\
        recipes/causal_lm/pretrain.py recipes/causal_lm/configs/pretrain_7b_slimpajama.yaml

The same command continues a run that was stopped; `--dry_run` prints the plan instead.
"""

import signal
from dataclasses import dataclass
from functools import partial
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import torch
import transformers

from bits_per_byte import baselines
from causal_head import CausalHead, check_model
from packing import DocumentEncoder, begin_as_documents, packed_rows
from text_evaluation import TextEvaluationArguments, evaluate_documents, write_samples
from utils.arguments import TrainingArguments
from utils.config import at_end, command, parse
from utils.lanes import Corpus, Lanes
from utils.loss import LossArguments
from utils.memory import flops_per_token, parameter_count, plan
from utils.model import (
    ModelArguments,
    build_model,
    load_tokenizer,
    model_config,
)
from utils.report import conclude
from utils.run_folder import RunFolder
from utils.sources import check_held_out, held_out_documents
from utils.stream import StreamArguments, TrainingStream
from utils.training import Training

USAGE = """
from transformers import pipeline

generate = pipeline("text-generation", "{model}")
print(generate("def ", max_new_tokens=60)[0]["generated_text"])
"""


@dataclass
class Arguments(
    TrainingArguments, StreamArguments, TextEvaluationArguments, ModelArguments, LossArguments
):
    """Pretrain a causal language model on a stream of raw text."""

    baselines: bool = False  # gzip -9 and a unigram model beside the bits per byte of the test
    packing: bool = True  # rows full of documents, which do not see each other; false: one a row
    dry_run: bool = False  # print parameters, tokens, FLOPs and memory, and load nothing

    def fixed(self) -> dict[str, Any]:
        return super().fixed() | ({} if self.packing else {"packing": False})


class NextTokenLoss(torch.nn.Module):
    """Σ -log p(token | the tokens before it in its document), without holding the logits."""

    def __init__(
        self, model: torch.nn.Module, packing: bool = True, added: LossArguments | None = None
    ):
        super().__init__()
        self.model, self.config, self.packing = model, model.config, packing
        self.head = CausalHead(model, added=added)
        self.names = self.head.names

    def forward(self, input_ids, shift_labels, position_ids, lengths=None, per_token=False) -> Any:
        """
        Args:
            batch: of shape (rows, sequence_length), and `lengths` (rows,), as `packing.pack` names
                them. Position ids that restart keep the documents of a row apart.

        Returns:
            {loss: its sum over the targets, and what else `CausalHead` adds}, or the loss of each
            position if `per_token`.
        """
        if self.packing:
            hidden, terms = self.head.hidden_states(input_ids, position_ids, lengths)
        else:  # columns of nothing but padding are left out
            longest = input_ids.shape[1] if lengths is None else max(2, int(lengths.max()))
            input_ids, shift_labels = input_ids[:, :longest], shift_labels[:, :longest]
            hidden, terms = self.head.hidden_states(input_ids, None, lengths)
        if per_token:
            return self.head.token_scores(hidden, shift_labels)[0]
        return {self.names[0]: self.head.cross_entropy(hidden, shift_labels), **terms}

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        return self.head.counts(batch["shift_labels"], batch["lengths"])


@at_end
def main() -> None:
    args = parse(Arguments)
    if args.dry_run:
        config = model_config(args)
        print(plan(config, args))
        return
    tokenizer = load_tokenizer(args)
    config = model_config(args, tokenizer)
    encode = DocumentEncoder(tokenizer)
    begin_as_documents(tokenizer, encode.begin)
    corpus = Corpus(args)
    args = corpus.arguments
    sources = args.validation_sources + args.test_sources
    check_held_out(sources, args.eval_documents, args)
    folder = RunFolder(args.output_dir, args.resume)
    if folder.is_finished(args, corpus.fingerprint()):
        return

    flops = flops_per_token(config, args.sequence_length)
    training = Training(args, folder)
    model = build_model(args, config, transformers.AutoModelForCausalLM)
    objective = NextTokenLoss(model, args.packing, args)
    lanes = Lanes(corpus, encode)
    rows_of = partial(packed_rows, lanes, args.sequence_length, packing=args.packing)
    data = TrainingStream(lanes, rows_of, args)
    training.prepare(objective, model, tokenizer, data, flops_per_token=lambda step: flops)
    losses = partial(training.forward, per_token=True)
    check_model(model, losses, args.sequence_length, args.packing)
    for step in training.steps():
        if training.evaluates():
            results: dict[str, Any] | None = {}
            if args.validation_sources:
                results = evaluate_documents(training, args.validation_sources, encode, losses)
            samples = write_samples(training, model, tokenizer, encode, args.sample_prompts)
            # a resume evaluates again where a signal cut the samples short
            training.record_evaluation(None if samples is None else results)
            if samples:
                training.log({"step": step, "samples": samples})
    if training.stopped:
        return

    facts = {"parameters": f"{parameter_count(config)['total']:,}"}
    if args.test_sources:
        training.load_best()
        results = evaluate_documents(training, args.test_sources, encode, losses)
        if results is None:
            return training.stop()
        training.record_test(results)
        facts["bits per byte of the test documents"] = f"{results['eval_bits_per_byte']:.4f}"
        with training.ranks.together():
            if args.baselines and training.is_main:
                test = held_out_documents(args.test_sources, args.eval_documents, args)
                train = held_out_documents(args.train_sources, 20_000, args)
                facts |= baselines(test, train, encode, len(tokenizer), args.on_bad_record)
    conclude(training, "Causal language model", "text-generation", USAGE, facts)


if __name__ == "__main__":
    command(main)
