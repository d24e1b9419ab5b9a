"""What training needs, beside what real models hold and what torch counts."""

import re
from functools import partial
from typing import get_args, get_type_hints

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BitsAndBytesConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    T5Config,
)

from finetuning_plan import parameter_parts
from launching import ROOT
from masked_loss import MaskedLoss
from recipes.causal_lm.pretrain import NextTokenLoss
from utils.adapters import AdapterArguments, add_adapter, freeze
from utils.arguments import TrainingArguments
from utils.config import InputError
from utils.engine import enable_checkpointing
from utils.loss import IGNORE_INDEX
from utils.memory import OPTIMIZER_BYTES, LiveBytes, activations, parameter_count, state_bytes
from utils.model import empty_model
from utils.optimizer import make_optimizer

LLAMA_2_7B = LlamaConfig()  # the defaults are Llama-2-7B's shape
SEVEN_BILLION = 6_738_415_616
GIB = 2**30


def test_parameters_of_llama_2_7b():
    embedding = 32_000 * 4096
    assert parameter_count(LLAMA_2_7B) == {
        "total": SEVEN_BILLION,
        "embeddings": embedding,
        "without_input_embeddings": SEVEN_BILLION - embedding,
        "head": embedding,
        "pair_head": 0,
        "computed_again": 0,
    }


