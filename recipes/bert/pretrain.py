"""Pretrain an encoder on a stream of raw text: masked tokens, and pairs of segments.

BERT (masked language modelling, MLM, and next-sentence prediction, NSP), ALBERT (MLM and
sentence-order prediction) or RoBERTa (MLM alone), on one process, eight GPUs, several nodes:

    python recipes/bert/pretrain.py recipes/bert/configs/pretrain_smoke.yaml
    accelerate launch --config_file accelerate_configs/multi_cpu.yaml \\
        recipes/bert/pretrain.py recipes/bert/configs/pretrain_demo.yaml
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 8 \\
        recipes/bert/pretrain.py recipes/bert/configs/pretrain_base_slimpajama.yaml
    sbatch accelerate_configs/slurm_multi_node.sh \\
        recipes/bert/pretrain.py recipes/bert/configs/pretrain_large_slimpajama.yaml

The same command continues a run that was stopped; `--dry_run` prints the plan instead.
"""

import signal
from dataclasses import dataclass
from functools import partial

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

from encoder_arguments import EncoderArguments
from example_rows import check_examples, example_rows
from masked_check import check_objective
from masked_evaluation import (
    USAGE,
    MaskedEvaluation,
    facts_of_sequences,
    facts_of_test,
    forget_losses,
)
from masked_loss import MaskedLoss, check_model
from masking import ExampleMaker
from sentence_encoder import SentenceEncoder
from utils.config import at_end, command, parse
from utils.lanes import Corpus, Lanes
from utils.loss import LossArguments
from utils.memory import flops_per_token, parameter_count, plan
from utils.model import build_model, empty_model, load_tokenizer, model_config
from utils.report import conclude
from utils.run_folder import RunFolder
from utils.sources import check_held_out
from utils.stream import TrainingStream
from utils.training import Training


@dataclass
class Arguments(EncoderArguments, LossArguments):
    """Pretrain an encoder on a stream of raw text: masked tokens, and pairs of segments."""


@at_end
def main() -> None:
    args = parse(Arguments)
    auto_model = args.auto_model
    predicted = args.mlm_probability
    if args.dry_run:
        config = model_config(args)
        check_model(empty_model(config, auto_model), args)
        phases = [(phase.sequence_length, phase.steps) for phase in args.phases]
        print(plan(config, args, phases, auto_model, predicted))
        return
    tokenizer = load_tokenizer(args)
    config = model_config(args, tokenizer)
    encode, make_examples = SentenceEncoder(tokenizer), ExampleMaker(tokenizer, args)
    corpus = Corpus(args)
    args = corpus.arguments
    check_examples(args.train_sources, encode, args.objective, args)
    check_held_out(args.validation_sources, args.eval_documents, args)
    check_held_out(args.test_sources, None, args)
    folder = RunFolder(args.output_dir, args.resume)
    if folder.is_finished(args, corpus.fingerprint()):
        return

    training = Training(args, folder)
    model = build_model(args, config, auto_model)
    check_model(model, args)
    objective = MaskedLoss(model, args.objective, args.packing, args)
    flops = {
        phase.sequence_length: flops_per_token(config, phase.sequence_length, auto_model, predicted)
        for phase in args.all_phases()
    }
    lanes = Lanes(corpus, encode)
    rows_of = partial(example_rows, lanes, make_examples, args.phase_rows(), args.packing)
    training.prepare(
        objective,
        model,
        tokenizer,
        TrainingStream(lanes, rows_of, args),
        flops_per_token=lambda step: flops[args.phase_at(step - 1).sequence_length],
    )
    scores = partial(training.forward, per_target=True)
    check_objective(objective, scores, {*flops})
    evaluation = MaskedEvaluation(training, encode, make_examples, scores, args.packing)
    for step in training.steps():
        if training.evaluates():
            training.record_evaluation(evaluation.validation(step))
        if args.phase_at(step) != args.phase_at(step - 1):
            forget_losses(training.state)  # losses of another length
    if training.stopped:
        return

    facts = {"parameters": f"{parameter_count(config, auto_model)['total']:,}"}
    if args.test_sources:
        results = evaluation.test()
        if results is None:
            return training.stop()
        training.record_test(results)
        facts |= facts_of_test(results)
    facts |= facts_of_sequences(folder.records())
    conclude(training, "Encoder", "fill-mask", USAGE, facts)


if __name__ == "__main__":
    command(main)
