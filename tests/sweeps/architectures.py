"""Every architecture that transformers has, tiny: what the sweeps go over.

The types are read from transformers' own mappings, and a config is made small by the names of its
settings, so that the next architecture is swept without a line here.
"""

import copy
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator
from textwrap import shorten
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}
AUTO_MODELS = {
    "causal": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "classification": transformers.AutoModelForSequenceClassification,
}
VOCABULARY, POSITIONS, LAYERS = 128, 128, 2
SPECIAL = 100  # ids from here on are of special tokens: no text holds them

# the first that a setting's name matches tells what it is at most; None: it is left as it is
SIZES: list[tuple[str, int | None]] = [
    (r"^(chunk_size_feed_forward|chunk_size_lm_head|pretraining_tp|num_logits_to_keep)$", None),
    (r"type_vocab|task_type|num_channels|_factor$|_interval$|_every|_period$|_offset$", None),
    (r"vocab", VOCABULARY),
    (r"experts?_per_tok|moe_top_?k|^moe_k$", 2),
    (r"shared_experts$", 1),
    (r"experts$|expert_num$", 4),
    (r"topk_group", 1),
    (r"^n_group$|num_expert_group", 2),
    (r"dense_replace|num_dense_layers|num_global_layers", 1),
    (r"kv_shared_layers", 0),
    (r"mamba.*heads$", 8),
    (r"n_groups$|linear_num_key_heads", 2),
    (r"heads(_per_layer|_per_ngram)?$|^n_head$", 4),
    (r"(layers|blocks)(_per_stack)?$|^n_layer$|^depth$", LAYERS),
    (r"qk_head_dim", 16),
    (
        r"head_?dim|rotary_dim|d_head|dim_head|d_kv|d_head|head_size|kv_channels|query_pre_attn_scalar",
        8,
    ),
    (r"rank$", 8),
    (r"positions?(_embeddings)?$|max_seq_len|^n_ctx$|context_length|model_max_length", POSITIONS),
    (r"window(_size)?$|chunk_(size|length)|local_attention$|_extent$|max_distance$", 16),
    (r"topk|_mem_|state_size|d_state|num_latents", 8),
    (r"embed_proj_dim|ple_embed_dim", 32),
    (r"^ngram_vocab|encoder_hash_byte_group_vocab", 64),
    (
        r"hidden_size|^d_model$|^dim$|^d_latents$|adapter_(in|out)(put)?_(dim|size)|^n_embd$|emb(ed|edding)?_(dim|size)$|lru_width",
        32,
    ),
    (
        r"intermediate|ffn|^hidden_dim$|^dff$|d_ff|dim_ff|d_inner|mlp_dim|feed_forward|mid_dim|proj_size|d_ssm",
        64,
    ),
    (r"image_size", 32),
    (r"patch_size", 8),
]
# what some types leave open that cannot be left open
NEEDED = (
    r"^(vocab_size|head_dim|num_key_value_heads|num_experts_per_tok|n_(routed|shared)_experts)$"
    r"|^moe_intermediate_"
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 8, "budget": 16, "compress_ratio": 4}
INDEXER = {f"indexer_{name}": value for name, value in INDEXER.items()}
# what the names of the settings do not tell
MORE: dict[str, dict[str, Any]] = {
    "doge": {"keep_window_size": POSITIONS},  # ties are broken by the length of the row
    **{key: {"index_topk": POSITIONS} for key in ("hy_v4", "glm_moe_dsa", "axk2")},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8},
    "mobilebert": {"embedding_size": 16},
    "neomme": {"head_dim": 16},
    "qwen4_exp_text": INDEXER,
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
}
# what was once trained or exported wrongly, or refused without need: swept by every `make test`
EVER_FAILED = {"mixtral", "gemma2", "cohere", "granite", "falcon", "gpt_oss", "opt", "ernie4_5_moe"}


class CannotBuild(Exception):
    """Why there is no tiny model of a type."""


def model_types(kind: str) -> list[str]:
    """The types that transformers maps to a class of this kind, in the order of the alphabet."""
    return sorted(getattr(modeling_auto, KINDS[kind]))


def sampled(model_type: str) -> bool:
    """Whether `make test` sweeps over the type; `make sweep` does over all."""
    number = int.from_bytes(hashlib.sha256(model_type.encode()).digest()[:4])
    return "SWEEP" in os.environ or model_type in EVER_FAILED or number % 10 == 0


