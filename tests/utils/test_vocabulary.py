"""A tokenizer under which the ids mean other tokens to a given model than they have meant."""

from dataclasses import dataclass

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from utils.arguments import FinetuningArguments
from utils.config import InputError
from utils.model import ModelArguments, load_tokenizer, model_config
from utils.tables import Table


@dataclass
class Arguments(FinetuningArguments, ModelArguments):
    pass


def make_tokenizer(words, **special):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture
def config_of(tmp_path):
    """config_of(tokenizer, own=True): of a given model whose tokenizer knows ["<s>", "a", …]."""

    def make(tokenizer, own=True):
        given, other = tmp_path / "given", tmp_path / "other"
        size = {"n_embd": 4, "n_layer": 1, "n_head": 1, "vocab_size": 8}
        GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(given)
        if own:
            words = ["<s>", "a", "b", "[unused0]", "<kept>"]
            mine = make_tokenizer(words, bos_token="<s>", additional_special_tokens=["<kept>"])
            mine.save_pretrained(given)
        tokenizer.save_pretrained(other)
        arguments = Arguments(
            model_name_or_path=str(given), tokenizer=str(other), train_data=[Table("x.csv")]
        )
        return model_config(arguments, load_tokenizer(arguments))

    return make


def test_other_tokens_under_the_same_ids_are_refused(config_of, tmp_path):
    with pytest.raises(InputError) as error:
        config_of(make_tokenizer(["<s>", "b", "a"]))
    assert str(error.value) == (
        f"tokenizer: {tmp_path / 'other'} is not that of {tmp_path / 'given'}: its token 1 is 'b', "
        "there it is 'a': leave tokenizer out"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["<s>", "a", "b", "[unused0]", "<kept>"],
        ["<s>", "a", "b", "mine", "<mine>"],  # an unused and a special one have got names
        ["<s>", "a", "b", "[unused0]", "<kept>", "new", "newer"],
        ["<s>", "a"],
    ],
    ids=" ".join,
)
def test_names_of_what_was_unused_and_more_tokens_are_not(words, config_of):
    assert config_of(make_tokenizer(words)).vocab_size == 8


def test_a_model_without_a_tokenizer_takes_any(config_of, tmp_path):
    assert config_of(make_tokenizer(["x", "y"]), own=False).vocab_size == 8
    assert len(AutoTokenizer.from_pretrained(tmp_path / "given")) < 3  # transformers' own idea
