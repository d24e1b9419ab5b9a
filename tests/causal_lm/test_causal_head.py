"""The head of every kind of causal model, and the loss that balances a router."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from causal_head import CausalHead, check_model
from recipes.causal_lm.pretrain import NextTokenLoss
from sweeps.architectures import sharpened, tiny_model
from utils.config import InputError
from utils.loss import IGNORE_INDEX, LossArguments, amplified


def batch_of(lengths: list[int], size: int = 16) -> dict[str, torch.Tensor]:
    """A row a document, padded on the right."""
    draw = torch.Generator().manual_seed(0)
    places = torch.arange(size).expand(len(lengths), size)
    is_token = places < torch.tensor(lengths)[:, None]
    tokens = torch.randint(3, 100, places.shape, generator=draw) * is_token
    labels = torch.full_like(tokens, IGNORE_INDEX)
    labels[:, :-1] = torch.where(is_token[:, 1:], tokens[:, 1:], IGNORE_INDEX)
    batch = {"input_ids": tokens, "shift_labels": labels, "position_ids": places}
    return {**batch, "lengths": torch.tensor(lengths)}


def mean_of(objective, *batches):
    """As a step takes it: each sum divided by its count over all micro-batches."""
    counts = [objective.counts(batch) for batch in batches]
    terms = [objective(**batch) for batch in batches]
    return sum(sum(t[n] for t in terms) / sum(c[n] for c in counts) for n in objective.names)


def own_loss(model, batch):
    """As transformers' own trainer has it: labels are the tokens, padding is masked."""
    tokens, mask = batch["input_ids"], torch.arange(16) < batch["lengths"][:, None]
    labels = torch.where(mask, tokens, IGNORE_INDEX)
    return model(tokens, attention_mask=mask.long(), labels=labels, use_cache=False).loss


