"""What a run takes: FLOPs beside what torch counts, and what `--dry_run` prints and refuses."""

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
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from launching import CAUSAL_LM, ROOT
from masked_loss import MaskedLoss
from recipes.causal_lm import pretrain as causal
from utils.loss import IGNORE_INDEX
from utils.memory import parameter_count
from utils.plan import attention_flops, flops_per_token
from utils.progress import peak_flops

LLAMA_2_7B = LlamaConfig()  # the defaults are Llama-2-7B's shape
SEVEN_BILLION = 6_738_415_616


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


def test_attention_is_as_wide_as_its_heads_and_as_long_as_its_windows():
    # Qwen3-0.6B: 16 heads of 128, though the hidden size is 1,024
    qwen = Qwen3Config(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, head_dim=128)
    assert attention_flops(qwen, 4096) == 12 * 28 * 2048 * 4096
    # five of six layers of Gemma 3 slide
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 2
    shape = {"num_attention_heads": 4, "head_dim": 256, "sliding_window": 512}
    gemma = Gemma3TextConfig(num_hidden_layers=12, layer_types=kinds, **shape)
    assert attention_flops(gemma, 2048) == 12 * 1024 * (10 * 512 + 2 * 2048)
    assert attention_flops(gemma, 256) == 12 * 1024 * 12 * 256
    mistral = MistralConfig(num_hidden_layers=2, sliding_window=4096)
    assert attention_flops(mistral, 8192) == 12 * 2 * 4096 * 4096
    full = MistralConfig(num_hidden_layers=2, sliding_window=None)
    assert attention_flops(full, 8192) == 12 * 2 * 4096 * 8192
    # keys of 128 + 64, values of 128
    deepseek = DeepseekV3Config(num_hidden_layers=2, num_attention_heads=8)
    assert attention_flops(deepseek, 1024) == 6 * 2 * 8 * (192 + 128) * 1024
    recurrent = AutoConfig.for_model("mamba", num_hidden_layers=2)
    assert attention_flops(recurrent, 1024) == 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_of_a_card(name, peak):
    assert peak_flops(name) == peak


CONFIG_7B = "recipes/causal_lm/configs/pretrain_7b_slimpajama.yaml"


def planned(call, tmp_path, *words: str):
    return call(causal.main, [str(ROOT / CONFIG_7B), "--dry_run", *words], tmp_path)


def test_the_plan_of_a_7b_and_the_table_of_the_readme(call, tmp_path):
    ended = planned(call, tmp_path, "--plan.price_per_gpu_hour", "2.5")
    assert ended.status == 0
    printed = ended.output
    readme = (ROOT / "ds_configs/README.md").read_text()
    assert f"python {CAUSAL_LM} {CONFIG_7B} --dry_run\n" in readme
    tables = re.findall(r"(?:^\|.*\n)+", printed, re.M)
    assert len(tables) == 2
    assert tables[0] in readme
    for line in (
        "6,738,415,616 parameters (6,607,343,616 without the input embeddings)",
        "1,024 sequences x 4,096 = 4,194,304 tokens",
        "149,489 steps = 627,002,310,656 tokens",
        "46,086,512,640 FLOPs a token (6 N + 12 L A S)",
        "42,865,287,168 as torchtitan counts",
        "845.4 on 1, 105.7 on 8, 13.21 on 64",
        "cost         50,725: 20,290 GPU hours at 2.5",
    ):
        assert line in printed
    assert max(map(len, printed.splitlines())) <= 100
    # of no GPU that is stated or here nothing is refused
    assert cell(printed, "DDP, or one GPU", "largest micro-batch") == "none"
    assert float(cell(printed, "ZeRO-2 on 8 GPUs", "in all")) == pytest.approx(30.4, abs=0.1)
    # 46.09 GFLOP a token of 40% of 989 TFLOP/s
    assert f"{0.4 * 989e12 / 46_086_512_640:,.0f} tokens/s" in printed


def cell(printed: str, row: str, column: str) -> str:
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line[:1] == "|"]
    return next(line for line in lines if line[0] == row)[lines[0].index(column)]


def test_what_does_not_fit_is_refused_and_the_nearest_that_does_is_named(call, tmp_path):
    """Of 27 GiB the state takes 34.5 under ZeRO-1 and 23.5 under ZeRO-2, a row 2.4, two 3.9."""
    ended = planned(
        call,
        tmp_path,
        "--plan.gpu_memory",
        "30",
        "--plan.gpus",
        "8",
        "--gradient_checkpointing",
        "false",
    )
    assert ended.status == 2
    assert "per_device_batch_size 4 x 4,096 does not fit: ZeRO-3 on 8 GPUs takes" in ended.error
    assert (
        "27.0 of a GPU can be used; the nearest that does: ZeRO-2 on 8 GPUs, "
        "per_device_batch_size 1, gradient_checkpointing: true" in ended.error
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [("mfu=1.2", r"plan.mfu must be in \(0, 1\], not 1.2"), ("gpus=0", "plan.gpus must be more")],
)
def test_hardware_that_cannot_be(setting, message, call, tmp_path):
    name, value = setting.split("=")
    ended = planned(call, tmp_path, f"--plan.{name}", value)
    assert ended.status == 2
    assert re.search(message, ended.error)


def test_activations_that_are_not_known_are_not_said_to_be_none(call, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("data decide on shapes")

    monkeypatch.setattr("utils.plan.activations", fails)
    ended = planned(call, tmp_path, "--plan.gpu_memory", "80")
    assert ended.status == 0
    assert cell(ended.output, "ZeRO-2 on 8 GPUs", "activations") == "?"
    assert cell(ended.output, "ZeRO-2 on 8 GPUs", "largest micro-batch") == "?"
    assert "does not tell (data decide on shapes), are not counted" in ended.output
