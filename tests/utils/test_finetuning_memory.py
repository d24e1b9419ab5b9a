"""What fine-tuning needs, beside what real models hold."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from utils.adapters import AdapterArguments, add_adapter, freeze
from utils.finetuning_memory import finetuning_bytes, parameter_parts
from utils.optimizer import adamw
from utils.training_arguments import TrainingArguments

CONFIG = LlamaConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=1000,
)


@pytest.mark.parametrize(
    "settings",
    [{}, {"freeze": 1}, {"lora": {"r": 8}}, {"lora": {"r": 8, "use_dora": True}}],
    ids=str,
)
def test_the_parts_are_those_of_the_real_model(settings):
    arguments = AdapterArguments(**settings)
    model = LlamaForCausalLM(CONFIG)
    freeze(model, arguments.freeze)
    if arguments.lora:
        model = add_adapter(model, arguments, "CAUSAL_LM", 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    parts = parameter_parts(CONFIG, arguments)
    assert (parts["trained"], parts["frozen"]) == (trained, total - trained)


def test_4_bit_weights_take_what_is_said(tmp_path):
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=torch.bfloat16
    )
    held = 0
    for parameter in model.parameters():
        held += parameter.numel() * parameter.element_size()
        if state := getattr(parameter, "quant_state", None):
            held += state.absmax.numel() + state.state2.absmax.numel() * 4
    parts = parameter_parts(CONFIG, AdapterArguments(lora={"r": 8}))
    assert parts["quantizable"] == 2 * (4 * 256 * 256 + 3 * 256 * 512)
    said = finetuning_bytes(parts, 0, 1, "bf16", half_frozen=True, load_in_4bit=True)
    assert said["frozen"] == pytest.approx(held, rel=1e-3)


def test_8_bit_moments_take_what_is_said():
    model = LlamaForCausalLM(CONFIG)
    optimizer = adamw(model, TrainingArguments(), "adamw_bnb_8bit")
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    held = sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if name.startswith(("state", "absmax"))
    )
    parts = parameter_parts(CONFIG, AdapterArguments())
    assert parts["embeddings"] == 1000 * 256
    said = finetuning_bytes(parts, 0, 1, "bf16", half_frozen=False, optim="adamw_bnb_8bit")
    # the moments of norms, which are small, are kept in 32 bits
    assert said["optimizer"] == pytest.approx(held, rel=0.005)


def test_bytes_of_stages():
    parts = {"trained": 1000, "embeddings": 0, "frozen": 9000, "quantizable": 0}
    assert finetuning_bytes(parts, 0, 8, "bf16", half_frozen=True) == {
        "frozen": 18000,
        "weights": 4000,
        "gradients": 4000,
        "optimizer": 8000,
    }
    assert finetuning_bytes(parts, 3, 8, "bf16", half_frozen=False) == {
        "frozen": 2250,
        "weights": 250,
        "gradients": 250,
        "optimizer": 1500,
    }
    assert finetuning_bytes(parts, 0, 1, "no", half_frozen=True)["frozen"] == 36000
