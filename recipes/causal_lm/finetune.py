"""Fine-tune a causal language model on instructions and conversations: in full, or with LoRA.

One CPU process, two, one GPU with LoRA or QLoRA, eight GPUs with ZeRO-3:

    python recipes/causal_lm/finetune.py recipes/causal_lm/configs/finetune_smoke.yaml
    accelerate launch --config_file accelerate_configs/multi_cpu.yaml \\
        recipes/causal_lm/finetune.py recipes/causal_lm/configs/finetune_demo.yaml
    accelerate launch --config_file accelerate_configs/single_gpu.yaml \\
        recipes/causal_lm/finetune.py recipes/causal_lm/configs/finetune_7b_qlora.yaml
    accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 8 \\
        recipes/causal_lm/finetune.py recipes/causal_lm/configs/finetune_7b_full.yaml

The same command continues a run that was stopped; `--dry_run` prints the plan instead.
"""

import signal
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import torch
import transformers

from added_tokens import check_added_tokens, embed_added_tokens
from causal_head import CausalHead, check_model, output_layer
from chat_rendering import set_ends
from conversation_data import read_conversations
from conversation_evaluation import evaluate_answers, score_answers, write_answers
from conversations import ConversationArguments, collate, set_chat_template
from finetuning_plan import check_trained_part, finetuning_flops, finetuning_plan, mean_context
from utils.adapters import AdapterArguments, base_dtype, task_model, trainable_share
from utils.arguments import FinetuningArguments
from utils.config import InputError, at_end, command, parse
from utils.epochs import Epochs
from utils.model import load_tokenizer, model_config
from utils.model_settings import quantization
from utils.plan import PlanArguments
from utils.ranks import launched_with, launched_zero_stage
from utils.report import conclude
from utils.run_folder import RunFolder
from utils.scoring import write_predictions
from utils.training import Training

USAGE = """
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

# an adapter's pipeline takes tokenizer and settings of its base model unless it is told
model = AutoModelForCausalLM.from_pretrained("{model}")
model.generation_config = GenerationConfig.from_pretrained("{model}")
tokenizer = AutoTokenizer.from_pretrained("{model}")
chat = pipeline("text-generation", model, tokenizer=tokenizer)
question = [{"role": "user", "content": "What is a list comprehension?"}]
print(chat(question, max_new_tokens=60)[0]["generated_text"][-1]["content"])
"""
# of an adapter whose base model lies elsewhere
SERVING = "transformers serve reads whole models: start this run again with --merge_adapter true"
METRICS = ("eval_loss", "eval_token_accuracy")


@dataclass
class Arguments(FinetuningArguments, ConversationArguments, AdapterArguments, PlanArguments):
    """Fine-tune a causal language model on instructions and conversations."""

    model: dict[str, Any] = field(default_factory=lambda: {"model_type": "llama"})
    # several conversations a row, which do not see each other; else sorted by length and padded
    packing: bool = False
    load_in_4bit: bool = False  # QLoRA: the base in NF4, its scales quantized too; needs lora
    neftune_noise_alpha: float = 0.0  # noise on the embeddings, 5 for example; 0: none
    sample_answers: int = 3  # to the first conversations of validation_data, at each evaluation
    # conversations of test_data, whose first answers are written and held against theirs: exact
    # match and ROUGE-L, and each in predictions.jsonl beside the losses of all
    scored_answers: int = 0

    def check(self) -> None:
        super().check()
        if self.load_in_4bit and not self.has_adapter:
            raise InputError("load_in_4bit: a 4-bit model cannot be trained: give lora too")
        if self.load_in_4bit and (launched_zero_stage() == 3 or launched_with("FSDP")):
            raise InputError(
                "load_in_4bit: ZeRO-3 and FSDP cannot split 4-bit weights over the processes: "
                "launch with single_gpu.yaml, multi_gpu.yaml or zero2.yaml"
            )
        self.check_metric(METRICS)
        if self.scored_answers and not self.test_data:
            raise InputError("scored_answers: give test_data, of which they are")
        if self.neftune_noise_alpha < 0:
            raise InputError(f"neftune_noise_alpha: {self.neftune_noise_alpha} is negative")

    def fixed(self) -> dict[str, Any]:
        return super().fixed() | {"neftune_noise_alpha": self.neftune_noise_alpha}


