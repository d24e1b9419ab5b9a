"""The tiny models themselves: that there are any."""

import pytest

from sweeps.architectures import CannotBuild, model_types, sampled, tiny_config, tiny_model


@pytest.mark.parametrize("kind", ["causal", "masked", "seq2seq", "classification"])
def test_most_types_of_the_sample_have_a_tiny_model(kind):
    types = [name for name in model_types(kind) if sampled(name)]
    built = []
    for name in types:
        try:
            model = tiny_model(kind, name)
        except CannotBuild:
            continue
        built.append(name)
        assert sum(parameter.numel() for parameter in model.parameters()) < 5e7
    assert len(built) >= 0.8 * len(types) > 1


def test_a_tiny_config_keeps_what_makes_the_type():
    gemma = tiny_config("gemma3_text")
    assert {*gemma.layer_types} == {"sliding_attention", "full_attention"}
    assert gemma.num_hidden_layers == len(gemma.layer_types)
    mixtral = tiny_config("mixtral", num_local_experts=3)
    assert (mixtral.num_local_experts, mixtral.num_experts_per_tok) == (3, 2)
    assert (mixtral.num_attention_heads, mixtral.num_key_value_heads) == (4, 2)
    with pytest.raises(CannotBuild, match="KeyError: 'no_such_type'"):
        tiny_config("no_such_type")
