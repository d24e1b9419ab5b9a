"""What every stream asks of a tokenizer."""

import copy
import hashlib
from typing import Any

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from utils.config import InputError


class TextEncoder:
    """Texts → encodings, in batches. Special tokens that stand in a text are read as plain text.

    Raises:
        InputError: the tokenizer is not a fast one, or has none of a special token that is needed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *needed: str, purpose: str):
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise InputError(f"{tokenizer.name_or_path}: streaming needs a fast tokenizer")
        for name in needed:
            if getattr(tokenizer, name) is None:
                raise InputError(
                    f"tokenizer: {tokenizer.name_or_path} has no {name}, which {purpose} needs"
                )
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.backend.encode_special_tokens = True  # which is not pickled with it

    def encode(self, texts: list[str]) -> list[Encoding]:
        return self.backend.encode_batch_fast(texts, add_special_tokens=False)

    def fingerprint(self) -> str:
        """Of all that the ids depend on."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]