def tiny_config(model_type: str, **settings: Any) -> PreTrainedConfig:
    """A config of a model of some ten thousand parameters that keeps the type's peculiarities:
    each kind of layer, its experts, its windows, its special tokens.

    Raises:
        CannotBuild: transformers knows no such config, or refuses the tiny one.
    """
    try:
        defaults = CONFIG_MAPPING[model_type]()
        given = _tiny(defaults) | MORE.get(model_type, {}) | settings
        return type(defaults)(**given)
    except Exception as error:
        raise CannotBuild(shorten(f"{type(error).__name__}: {error}", 160)) from error


def tiny_model(kind: str, model_type: str, **settings: Any) -> transformers.PreTrainedModel:
    """The model of a `tiny_config` in evaluation mode, as `from_config` initialises it.

    Raises:
        CannotBuild: as `tiny_config` does, and where transformers has no such model.
    """
    config = tiny_config(model_type, **settings)
    if kind == "causal" and hasattr(config, "is_decoder"):  # else an encoder sees what comes next
        config.is_decoder = True
    try:
        torch.manual_seed(0)
        return AUTO_MODELS[kind].from_config(config).eval()
    except Exception as error:
        raise CannotBuild(shorten(f"{type(error).__name__}: {error}", 160)) from error


def sharpened(
    model: transformers.PreTrainedModel, std: float = 0.2, seed: int = 0
) -> transformers.PreTrainedModel:
    """The model with weights so large that every part of it shows in the logits."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std)
            else:
                parameter.add_(torch.randn_like(parameter) * std)
    return model


def _tiny(config: PreTrainedConfig) -> dict[str, Any]:
    small: dict[str, Any] = {}
    layers, kept = _kept_layers(config)
    settings = {field.name for field in dataclasses.fields(config)}
    for name, value in vars(config).items():
        if name not in settings:
            continue
        if isinstance(value, PreTrainedConfig):
            own = {"model_type": value.model_type} | MORE.get(value.model_type, {})
            small[name] = _tiny(value) | own
        elif isinstance(value, list | tuple) and layers and len(value) == layers:
            small[name] = [_sized(name, value[index]) for index in kept]
        elif _is_token(name):
            small |= {name: _token(name, value)}
        elif isinstance(value, int) and not isinstance(value, bool):
            small[name] = _sized(name, value)
        elif value is None and re.search(NEEDED, name):
            small[name] = _sized(name, 2**31)
    heads, groups = (vars(config).get(f"num_{kind}_heads") for kind in ("attention", "key_value"))
    if groups is not None and groups != heads:
        small["num_key_value_heads"] = min(groups, 2)
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if name in small and layers:
            small[name] = len(kept)
    return small


def _sized(name: str, value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return copy.deepcopy(value)
    most = next((size for pattern, size in SIZES if re.search(pattern, name)), None)
    return value if most is None else min(value, most)


def _kept_layers(config: PreTrainedConfig) -> tuple[int, list[int]]:
    """(their number, which of them a tiny model keeps: one of each kind, two at least)"""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return 0, []
    lists = [v for v in vars(config).values() if isinstance(v, list | tuple) and len(v) == layers]
    first: dict[str, int] = {}
    for index in range(layers):
        first.setdefault(str([values[index] for values in lists]), index)
    kept = sorted(first.values())[:6]
    others = (index for index in range(layers) if index not in kept)
    while len(kept) < min(LAYERS, layers):
        kept.append(next(others))
    return layers, sorted(kept)


def _is_token(name: str) -> bool:
    return re.search(r"token_ids?$|^(image|audio|video|boi|eoi|eoa)_token_index$", name) is not None


def _token(name: str, value: Any) -> Any:
    """pad, bos and eos are 0, 1 and 2; others lie beyond the tokens of any text."""
    places = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    own = SPECIAL + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 20
    return None if value is None and name not in places else places.get(name, own)


def documents(sizes: tuple[int, ...] = (11, 2, 20, 9)) -> Iterator[torch.Tensor]:
    """Token ids of random documents, always the same."""
    draw = torch.Generator().manual_seed(1)
    for size in sizes:
        yield torch.randint(3, SPECIAL, (size,), generator=draw)
