"""What training needs, beside what real models hold and what torch counts."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    BertConfig,
    BertForPreTraining,
    BitsAndBytesConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    T5Config,
)

from finetuning_plan import parameter_parts
from launching import CAUSAL_LM, ROOT, run
from masked_loss import MaskedLoss
from utils.adapters import AdapterArguments, add_adapter, freeze
from utils.arguments import TrainingArguments
from utils.config import InputError
from utils.loss import IGNORE_INDEX
from utils.memory import flops_per_token, memory_table, parameter_count, plan, state_bytes
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


def test_parameters_and_flops_of_bert_base():
    counts = parameter_count(BertConfig(), AutoModelForPreTraining)
    looked_up = (512 + 2) * 768  # positions and types; the tied token embeddings multiply
    assert counts["total"] == BertForPreTraining(BertConfig()).num_parameters() == 110_106_428
    assert counts["without_input_embeddings"] == counts["total"] - looked_up
    square = 768 * 768 + 768
    assert counts["head"] == square + 2 * 768 + 30_522 * 768 + 30_522
    assert counts["pair_head"] == square + 2 * 768 + 2
    encoder = counts["without_input_embeddings"] - counts["head"] - counts["pair_head"]
    flops = flops_per_token(BertConfig(), 512, AutoModelForPreTraining, predicted=0.15)
    parameters = encoder + 0.15 * counts["head"] + counts["pair_head"] / 512
    assert flops == 6 * round(parameters) + 12 * 12 * 768 * 512


def test_layers_that_share_their_weights_compute_as_often_as_they_are_used():
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    shape |= {"num_hidden_layers": 12, "vocab_size": 64, "embedding_size": 768}
    flops = [
        flops_per_token(AlbertConfig(**shape, num_hidden_groups=groups), 128, AutoModelForMaskedLM)
        for groups in (1, 12)
    ]
    assert flops[0] == flops[1]


def test_no_causal_language_model_is_said():
    with pytest.raises(InputError, match="no model for CausalLM of type 't5'"):
        parameter_count(T5Config())


def test_flops_per_token():
    layers, hidden, length = 32, 4096, 4096
    parameters = SEVEN_BILLION - 32_000 * 4096
    expected = 6 * parameters + 12 * layers * hidden * length
    assert flops_per_token(LLAMA_2_7B, length) == expected == 46_086_512_640
    # a tied output projection costs its 6 FLOPs a parameter as an untied one does
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    tied = LlamaConfig(**shape, tie_word_embeddings=True)
    untied = LlamaConfig(**shape, tie_word_embeddings=False)
    assert flops_per_token(tied, 128) == flops_per_token(untied, 128)


def test_flops_of_the_matrix_products_are_those_that_torch_counts():
    """Forward and backward by torch's own counter, for a model of matrices and attention."""
    config = GPT2Config(
        vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=32, attn_implementation="eager"
    )
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.zeros(1, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.sum().backward()
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # no matrix products
    assert counter.get_total_flops() == 32 * (flops_per_token(config, 32) - 6 * vectors)


@pytest.mark.parametrize("model_type", ["bert", "albert", "roberta"])
def test_flops_of_an_encoder_are_those_of_the_recipe(model_type):
    """A quarter of the tokens predicted, and a pair in each row."""
    rows, length = 2, 32
    objective = {"bert": "mlm_nsp", "albert": "mlm_sop", "roberta": "mlm"}[model_type]
    auto_model = AutoModelForMaskedLM if objective == "mlm" else AutoModelForPreTraining
    config = AutoConfig.for_model(
        model_type,
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        **{"embedding_size": 128} if model_type == "albert" else {},
    )
    model = auto_model.from_config(config, attn_implementation="eager")
    tokens = torch.full((rows, length), 7)
    batch = {"input_ids": tokens, "labels": tokens.clone(), "pair_labels": tokens.clone()}
    batch["labels"][:, 8:] = batch["pair_labels"][:] = IGNORE_INDEX
    batch["pair_labels"][:, 0] = 1
    batch |= {"token_type_ids": 0 * tokens, "sequence_ids": 0 * tokens + 1}
    batch["position_ids"] = torch.arange(length).expand(rows, length)
    with FlopCounterMode(display=False) as counter:
        sum(MaskedLoss(model, objective, packing=False)(**batch).values()).backward()
    expected = flops_per_token(config, length, auto_model, predicted=8 / length)
    # vectors are counted, though they are in no matrix product: 0.5% here
    assert counter.get_total_flops() == pytest.approx(rows * length * expected, rel=0.01)


@pytest.mark.parametrize(
    ("stage", "world_size", "precision", "weights", "gradients", "optimizer"),
    [
        (0, 64, "bf16", 4, 4, 8),
        (0, 64, "no", 4, 4, 8),
        (1, 64, "bf16", 2, 2, 12 / 64),
        (2, 64, "fp16", 2, 2 / 64, 12 / 64),
        (3, 64, "bf16", 2 / 64, 2 / 64, 12 / 64),
        (3, 1, "bf16", 2, 2, 12),
        (2, 8, "no", 4, 4 / 8, 12 / 8),
    ],
)
def test_bytes_a_parameter(stage, world_size, precision, weights, gradients, optimizer):
    parameters = 64 * 10**6
    assert state_bytes({"trained": parameters}, stage, world_size, precision) == {
        "weights": weights * parameters,
        "gradients": gradients * parameters,
        "optimizer": optimizer * parameters,
    }


def test_llama_2_7b_under_zero_3_on_64_gpus():
    state = state_bytes({"trained": SEVEN_BILLION}, 3, 64, "bf16")
    assert state == {
        "weights": 210_575_488,
        "gradients": 210_575_488,
        "optimizer": 1_263_452_928,
    }
    assert round(sum(state.values()) / GIB, 2) == 1.57


def test_offload_leaves_the_gpu_what_the_offload_configs_leave_it():
    zero2 = state_bytes({"trained": 1000}, 2, 2, "bf16", offload=True)
    assert zero2 == {"weights": 2000, "gradients": 0, "optimizer": 0}
    zero3 = state_bytes({"trained": 1000}, 3, 2, "bf16", offload=True)
    assert zero3 == {"weights": 0, "gradients": 0, "optimizer": 0}


def test_a_remainder_is_rounded_up():
    assert state_bytes({"trained": 3}, 3, 4, "bf16") == {
        "weights": 2,
        "gradients": 2,
        "optimizer": 9,
    }


@pytest.mark.parametrize(("stage", "precision"), [(4, "bf16"), (2, "fp8")])
def test_unknown_settings_are_refused(stage, precision):
    with pytest.raises(ValueError, match="no such setting"):
        state_bytes({"trained": 1000}, stage, 1, precision)


def test_memory_table_of_a_small_model_is_in_mebibytes():
    # 2**20 parameters: 4 MiB of fp32 weights, 8 of moments, and under ZeRO 4 more of a copy
    assert memory_table({"trained": 2**20}, "no", world_sizes=(1, 2)).splitlines() == [
        "| ZeRO stage | 1 GPU | 2 GPUs |",
        "| --- | --- | --- |",
        "| 0 (DDP) | 4.0 + 4.0 + 8.0 = 16.0 MiB | 4.0 + 4.0 + 8.0 = 16.0 MiB |",
        "| 1 | 4.0 + 4.0 + 12.0 = 20.0 MiB | 4.0 + 4.0 + 6.0 = 14.0 MiB |",
        "| 2 | 4.0 + 4.0 + 12.0 = 20.0 MiB | 4.0 + 2.0 + 6.0 = 12.0 MiB |",
        "| 3 | 4.0 + 4.0 + 12.0 = 20.0 MiB | 2.0 + 2.0 + 6.0 = 10.0 MiB |",
    ]


def test_the_table_of_the_readme_is_what_the_dry_run_prints(tmp_path):
    arguments = "recipes/causal_lm/configs/pretrain_7b_slimpajama.yaml --dry_run"
    readme = (ROOT / "ds_configs/README.md").read_text()
    assert f"python {CAUSAL_LM} {arguments}\n" in readme
    table = memory_table({"trained": SEVEN_BILLION}, "bf16")
    assert table in readme
    printed = run(None, 1, arguments.split(), tmp_path / "log")
    assert table in printed
    assert "6,738,415,616 parameters (6,607,343,616 without the input embeddings)" in printed
    assert "1,024 sequences x 4,096 = 4,194,304 tokens" in printed
    assert "149,489 steps = 627,002,310,656 tokens" in printed
    assert "46,086,512,640 FLOPs a token" in printed


def test_the_plan_of_a_run_with_8_bit_moments():
    arguments = TrainingArguments(max_steps=1, optim="adamw_bnb_8bit")
    text = plan(LLAMA_2_7B, arguments, [(1024, 1)])
    embedding = 32_000 * 4096
    parts = {"trained": SEVEN_BILLION, "embeddings": embedding}
    assert memory_table(parts, "no", optim="adamw_bnb_8bit") in text
    held = sum(state_bytes(parts, 0, 1, "no", optim="adamw_bnb_8bit").values())
    # weights and gradients in 4 bytes, moments in 1 and a scale for 256 of them, of embeddings in 4
    moments = 2 * (1 + 4 / 256) * (SEVEN_BILLION - embedding) + 8 * embedding
    assert held == pytest.approx(8 * SEVEN_BILLION + moments, rel=1e-9)
    assert text.count("not with adamw_bnb_8bit") == 3 * 3


def test_the_sizes_of_the_launch_table_leave_a_third_of_80_gb_free():
    readme = (ROOT / "accelerate_configs/README.md").read_text()
    sizes = dict(re.findall(r"^\| `(\w+)\.yaml` .*\| up to (\d+)B", readme, re.M))
    stages = {"single_gpu": (0, 1), "multi_gpu": (0, 8)} | {f"zero{n}": (n, 8) for n in (1, 2, 3)}
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
    said = state_bytes(parts, 0, 1, "bf16", half_frozen=True, load_in_4bit=True)
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
    said = state_bytes(parts, 0, 1, "bf16", half_frozen=False, optim="adamw_bnb_8bit")
    # the moments of norms, which are small, are kept in 32 bits
    assert said["optimizer"] == pytest.approx(held, rel=0.005)


def test_bytes_of_stages():
    parts = {"trained": 1000, "embeddings": 0, "frozen": 9000, "quantizable": 0}
    assert state_bytes(parts, 0, 8, "bf16", half_frozen=True) == {
        "frozen": 18000,
        "weights": 4000,
        "gradients": 4000,
        "optimizer": 8000,
    }
    assert state_bytes(parts, 3, 8, "bf16", half_frozen=False) == {
        "frozen": 2250,
        "weights": 250,
        "gradients": 250,
        "optimizer": 1500,
    }
    assert state_bytes(parts, 0, 1, "no", half_frozen=True)["frozen"] == 36000