class AnswerLoss(torch.nn.Module):
    """Σ -log p(token | the conversation so far) over what the assistant says."""

    def __init__(self, model: torch.nn.Module, packing: bool, neftune_noise_alpha: float = 0.0):
        super().__init__()
        self.model, self.packing, self.noise_alpha = model, packing, neftune_noise_alpha
        self.head = CausalHead(model)
        self.names = self.head.names
        if neftune_noise_alpha:
            model.get_input_embeddings().register_forward_hook(self._add_noise)

    def forward(self, input_ids, shift_labels, position_ids, lengths=None, per_token=False) -> Any:
        """
        Args:
            batch: of shape (rows, tokens), and `lengths` (rows,), as `conversations.collate` names
                them; position ids restart with each conversation.

        Returns:
            {loss: its sum over the targets, and what else `CausalHead` adds}, or if `per_token`
            (the loss, whether the label is the most likely token) of each position.
        """
        self.position_ids = position_ids
        # alone in its row a conversation sees nothing before it, and no target what comes after it
        places = position_ids if self.packing else None
        hidden, terms = self.head.hidden_states(input_ids, places, lengths)
        if per_token:
            return self.head.token_scores(hidden, shift_labels)
        return {self.names[0]: self.head.cross_entropy(hidden, shift_labels), **terms}

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        return self.head.counts(batch["shift_labels"], batch["lengths"])

    def _add_noise(self, module: torch.nn.Module, _: Any, embedded: torch.Tensor) -> torch.Tensor:
        """NEFTune: uniform noise of alpha / √(tokens of the conversation x width)."""
        if not module.training:
            return embedded
        numbers = (self.position_ids == 0).cumsum(1) - 1  # of the conversations in each row
        tokens = torch.zeros_like(numbers).scatter_add(1, numbers, torch.ones_like(numbers))
        size = self.noise_alpha / (tokens.gather(1, numbers) * embedded.shape[-1]).sqrt()
        noise = torch.empty_like(embedded).uniform_(-1, 1)
        return embedded + noise * size[..., None].to(embedded.dtype)


@at_end
def main() -> None:
    args = parse(Arguments)
    if args.dry_run:
        print(finetuning_plan(model_config(args), args))
        return
    tokenizer = load_tokenizer(args)
    added = set_chat_template(tokenizer, args)
    config = model_config(args, tokenizer)
    check_added_tokens(added, tokenizer, config, args)
    data = read_conversations(tokenizer, args)
    train, validation, test = data.parts
    args = args.for_examples(data.mixture.count)
    output_layer(check_trained_part(config, args))
    folder = RunFolder(args.output_dir, args.resume)
    if folder.is_finished(args, data.fingerprint["the training data"]):
        return

    flops = finetuning_flops(config, args, mean_context([len(x["input_ids"]) for x in train]))
    options = {}
    if args.load_in_4bit:
        options["quantization_config"] = quantization("4bit", base_dtype(args))
    training = Training(args, folder)
    model, trained = task_model(
        args, config, transformers.AutoModelForCausalLM, "CAUSAL_LM", folder.path, **options
    )
    if args.model_name_or_path:
        embed_added_tokens(model, tokenizer, added)
    set_ends(model.generation_config, tokenizer)
    objective = AnswerLoss(model, args.packing, args.neftune_noise_alpha)
    training.prepare(
        objective,
        trained,
        tokenizer,
        Epochs(data.mixture, collate, data.fingerprint, args),
        flops_per_token=lambda step: flops,
    )
    scores_of = partial(training.forward, per_token=True)
    check_model(model, lambda batch: scores_of(batch)[0], args.sequence_length, args.packing)
    evaluate = partial(evaluate_answers, training, token_scores=scores_of)
    for step in training.steps():
        if training.evaluates():
            found = evaluate(validation) if validation else ({}, [])
            chosen = validation[: args.sample_answers]
            samples = write_answers(training, model, tokenizer, chosen)
            # a resume evaluates again where a signal cut the answers short
            training.record_evaluation(found and found[0] if samples is not None else None)
            if samples:
                training.log({"step": step, "samples": samples})
    if training.stopped:
        return

    facts = {"trained": trainable_share(trained), **data.facts}
    if args.has_adapter and args.model_name_or_path and not args.merge_adapter:
        facts["serving"] = SERVING
    if test:
        training.load_best()
        found, chosen = evaluate(test), test[: args.scored_answers]
        scored: Any = ({}, [])
        if found and chosen:
            scored = score_answers(training, model, tokenizer, chosen)
        if found is None or scored is None:
            return training.stop()
        results = found[0] | scored[0]
        training.record_test(results)
        for name in ("loss", "token_accuracy", *(n.removeprefix("eval_") for n in scored[0])):
            facts[f"{name.replace('_', ' ')} of the test"] = f"{results[f'eval_{name}']:.4f}"
        with training.ranks.together():
            if training.is_main:
                pairs = zip_longest(found[1], scored[1], fillvalue={})
                records = (one | answer for one, answer in pairs)
                write_predictions(folder.path / "predictions.jsonl", records)
    conclude(training, "Assistant", "text-generation", USAGE, facts)


if __name__ == "__main__":
    command(main)
