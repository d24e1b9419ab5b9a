"""What a student is distilled on: a stream of text, or conversations; each with its evaluation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from chat_rendering import set_ends
from conversation_cache import ConversationCache
from conversation_data import read_conversations
from conversation_evaluation import evaluate_answers, write_answers
from conversations import collate, set_chat_template
from on_policy import Sampler
from packing import DocumentEncoder, begin_as_documents, packed_rows
from stream_cache import StreamCache
from text_evaluation import evaluate_documents, write_samples
from utils.config import InputError
from utils.engine import Data
from utils.epochs import Epochs
from utils.lanes import Corpus, Lanes
from utils.sources import check_held_out
from utils.stream import TrainingStream
from utils.training import Training

# a batch → (loss, whether the label is the most likely token) of each position
Scores = Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
Evaluated = tuple[dict[str, Any], list[dict[str, Any]]]  # results, and of conversations each's


class Text:
    """Raw text, as `pretrain.py` reads and evaluates it."""

    metric = "bits_per_byte"

    def __init__(self, tokenizer: Any, arguments: Any):
        self.tokenizer, self.corpus = tokenizer, Corpus(arguments)
        self.arguments = arguments = self.corpus.arguments
        self.encode = DocumentEncoder(tokenizer)
        begin_as_documents(tokenizer, self.encode.begin)
        held_out = arguments.validation_sources + arguments.test_sources
        check_held_out(held_out, arguments.eval_documents, arguments)
        self.fingerprint = self.corpus.fingerprint()
        self.facts: dict[str, Any] = {}
        self.lanes, length = Lanes(self.corpus, self.encode), arguments.sequence_length
        self.rows_of = partial(packed_rows, self.lanes, length, packing=arguments.packing)
        self.cache = None
        if arguments.teacher_cache is not None:
            depends_on = {"tokenizer": self.encode.fingerprint(), "corpus": self.fingerprint}
            self.cache = StreamCache(arguments, depends_on, self.lanes, self.rows_of)
        self.has_validation = bool(arguments.validation_sources)
        self.has_test = bool(arguments.test_sources)

    def steps(self, training: Training, model: Any) -> TrainingStream:
        rows_of = self.cache.rows if self.cache else self.rows_of
        return TrainingStream(self.lanes, rows_of, self.arguments)

    def evaluate(self, training: Training, scores: Scores, split: str) -> Evaluated | None:
        sources = getattr(self.arguments, f"{split}_sources")
        encode, losses_of = self.encode, lambda batch: scores(batch)[0]
        results = evaluate_documents(training, sources, encode, losses_of)
        return None if results is None else (results, [])

    def samples(self, training: Training, model: Any) -> list[dict[str, str]] | None:
        prompts = self.arguments.sample_prompts
        return write_samples(training, model, self.tokenizer, self.encode, prompts)


class Conversations:
    """Conversations, as `finetune.py` reads and evaluates them: the assistant's tokens count."""

    metric = "loss"

    def __init__(self, tokenizer: Any, arguments: Any):
        self.tokenizer = tokenizer
        if added := set_chat_template(tokenizer, arguments):
            raise InputError(
                f"add_tokens: the teacher knows no {added[0]}: add it to the teacher first, with "
                "finetune.py"
            )
        self.data = read_conversations(tokenizer, arguments)
        self.train, self.validation, self.test = self.data.parts
        self.arguments = arguments.for_examples(self.data.mixture.count)
        self.fingerprint = self.data.fingerprint["the training data"]
        self.facts = self.data.facts
        self.has_validation, self.has_test = bool(self.validation), bool(self.test)
        self.cache = None
        if arguments.teacher_cache is not None:
            depends_on = {"tokenizer": self.data.fingerprint["the tokenizer"]}
            self.cache = ConversationCache(self.arguments, depends_on, self.train)

    def steps(self, training: Training, model: Any) -> Data:
        set_ends(model.generation_config, self.tokenizer)
        sampler = None
        if self.arguments.on_policy_share:
            sampler = Sampler(training, model, self.tokenizer, self.train, self.arguments)
        to_batch = self.cache.collate if self.cache else collate
        mixture, fingerprint = self.data.mixture, self.data.fingerprint
        return Epochs(mixture, to_batch, fingerprint, self.arguments, vary=sampler)

    def evaluate(self, training: Training, scores: Scores, split: str) -> Evaluated | None:
        return evaluate_answers(training, getattr(self, split), scores)

    def samples(self, training: Training, model: Any) -> list[dict[str, str]] | None:
        chosen = self.validation[: self.arguments.sample_answers]
        return write_answers(training, model, self.tokenizer, chosen)