def gradients_agree(model, ours, theirs):
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = [torch.autograd.grad(x, parameters, allow_unused=True) for x in (ours, theirs)]
    for mine, other in zip(*found, strict=True):
        if other is not None and other.norm() > 1e-6:
            assert (mine - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize(
    ("model_type", "settings", "change"),
    [
        ("llama", {}, (1, None)),
        ("gpt2", {}, (1, None)),  # tied
        ("phi", {}, (1, None)),  # its head has a bias
        ("gemma2", {}, (1, 30)),
        ("gemma2", {"final_logit_softcapping": None}, (1, None)),
        ("nanochat", {}, (1, 15)),
        ("recurrent_gemma", {}, (1, 30)),  # under another name
        ("cohere", {}, (0.0625, None)),
        ("granite", {"logits_scaling": 8.0}, (1 / 8, None)),
        ("hyperclovax", {"logits_scaling": 8.0}, (8, None)),  # multiplies, as Granite divides
        ("minicpm3", {}, (1, None)),  # scales before its head
        ("falcon_h1", {"lm_head_multiplier": 0.25}, (0.25, None)),
        ("roberta", {}, (1, None)),  # has layers of its own before the linear one
        ("modernbert-decoder", {}, (1, None)),
    ],
    ids=str,
)
def test_the_loss_and_gradients_are_the_model_s_own(model_type, settings, change):
    model = sharpened(tiny_model("causal", model_type, **settings))
    objective, batch = NextTokenLoss(model, packing=False), batch_of([16, 9])
    value, expected = mean_of(objective, batch), own_loss(model, batch)
    assert objective.head.change == change
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    gradients_agree(model, value, expected)


def test_the_router_loss_of_a_mixture_is_in_the_loss_by_its_name():
    settings = {"output_router_logits": True, "router_aux_loss_coef": 0.02}
    model = sharpened(tiny_model("causal", "mixtral", **settings))
    objective, batch = NextTokenLoss(model, packing=False), batch_of([16, 16, 16])
    assert objective.names == ("cross_entropy", "router_aux_loss")
    output = model(batch["input_ids"], labels=batch["input_ids"], use_cache=False)
    terms, counts = objective(**batch), objective.counts(batch)
    assert counts == {"cross_entropy": 45, "router_aux_loss": 48}
    means = {name: (terms[name] / counts[name]).item() for name in terms}
    assert means["router_aux_loss"] == pytest.approx(0.02 * output.aux_loss.item(), rel=1e-6)
    assert sum(means.values()) == pytest.approx(output.loss.item(), rel=1e-6)
    assert means["router_aux_loss"] > 0.02
    gradients_agree(model, mean_of(objective, batch), output.loss)
    for off in ({"output_router_logits": False}, {"router_aux_loss_coef": 0.0}):
        without = NextTokenLoss(tiny_model("causal", "mixtral", **settings | off))
        assert without.names == ("loss",)


@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen3_moe", "olmoe", "jetmoe", "dbrx", "granitemoe", "phimoe"]
)
def test_padding_and_the_split_into_micro_batches(model_type):
    """The router's loss is over tokens: padding, or micro-batches that see the same, change it
    not."""
    model = tiny_model("causal", model_type, output_router_logits=True)
    sharpened(model)
    objective, batch = NextTokenLoss(model, packing=False), batch_of([16, 9, 4])
    value, expected = mean_of(objective, batch), own_loss(model, batch)
    assert model.config.output_router_logits
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    gradients_agree(model, value, expected)
    # rows without any token add nothing, and nothing that is not finite
    empty = {name: tensor[:1] for name, tensor in batch_of([0]).items()}
    torch.testing.assert_close(mean_of(objective, batch, empty), value)
    # of several micro-batches, the mean weighted by their tokens
    parts = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(3)]
    expected, sizes = 0, batch["lengths"].tolist()
    for part, size in zip(parts, sizes, strict=True):
        alone = model(part["input_ids"][:, :size], use_cache=False).aux_loss
        expected += objective.head.router_weight * alone * size / sum(sizes)
    terms = [objective(**part)["router_aux_loss"] for part in parts]
    torch.testing.assert_close(sum(terms) / sum(sizes), expected, rtol=1e-5, atol=1e-6)


def test_the_router_loss_of_packed_rows_is_over_their_tokens():
    model = sharpened(tiny_model("causal", "mixtral", output_router_logits=True))
    batch = batch_of([12])
    batch["position_ids"] = torch.cat([torch.arange(7), torch.arange(5), torch.arange(4)])[None]
    term = NextTokenLoss(model)(**batch)["router_aux_loss"] / 12
    cut = {name: x if name == "lengths" else x[:, :12] for name, x in batch.items()}
    torch.testing.assert_close(NextTokenLoss(model)(**cut)["router_aux_loss"] / 12, term)
    long = {name: x for name, x in batch.items() if name != "lengths"}
    assert abs(NextTokenLoss(model)(**long)["router_aux_loss"] / 16 - term) > 1e-5


def test_what_a_model_adds_to_its_loss_is_refused_by_name():
    model = tiny_model("causal", "bamba", z_loss_coefficient=0.1)
    with pytest.raises(InputError, match=r"bamba adds .* to its own loss, which would be left out"):
        NextTokenLoss(model, packing=False)(**batch_of([16]))