def test_parameters_of_gpt2():
    # GPT-2 ties its token embeddings to the output projection; its 1,024 positions are looked up
    assert parameter_count(GPT2Config()) == {
        "total": 124_439_808,
        "embeddings": (50257 + 1024) * 768,
        "without_input_embeddings": 124_439_808 - 1024 * 768,
        "head": 50257 * 768,
        "pair_head": 0,
        "computed_again": 0,
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config, GemmaConfig])
def test_parameters_equal_those_of_the_real_model(config_class, tied):
    config = config_class(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    before = config.to_dict()
    counts = parameter_count(config)
    assert config.to_dict() == before
    model = AutoModelForCausalLM.from_config(config)
    assert counts["total"] == model.num_parameters()
    # the tied matrix is also the output projection, which multiplies
    looked_up = 0 if tied else 96 * 16
    assert counts["without_input_embeddings"] == counts["total"] - looked_up


def test_no_causal_language_model_is_said():
    with pytest.raises(InputError, match="no model for CausalLM of type 't5'"):
        parameter_count(T5Config())


@pytest.mark.parametrize(
    ("layout", "world_size", "precision", "weights", "gradients", "optimizer"),
    [
        ("DDP", 64, "bf16", 4, 4, 8),
        ("DDP", 64, "no", 4, 4, 8),
        ("ZeRO-1", 64, "bf16", 2, 2, 12 / 64),
        ("ZeRO-2", 64, "fp16", 2, 2 / 64, 12 / 64),
        ("ZeRO-3", 64, "bf16", 2 / 64, 2 / 64, 12 / 64),
        ("FSDP2", 64, "bf16", 4 / 64, 4 / 64, 8 / 64),
        ("ZeRO-3", 1, "bf16", 2, 2, 12),
        ("ZeRO-2", 8, "no", 4, 4 / 8, 12 / 8),
    ],
)
def test_bytes_a_parameter(layout, world_size, precision, weights, gradients, optimizer):
    parameters = 64 * 10**6
    assert state_bytes({"trained": parameters}, layout, world_size, precision) == {
        "weights": weights * parameters,
        "gradients": gradients * parameters,
        "optimizer": optimizer * parameters,
    }


def test_llama_2_7b_under_zero_3_on_64_gpus():
    state = state_bytes({"trained": SEVEN_BILLION}, "ZeRO-3", 64, "bf16")
    assert state == {
        "weights": 210_575_488,
        "gradients": 210_575_488,
        "optimizer": 1_263_452_928,
    }
    assert round(sum(state.values()) / GIB, 2) == 1.57


def test_offload_leaves_the_gpu_what_the_offload_configs_leave_it():
    zero2 = state_bytes({"trained": 1000}, "ZeRO-2", 2, "bf16", offload=True)
    assert zero2 == {"weights": 2000, "gradients": 0, "optimizer": 0}
    zero3 = state_bytes({"trained": 1000}, "ZeRO-3", 2, "bf16", offload=True)
    assert zero3 == {"weights": 0, "gradients": 0, "optimizer": 0}


def test_a_remainder_is_rounded_up():
    assert state_bytes({"trained": 3}, "ZeRO-3", 4, "bf16") == {
        "weights": 2,
        "gradients": 2,
        "optimizer": 9,
    }


@pytest.mark.parametrize(("layout", "precision"), [("ZeRO-4", "bf16"), ("ZeRO-2", "fp8")])
def test_unknown_settings_are_refused(layout, precision):
    with pytest.raises(ValueError, match="no such setting"):
        state_bytes({"trained": 1000}, layout, 1, precision)


def test_the_sizes_of_the_launch_table_leave_a_third_of_80_gb_free():
    readme = (ROOT / "accelerate_configs/README.md").read_text()
    sizes = dict(re.findall(r"^\| `(\w+)\.yaml` .*\| up to (\d+)B", readme, re.M))
    stages = {"single_gpu": ("DDP", 1), "multi_gpu": ("DDP", 8)}
    stages |= {f"zero{n}": (f"ZeRO-{n}", 8) for n in (1, 2, 3)}
    assert set(sizes) == set(stages)
    for name, (stage, world_size) in stages.items():

        def needed(billions: int, stage=stage, world_size=world_size) -> float:
            return sum(
                state_bytes({"trained": billions * 10**9}, stage, world_size, "bf16").values()
            )

        largest = int(sizes[name])
        assert needed(largest) <= 80e9 * 2 / 3 < needed(largest + 1), name


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
    said = state_bytes(parts, "DDP", 1, "bf16", half_frozen=True, load_in_4bit=True)
    assert said["frozen"] == pytest.approx(held, rel=1e-3)


def test_8_bit_moments_take_what_is_said():
    model = LlamaForCausalLM(CONFIG)
    optimizer = make_optimizer(model, TrainingArguments(optim="adamw_bnb_8bit"))
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
    said = state_bytes(parts, "DDP", 1, "bf16", half_frozen=False, optim="adamw_bnb_8bit")
    # the moments of norms, which are small, are kept in 32 bits
    assert said["optimizer"] == pytest.approx(held, rel=0.005)


def test_bytes_of_stages():
    parts = {"trained": 1000, "embeddings": 0, "frozen": 9000, "quantizable": 0}
    assert state_bytes(parts, "DDP", 8, "bf16", half_frozen=True) == {
        "frozen": 18000,
        "weights": 4000,
        "gradients": 4000,
        "optimizer": 8000,
    }
    assert state_bytes(parts, "ZeRO-3", 8, "bf16", half_frozen=False) == {
        "frozen": 2250,
        "weights": 250,
        "gradients": 250,
        "optimizer": 1500,
    }
    assert state_bytes(parts, "DDP", 1, "no", half_frozen=True)["frozen"] == 36000


def test_live_bytes_are_counted_until_nothing_holds_them():
    given = torch.zeros(1000)
    with LiveBytes([given]) as live:
        assert live.now == live.peak == 4000
        first = given + 1
        view = first[:10]
        assert live.now == 8000
        first = given.double()
        assert live.now == 16_000  # the view holds what it was taken of
        del view
        first.add_(1)
        assert (live.now, live.peak) == (12_000, 16_000)


SHAPE = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GQA = {"num_key_value_heads": 2, "intermediate_size": 176}
# a CPU's attention holds the scores where it has dropout; a GPU's does not
MODELS = {
    "llama": LlamaConfig(**SHAPE | {"num_hidden_layers": 9}, intermediate_size=176),
    "gpt2": GPT2Config(vocab_size=1000, n_embd=64, n_layer=3, n_head=4, attn_pdrop=0.0),
    "qwen3": Qwen3Config(**SHAPE, **GQA, head_dim=32),
    "gemma": GemmaConfig(**SHAPE, **GQA, head_dim=16),
    "bert": BertConfig(**SHAPE, intermediate_size=256, attention_probs_dropout_prob=0.0),
}


def batch_of(kind: str, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Two documents a row; of an encoder a quarter of the tokens is predicted."""
    tokens = torch.full((rows, length), 7)
    places = torch.arange(length).expand(rows, length) % (length // 2)
    batch = {"input_ids": tokens, "position_ids": places}
    if kind != "bert":
        return batch | {"shift_labels": tokens.clone()}
    labels = torch.where(torch.arange(length) % 4 == 0, tokens, IGNORE_INDEX)
    batch |= {"labels": labels, "pair_labels": torch.full_like(tokens, IGNORE_INDEX)}
    numbers = 1 + (torch.arange(length) >= length // 2).long().expand(rows, length)
    return batch | {"token_type_ids": 0 * tokens, "sequence_ids": numbers}


def counted(kind: str, rows: int, length: int, precision: str, checkpointing: bool) -> int:
    """The peak of a real step of two micro-batches, optimizer included."""
    auto_model = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    model = auto_model.from_config(MODELS[kind])
    if checkpointing:
        enable_checkpointing(model)
    is_bert = kind == "bert"
    objective = MaskedLoss(model, "mlm", packing=True) if is_bert else NextTokenLoss(model)
    optimizer, batch = make_optimizer(model, TrainingArguments()), batch_of(kind, rows, length)

    def step() -> None:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = sum(objective(**batch).values())
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # moments are made in the first
    moments = (x for state in optimizer.state.values() for x in state.values())
    with LiveBytes([*model.parameters(), *model.buffers(), *moments]) as live:
        step()
    return live.peak


@pytest.mark.parametrize(
    ("kind", "rows", "length", "precision"),
    [(kind, 2, 128, "no") for kind in MODELS]
    + [("llama", 8, 64, "bf16"), ("gpt2", 1, 512, "bf16"), ("bert", 5, 64, "bf16")],
)
def test_the_memory_of_a_step_is_what_is_said(kind, rows, length, precision):
    auto_model = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    build = partial(empty_model, auto_model=auto_model)
    counts = parameter_count(MODELS[kind], auto_model)
    state = sum(state_bytes({"trained": counts["total"]}, "DDP", 1, precision).values())
    held = activations(build, MODELS[kind], length, precision, kind != "bert", predicted=0.25)
    for way in ("eager", "checkpointed"):
        found = counted(kind, rows, length, precision, way == "checkpointed")
        said = held[way, False].of(rows)
        assert state + said == pytest.approx(found, rel=0.1), way
        # and that is not for the state's sake
        assert said == pytest.approx(found - state, rel=0.2), way


def test_the_state_of_every_optimizer_is_known():
    hint = get_type_hints(TrainingArguments)["optim"]
    assert set(OPTIMIZER_BYTES) == set(get_args(hint))
    parts = {"trained": 1000, "embeddings": 100}
    state = state_bytes(parts, "DDP", 1, "bf16", optim="adamw_bf16")
    assert state == {"weights": 2000, "gradients": 4000, "optimizer": 4000}
    state = state_bytes(parts, "DDP", 1, "bf16", optim="muon")
    assert state == {"weights": 4000, "gradients": 4000, "optimizer": 900 * 4 + 100 * 8}
    state = state_bytes(parts, "ZeRO-3", 4, "bf16", optim="lion_32bit")
    assert state == {"weights": 500, "gradients": 500, "optimizer": 2000}


def test_dropout_of_scores_takes_nothing():
    """A GPU's kernels hold nothing for it, nor do they where layers are computed again."""
    held = [
        activations(
            partial(empty_model, auto_model=AutoModelForMaskedLM),
            BertConfig(**SHAPE, intermediate_size=256, attention_probs_dropout_prob=dropout),
            64,
            "no",
            is_causal=False,
        )
        for dropout in (0.0, 0.1)
    ]
    assert held[0] == held[1]
