"""Weights by another rule than transformers', and what goes with the width (muP)."""

import copy
import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import coordinate_check
from launching import steps
from recipes.causal_lm.finetune import Arguments as Finetuning
from recipes.causal_lm.pretrain import Arguments
from utils.config import InputError
from utils.initialisation import InitializationArguments, initialize_weights, mup_scales
from utils.optimizer import make_optimizer
from utils.tables import Table

SHAPE = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
MORE = {
    "llama": {"intermediate_size": 128, "tie_word_embeddings": False},
    "gpt2": {"tie_word_embeddings": False},
    "gpt_neox": {"intermediate_size": 128},
    "falcon": {"new_decoder_architecture": False},
    "phi": {"intermediate_size": 128},
    "mixtral": {"intermediate_size": 32, "num_local_experts": 2, "num_key_value_heads": 2},
}


def built(model_type: str = "llama", seed: int = 0, shape: Any = None, **settings: Any) -> Any:
    config = AutoConfig.for_model(model_type, **SHAPE | MORE.get(model_type, {}) | (shape or {}))
    model = AutoModelForCausalLM.from_config(config)
    initialize_weights(model, seed, settings=InitializationArguments(**settings))
    return model


def changed(model: Any, usual: Any) -> dict[str, torch.Tensor]:
    """What is not as it is drawn by default."""
    pairs = zip(model.named_parameters(), usual.parameters(), strict=True)
    return {name: p.detach() for (name, p), other in pairs if not torch.equal(p, other)}


@pytest.mark.parametrize("model_type", MORE)
def test_depth_scaled_weights_are_all_that_writes_into_the_residual_stream(model_type):
    usual = built(model_type)
    model = built(model_type, initialization="depth_scaled")
    scaled = changed(model, usual)
    assert len(scaled) == 2 * SHAPE["num_hidden_layers"]
    for weight in scaled.values():
        assert float(weight.std()) == pytest.approx(0.02 / math.sqrt(2 * 3), rel=0.05)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in scaled or name.removesuffix("bias") + "weight" in scaled:
                parameter.zero_()
        states = model(torch.arange(12)[None], output_hidden_states=True).hidden_states
    assert states[0].any()
    for state in states[1:-1]:  # the last is normalised
        assert torch.equal(state, states[0])


def test_an_architecture_whose_residual_projections_are_not_known_is_refused():
    config = AutoConfig.for_model("mamba", vocab_size=96, hidden_size=32, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config)
    message = "mamba into the residual stream are not known by name: 0 of attention and 2 of MLPs"
    with pytest.raises(InputError, match=message):
        initialize_weights(model, 0, settings=InitializationArguments("depth_scaled"))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_xavier_weights_are_uniform_within_the_bound_of_both_sizes(model_type):
    usual, model = built(model_type), built(model_type, initialization="xavier")
    drawn = changed(model, usual)
    names = ("embed_tokens", "wte", "wpe")
    embeddings = {n for n, _ in usual.named_parameters() if n.split(".")[-2] in names}
    arrays = {name for name, p in usual.named_parameters() if p.dim() == 2}
    assert drawn.keys() == arrays - embeddings
    for weight in drawn.values():
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.99 * bound < float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_what_is_neither_a_linear_layer_nor_an_embedding_is_refused():
    for settings in ({"initialization": "xavier"}, {"mup_base_width": 16}):
        message = f"{next(iter(settings))}.*mlp.experts.down_proj of mixtral is neither a linear"
        with pytest.raises(InputError, match=message):
            built("mixtral", **settings)


@pytest.mark.parametrize("initialization", ["default", "depth_scaled"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_mup_multiplies_what_is_drawn_and_at_its_base_by_one(model_type, initialization):
    usual = built(model_type, initialization=initialization)
    assert changed(built(model_type, initialization=initialization, mup_base_width=64), usual) == {}
    model = built(model_type, initialization=initialization, mup_base_width=16)
    plain = dict(usual.named_parameters())
    arrays = {name for name, p in plain.items() if p.dim() == 2}
    hidden = {name for name in arrays if ".layers." in name or ".h." in name}
    assert changed(model, usual).keys() == hidden | {"lm_head.weight"}
    for name in hidden:
        assert torch.equal(model.get_parameter(name), plain[name] * 0.5), name
    assert torch.equal(model.lm_head.weight, plain["lm_head.weight"] * 0.25)


def test_mup_knows_the_output_layer_of_as_many_words_as_the_model_is_wide():
    scales = mup_scales(built(shape={"vocab_size": 64}), 16)
    assert scales["lm_head.weight"] == (0.25, 0.25)
    assert scales["model.layers.0.self_attn.o_proj.weight"] == (0.5, 0.25)


def test_mup_groups_know_their_rate_and_decay_as_at_the_base():
    model = built(mup_base_width=16)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, Arguments(mup_base_width=16, weight_decay=0.3)).param_groups
    found = [(g["lr_ratio"], g["weight_decay"], {names[p] for p in g["params"]}) for g in groups]
    (fast, decay, matrices), (*rest, embeddings), (*last, vectors) = found
    assert (fast, decay) == (0.25, pytest.approx(1.2))
    assert matrices == {name for name in names.values() if "proj" in name or "head" in name}
    assert (rest, embeddings) == ([1.0, 0.3], {"model.embed_tokens.weight"})
    assert last == [1.0, 0.0]
    assert all("norm" in name for name in vectors)


def test_mup_is_table_8_without_its_multiplier_of_the_logits():
    """Which has the output matrix drawn and learning as at the base, and the logits divided by the
    times that the model is wider: in float64, with an epsilon that is none."""
    ours = built(mup_base_width=16).double()
    theirs = copy.deepcopy(ours)
    with torch.no_grad():
        theirs.lm_head.weight.mul_(4)
    theirs.lm_head.register_forward_hook(lambda _, __, logits: logits / 4)
    arguments = Arguments(mup_base_width=16, weight_decay=0.1, adam_epsilon=1e-30)
    optimizers = [make_optimizer(model, arguments) for model in (ours, theirs)]
    head = theirs.lm_head.weight
    for group in optimizers[1].param_groups:
        group["params"] = [p for p in group["params"] if p is not head]
    more = {"params": [head], "weight_decay": 0.1, "lr_ratio": 1.0, "l1_decay": 0.0}
    optimizers[1].add_param_group(more)
    tokens = torch.randint(96, (4, 12))
    losses = []
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * group["lr_ratio"]
        losses.append([])
        for _ in range(4):
            logits = model(tokens).logits[:, :-1].flatten(0, 1)
            loss = cross_entropy(logits, tokens[:, 1:].flatten())
            losses[-1].append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0] - 0.1