def test_logits_that_are_changed_otherwise_are_refused(monkeypatch):
    model = tiny_model("causal", "llama")
    forward = type(model).forward

    def changed(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.clamp(-3, 3)
        return output

    monkeypatch.setattr(type(model), "forward", changed)
    with pytest.raises(InputError, match="llama changes its logits in a way that is not known"):
        NextTokenLoss(model)(**batch_of([16]))


def test_heads_that_are_not_linear():
    model = tiny_model("causal", "llama")
    model.set_output_embeddings(torch.nn.Sequential(model.lm_head))
    with pytest.raises(InputError, match="llama has a Sequential as output layer"):
        CausalHead(model)


def test_a_leak_shows_behind_weights_that_begin_at_zero():
    model = tiny_model("causal", "opt")
    for layer in model.base_model.decoder.layers:
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objective = NextTokenLoss(model)

    def losses(batch):
        with torch.no_grad():
            return objective(**batch, per_token=True)

    with pytest.raises(InputError, match="documents in one row see each other"):
        check_model(model, losses, 32, packing=True)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with amplified(model):
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
        loud = objective(**batch_of([16]))["loss"]
    assert abs(loud - objective(**batch_of([16]))["loss"]) > 1


@pytest.fixture
def apart_in_one_row(monkeypatch) -> str:
    """Attention that reads the boundaries of documents where there is one row alone, as what
    transformers calls flash attention does."""
    functions = ALL_ATTENTION_FUNCTIONS

    def attend(module, query, key, value, mask, position_ids=None, **options):
        mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
        if len(query) == 1:
            documents = (position_ids[0] == 0).cumsum(0)
            mask = mask & (documents[:, None] == documents)
        return functions["sdpa"](module, query, key, value, mask[None, None], **options)

    monkeypatch.setitem(functions._global_mapping, "apart_in_one_row", attend)
    return "apart_in_one_row"


def test_documents_are_kept_apart_in_every_row(apart_in_one_row):
    model = tiny_model("causal", "llama")
    objective = NextTokenLoss(model)

    def losses(batch):
        return objective(**batch, per_token=True)

    check_model(model, losses, 32, packing=True)
    model.set_attn_implementation(apart_in_one_row)
    check_model(model, losses, 32, packing=False)
    with pytest.raises(InputError, match="documents in one row see each other"):
        check_model(model, losses, 32, packing=True)


def test_a_head_that_an_adapter_trains_as_a_whole():
    import peft

    model = sharpened(tiny_model("causal", "llama"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = peft.get_peft_model(model, config)
    head = model.lm_head.modules_to_save["default"]
    with torch.no_grad():
        head.weight.mul_(1.5)  # as training changes it
    objective, batch = NextTokenLoss(model, packing=False), batch_of([16, 9])
    value = mean_of(objective, batch)
    expected = own_loss(model, batch)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    (found,), (other,) = (torch.autograd.grad(x, [head.weight]) for x in (value, expected))
    assert (found - other).norm() < 1e-5 * other.norm()
    assert adapted.get_nb_trainable_parameters()[0] > head.weight.numel()


def test_the_loss_of_each_token():
    model = sharpened(tiny_model("causal", "gemma2"))
    batch = batch_of([16, 9])
    with torch.no_grad():
        losses = NextTokenLoss(model, packing=False)(**batch, per_token=True)
        logits = model(batch["input_ids"], use_cache=False).logits
    expected = cross_entropy(logits.transpose(1, 2), batch["shift_labels"], reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_what_is_added_to_the_loss_is_added_in_training_alone():
    model, batch = tiny_model("causal", "llama"), batch_of([16, 16])
    added = LossArguments(label_smoothing_factor=0.2, z_loss=0.05)
    plain, more = NextTokenLoss(model), NextTokenLoss(model, added=added)
    logits = model(batch["input_ids"], position_ids=batch["position_ids"]).logits.double()
    labels = batch["shift_labels"].flatten()
    expected = cross_entropy(logits.flatten(0, 1), labels, reduction="sum", label_smoothing=0.2)
    kept = (labels != IGNORE_INDEX)[:, None]
    expected += 0.05 * (logits.flatten(0, 1).logsumexp(1, keepdim=True).square() * kept).sum()
    more.train()
    assert more(**batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    for objective in (plain, more):
        objective.eval()
    assert more(**batch)["loss"] == plain(**batch)["loss"] < expected
    assert torch.equal(more(**batch, per_token=True), plain(**batch, per_token=True))
