"""Weights from scratch have the spread that `from_config` gives them, whatever the architecture."""

import copy
import os
from types import SimpleNamespace

import pytest
import torch
import transformers

from sweeps.architectures import AUTO_MODELS, KINDS, CannotBuild, model_types, sampled, tiny_model
from utils.model import build_model, initialize_weights

# what was once drawn by the wrong module, or not by the seed alone, or could not be built
EVER_WRONG = {"youtu", "gemma3n_text", "xlstm", "openai-gpt", "switch_transformers", "t5", "gpt2"}
SLOW = set() if "SWEEP" in os.environ else {"dots3_note_text"}  # seconds a model
CASES = [(k, t) for k in KINDS for t in model_types(k) if sampled(t) or t in EVER_WRONG]
CASES = [case for case in CASES if case[1] not in SLOW]


def moments(models: list[torch.nn.Module]) -> dict[str, tuple[float, float, int]]:
    """Name → mean and deviation over all models, and the number of elements."""
    found = {}
    for name, first in models[0].state_dict().items():
        if first.is_floating_point() and first.numel():
            values = torch.stack([model.state_dict()[name].float() for model in models])
            found[name] = float(values.mean()), float(values.std()), values.numel()
    return found


@pytest.mark.parametrize(("kind", "model_type"), CASES)
def test_every_tensor_has_the_deviation_that_from_config_gives(kind, model_type, record):
    try:
        config = tiny_model(kind, model_type).config
        usual = [AUTO_MODELS[kind].from_config(copy.deepcopy(config)) for _ in range(3)]
    except CannotBuild as error:
        return record(kind, model_type, initialisation=f"not built: {error}")
    models = [AUTO_MODELS[kind].from_config(copy.deepcopy(config)) for _ in range(4)]
    for model, seed in zip(models, (0, 0, 1, 2), strict=True):
        initialize_weights(model, seed)
    first, again = (model.state_dict() for model in models[:2])
    assert [name for name, value in first.items() if not torch.equal(value, again[name])] == []
    found, wrong = moments(models[1:]), []
    for name, (mean, deviation, count) in moments(usual).items():
        # a sample's deviation is off by 1 / √count of it, more or less
        tolerance = max(0.15, 5 / count**0.5) * deviation + 1e-6
        if abs(found[name][1] - deviation) > tolerance or (
            abs(found[name][0] - mean) > 8 * deviation / count**0.5 + 1e-6
        ):
            wrong.append(f"{name}: {found[name][:2]} for {(mean, deviation)}")
    assert wrong == []
    record(kind, model_type, initialisation="same")


@pytest.mark.parametrize("kind", ["causal", "masked", "seq2seq"])
def test_a_new_head_is_drawn_and_what_is_given_stays(kind, tmp_path):
    """In a module with both, too: a bias that the given weights lack."""
    model_type = {"causal": "gpt2", "masked": "bert", "seq2seq": "t5"}[kind]
    given = tiny_model(kind, model_type)
    before = {name: value.clone() for name, value in given.state_dict().items()}
    new = [name for name in before if name.endswith((".bias", "lm_head.weight"))][-1:]
    initialize_weights(given, 0, {*new})
    after = given.state_dict()
    same = {id(value) for name, value in given.named_parameters() if name in new}
    tied = {n for n, p in given.named_parameters(remove_duplicate=False) if id(p) in same}
    for name, value in before.items():
        assert torch.equal(after[name], value) or name in tied, name


def arguments(folder=None):
    name = None if folder is None else str(folder)
    return SimpleNamespace(
        model_name_or_path=name,
        attn_implementation=None,
        trust_remote_code=False,
        seed=0,
        initialization="default",
        mup_base_width=None,
    )


@pytest.mark.parametrize("given", [False, True], ids=["from scratch", "given"])
@pytest.mark.parametrize(
    ("kind", "model_type"), [("causal", "llama"), ("masked", "bert"), ("seq2seq", "bart")]
)
def test_a_pad_token_that_begins_documents_is_trained(kind, model_type, given, tmp_path):
    model = tiny_model(kind, model_type, pad_token_id=2, eos_token_id=2, bos_token_id=2)
    assert model.get_input_embeddings().padding_idx == 2
    folder = None
    if given:
        model.save_pretrained(tmp_path)
        folder = tmp_path
    model = build_model(arguments(folder), model.config, AUTO_MODELS[kind])
    tokens = torch.tensor([[2, 5, 6, 7]])
    decoder = {"decoder_input_ids": tokens} if kind == "seq2seq" else {}
    hidden = model.base_model(input_ids=tokens, **decoder)[0]
    (hidden * torch.randn_like(hidden)).sum().backward()
    embeddings = model.get_input_embeddings().weight
    assert embeddings.grad[2].any()
    assert given or embeddings[2].any()


def test_a_pad_token_of_its_own_is_not_trained():
    config = tiny_model("causal", "llama").config
    model = build_model(arguments(), config, transformers.AutoModelForCausalLM)
    assert model.get_input_embeddings().padding_idx == config.pad_token_id == 0
    assert not model.get_input_embeddings().weight[0].any()