def test_with_mup_activations_are_of_one_size_at_all_widths(monkeypatch):
    def counting(count: int, seed: int) -> Any:
        draw = torch.Generator().manual_seed(seed)
        for _ in range(count):
            starts, strides = (torch.randint(1, 9, (4, 1), generator=draw) for _ in range(2))
            yield (starts + strides * torch.arange(32)) % 256

    monkeypatch.setattr(coordinate_check, "batches", counting)
    monkeypatch.setattr(coordinate_check, "RANGE", 0.02)  # after ten steps it has no say any more
    spreads = {}
    for base_width in (64, None):
        runs = [coordinate_check.coordinates(w, base_width, 10, 2**-8, 1) for w in (64, 128, 256)]
        for name in ("embedding", "block 1", "block 2", "logits"):
            values = [run[name] for run in runs]
            spreads.setdefault(name, []).append(max(values) / min(values))
    assert all(flat < 1.3 for flat, _ in spreads.values()), spreads
    assert all(steep > 1.8 for name, (_, steep) in spreads.items() if name != "embedding"), spreads


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mup_base_width": 0}, "mup_base_width must be at least 1, not 0"),
        (
            {"mup_base_width": 16, "initialization": "xavier"},
            "mup_base_width: xavier goes with the width in its own way",
        ),
        (
            {"mup_base_width": 16, "model_name_or_path": "a/b"},
            "mup_base_width: is of models from scratch: the weights are given",
        ),
        (
            {"initialization": "xavier", "model_name_or_path": "a/b"},
            "initialization: is of models from scratch",
        ),
        (
            {"mup_base_width": 16, "optim": "sgd"},
            "mup_base_width: its learning rates are Adam's, not those of sgd",
        ),
        ({"mup_base_width": 16, "l1_decay": 0.1}, "mup_base_width: how L1 goes with the width"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Arguments(tokenizer="t", max_steps=1, train_sources=[], **settings).check()


@pytest.mark.parametrize(
    ("model_type", "shape", "message"),
    [
        ("gpt2", {"tie_word_embeddings": True}, "gpt2 ties its output layer .* set model.tie_word"),
        ("gemma", {"tie_word_embeddings": False, "head_dim": 16}, "gemma are of another width"),
        ("opt", {"tie_word_embeddings": False}, "opt has no initializer_range"),
        ("ctrl", {"tie_word_embeddings": False}, "ctrl are of another width .* or scaled by it"),
        (
            "big_bird",
            {"tie_word_embeddings": False, "rescale_embeddings": True, "is_decoder": True},
            "big_bird are of another width .* or scaled by it",
        ),
        (
            "pegasus",
            {"tie_word_embeddings": False, "scale_embedding": True},
            "pegasus are of another width .* or scaled by it",
        ),
    ],
)
def test_mup_of_an_architecture_that_it_does_not_fit_is_refused(model_type, shape, message):
    with pytest.raises(InputError, match=message):
        built(model_type, shape=shape, mup_base_width=16)


def test_an_adapter_has_no_width():
    arguments = Finetuning(
        tokenizer="t", train_data=[Table("a.jsonl")], lora={"r": 4}, mup_base_width=16
    )
    with pytest.raises(InputError, match="mup_base_width: an adapter has no width"):
        arguments.check()


def test_a_run_keeps_its_width_and_leaves_a_plain_model(pretrain):
    settings = {"mup_base_width": 16, "initialization": "depth_scaled", "save_steps": 2}
    ended = pretrain(max_steps=2, **settings)
    assert ended.status == 0, ended.error
    plain = pretrain("plain", max_steps=2, save_steps=2)
    assert steps(ended.folder)[0]["loss"] != steps(plain.folder)[0]["loss"]
    exported, usual = ((e.folder / "model/config.json").read_text() for e in (ended, plain))
    assert exported == usual
    again = pretrain(max_steps=3, **settings | {"mup_base_width": 8})
    assert (again.status, "mup_base_width was 16 and is 8" in again.error) == (2, True)
