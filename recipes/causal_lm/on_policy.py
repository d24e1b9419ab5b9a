"""Answers that the student itself writes, for the teacher to judge (Agarwal et al. 2024, GKD).

What is sampled is a function of the weights and of (seed, time, example): not of the batch that an
example is sampled with, of the number of processes, or of what ran before.
"""

from typing import Any

import numpy as np
import torch
import transformers

from chat_rendering import turn_ends
from utils.loss import IGNORE_INDEX
from utils.program import warn
from utils.randomness import Draws, random_key
from utils.scoring import score_examples
from utils.training import Training


class Sampler:
    """(indices, how often each was seen before) → the examples of a step; in a share of the steps
    with sampled answers.

    The last answer of each conversation is written anew, after the turns before it as they are,
    where there is room for one. No gradient goes through what is drawn.

    Args:
        arguments: with `on_policy_share`, `on_policy_tokens` and `on_policy_temperature`.
    """

    def __init__(
        self,
        training: Training,
        model: "transformers.PreTrainedModel",
        tokenizer: Any,
        examples: list[dict[str, Any]],
        arguments: Any,
    ):
        self.training, self.model, self.arguments = training, model, arguments
        self.examples = examples
        room = arguments.sequence_length - arguments.on_policy_tokens
        self.starts = [_last_answer(example) for example in examples]
        self.has_room = [start <= room for start in self.starts]
        if without := self.has_room.count(False):
            warn(
                f"on_policy_tokens: {without:,} of {len(examples):,} conversations leave no room "
                f"for {arguments.on_policy_tokens} in sequence_length: their answers stay"
            )
        self.ends = turn_ends(tokenizer)
        self.padding = next(t for t in (tokenizer.pad_token_id, *self.ends) if t is not None)

    def __call__(self, indices: list[int], seen: list[int]) -> list[dict[str, Any]]:
        a, given = self.arguments, [self.examples[index] for index in indices]
        is_sampled = Draws(a.seed, "on policy", seen[0], *indices).chance(a.on_policy_share)
        if not is_sampled:
            return given
        prompts = [self.examples[i]["input_ids"][: self.starts[i]] for i in indices]
        each = zip(seen, indices, strict=True)
        keys = [random_key(a.seed, "answer", times, index) for times, index in each]
        written = [i for i, index in enumerate(indices) if self.has_room[index]]
        order = sorted(written, key=lambda i: (-len(prompts[i]), i))
        size = a.per_device_batch_size
        groups = [order[start : start + size] for start in range(0, len(order), size)]

        def write(group: list[int]) -> list[np.ndarray]:
            # a rank without prompts writes along, as ZeRO-3 wants it
            rows = [prompts[i] for i in group] or [np.zeros(1, np.int32)]
            return self._write(rows, [keys[i] for i in group] or [0])

        answers = score_examples(self.training, prompts, write, "sampling answers", groups)
        if answers is None:  # the run is stopped, and this step is not trained on
            return given
        examples = list(given)
        for i, answer in zip(sorted(written), answers, strict=True):
            examples[i] = _answered(given[i], prompts[i], answer)
        return examples

    def _write(self, prompts: list[np.ndarray], keys: list[int]) -> list[np.ndarray]:
        """The tokens after each prompt, the end of the turn included where it was reached."""
        a, longest = self.arguments, max(map(len, prompts))
        device = self.training.accelerator.device
        tokens = torch.full((len(prompts), longest), self.padding)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.as_tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        # what is likeliest after this is a draw from what the model gives
        draws = KeyedDraws(keys, a.on_policy_temperature, device)
        with self.training.engine.whole_root():
            written = self.model.generate(
                tokens.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=a.on_policy_tokens,
                do_sample=False,
                logits_processor=transformers.LogitsProcessorList([draws]),
                eos_token_id=self.ends,
                pad_token_id=self.padding,
                synced_gpus=self.training.ranks.world_size > 1,
            )
        return [_until_end(row[longest:].cpu().numpy(), self.ends) for row in written]


class KeyedDraws(transformers.LogitsProcessor):
    """Adds Gumbel noise, of a generator of its own for each row: the largest sum is a draw from the
    softmax of logits / temperature (Gumbel 1954, lecture 2; Maddison et al. 2014)."""

    def __init__(self, keys: list[int], temperature: float, device: torch.device):
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(key) for key in keys]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self.temperature - noise.log_()


def _last_answer(example: dict[str, Any]) -> int:
    """Where the last stretch of targets begins: of what is before it the model is asked."""
    targets = np.flatnonzero(example["shift_labels"] != IGNORE_INDEX)
    gaps = np.flatnonzero(np.diff(targets) > 1)
    return int(targets[gaps[-1] + 1 if len(gaps) else 0]) + 1


def _until_end(tokens: np.ndarray, ends: list[int]) -> np.ndarray:
    found = np.flatnonzero(np.isin(tokens, ends))
    return tokens[: found[0] + 1] if len(found) else tokens


def _answered(example: dict[str, Any], prompt: np.ndarray, answer: np.ndarray) -> dict[str, Any]:
    """The example with another last answer; nothing else of it is a target."""
    ids = np.concatenate([prompt, answer]).astype(np.int32)
    labels = np.full(len(ids), IGNORE_INDEX, np.int32)
    labels[len(prompt) - 1 : -1] = answer
    return {**example, "input_ids": ids, "shift_labels": labels}
