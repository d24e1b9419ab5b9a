"""Checkpoints: what they hold, what is refused, and the Hugging Face models made of them."""

import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import make_documents, write_jsonl
from launching import TINY_RUN, checkpoints, metrics, state, steps, write_state
from recipes.causal_lm import pretrain as causal_lm
from utils import checkpoint, export
from utils.checkpoint import CheckpointError
from utils.config import InputError, command
from utils.fragments import optimizer_step_count
from utils.integrity import size_and_checksum


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# the module by itself


def make_model(optimizer_type=torch.optim.AdamW, **settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 1))
    model[0].weight.requires_grad = False
    settings = {"lr": 0.1, **settings}
    return model, optimizer_type([p for p in model.parameters() if p.requires_grad], **settings)


def train(model, optimizer, count):
    for number in range(count):
        model(torch.full((2, 3), 1.0 + number)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.3}),
    "fused AdamW": (torch.optim.AdamW, {"fused": True}),
    "Adam with amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD": (torch.optim.SGD, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("count", [0, 3])
def test_what_is_loaded_goes_on_as_what_was_saved(name, count, tmp_path):
    optimizer_type, settings = OPTIMIZERS[name]
    model, optimizer = make_model(optimizer_type, **settings)
    train(model, optimizer, count)
    folder = tmp_path / "checkpoints" / "step-00000003"
    checkpoint.save(folder, model, optimizer, {"mine": [1.5, None]})
    saved_step = optimizer_step_count(optimizer)
    assert checkpoint.read_state(folder)["mine"] == [1.5, None]
    train(model, optimizer, 2)

    other, other_optimizer = make_model(optimizer_type, **settings)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.fill_(7)
    checkpoint.load(folder, other, other_optimizer, saved_step)
    assert optimizer_step_count(other_optimizer) == saved_step
    train(other, other_optimizer, 2)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_only_what_is_trained_is_saved(tmp_path):
    model, optimizer = make_model()
    train(model, optimizer, 1)
    checkpoint.save(tmp_path / "step-00000001", model, optimizer, {})
    (file,) = tmp_path.glob("*/rank-*.safetensors")
    assert set(load_file(file)) == {
        f"{kind}/{name}"
        for kind in ("parameter", "exp_avg", "exp_avg_sq")
        for name in ("0.bias", "1.weight", "1.bias", "2.weight", "2.bias")
    }


@pytest.mark.parametrize("size", [4, 6], ids=["smaller", "larger"])
def test_parameters_of_another_size_are_refused(size, tmp_path):
    model, optimizer = make_model()
    folder = tmp_path / "step-00000000"
    checkpoint.save(folder, model, optimizer, {})
    other = torch.nn.Sequential(torch.nn.Linear(3, size))
    with pytest.raises(InputError, match=r"does not hold parameter of 0\..* in this size"):
        checkpoint.load(folder, other, torch.optim.SGD(other.parameters()), 0)
    with pytest.raises(InputError, match=r"does not hold 0\.bias in the shape \(\d,\)"):
        dict(checkpoint.read_parameters(folder, {"0.bias": torch.Size([size])}))
    with pytest.raises(InputError, match=r"does not hold 9\.bias in the shape"):
        dict(checkpoint.read_parameters(folder, {"9.bias": torch.Size([5])}))


def test_the_newest_is_the_one_of_the_most_steps(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    names = ("step-00000999", "step-100000000", "step-99999999", ".step-900000000.partial")
    for name in (*names, "step-backup", "step-999999999 (copy)"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.newest(tmp_path).name == "step-100000000"


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(2, None, {25, 30}), (1, 10, {10, 20, 30}), (1, None, {30}), (9, None, set(range(5, 31, 5)))],
)
def test_pruning(keep_last, keep_every, kept, tmp_path):
    for step in range(5, 31, 5):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step-{step:08d}/state.json").write_text("{}")
    (tmp_path / "checkpoints/step-mine").mkdir()
    checkpoint.prune(tmp_path, keep_last, keep_every)
    names = {folder.name for folder in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-mine", *(f"step-{step:08d}" for step in kept)}


def fail(*_, **__):
    raise OSError(28, "No space left on device")


def fail_like_tokenizers(*_):
    raise Exception("No space left on device (os error 28)")


@pytest.mark.parametrize("place", ["weights", "model files", "tokenizer", "sync"])
def test_what_cannot_be_written_leaves_nothing_behind(place, tmp_path, monkeypatch):
    model, optimizer = make_model()
    checkpoint.save(tmp_path / "step-00000001", model, optimizer, {})
    before = contents(tmp_path)
    write_more = {"model files": fail, "tokenizer": fail_like_tokenizers}.get(place)
    if place == "weights":
        monkeypatch.setattr(checkpoint, "save_file", fail)
    if place == "sync":
        monkeypatch.setattr(checkpoint, "sync", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save(tmp_path / "step-00000002", model, optimizer, {}, write_more)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_all_is_on_the_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    """And then the name itself: a power failure leaves a whole checkpoint or none."""
    folder = tmp_path / "step-00000001"
    synced, named = set(), set()
    fsync = os.fsync

    def recording_fsync(descriptor):
        (named if folder.exists() else synced).add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    model, optimizer = make_model()
    checkpoint.save(folder, model, optimizer, {}, lambda path: (path / "more").write_text("1"))
    assert len(list(folder.iterdir())) == 4  # weights, what stays as it is, more, the state
    assert {path.stat().st_ino for path in (folder, *folder.iterdir())} == synced
    assert {tmp_path.stat().st_ino} == named


def test_a_checkpoint_is_never_replaced(tmp_path):
    """Replacing one would leave a moment without it."""
    model, optimizer = make_model()
    checkpoint.save(tmp_path / "step-00000001", model, optimizer, {"first": True})
    with pytest.raises(CheckpointError):
        checkpoint.save(tmp_path / "step-00000001", model, optimizer, {"first": False})
    assert checkpoint.read_state(tmp_path / "step-00000001")["first"]


# in a run


def test_keep_last_and_keep_every(pretrain):
    ended = pretrain(max_steps=9, save_steps=2, keep_last=2, keep_every=4)
    assert [int(c.name[5:]) for c in checkpoints(ended.folder)] == [4, 8, 9]
    assert len(list((ended.folder / "checkpoints").iterdir())) == 3


def test_a_half_written_checkpoint_is_ignored_and_removed(pretrain):
    whole = pretrain("whole", max_steps=6, save_steps=2)
    ended = pretrain("part", max_steps=4, save_steps=2)
    folder = ended.folder / "checkpoints"
    shutil.copytree(folder / "step-00000004", folder / ".step-00000006.partial")
    (folder / ".step-00000006.partial/state.json").unlink()
    ended = pretrain("part", max_steps=6, save_steps=2)
    assert f"continuing {folder}/step-00000004" in ended.output
    assert not list(folder.glob(".*"))
    assert steps(ended.folder) == steps(whole.folder)


def truncate(folder):
    file = folder / "rank-00000-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return r"rank-00000-of-00001.safetensors has \d+ bytes, not \d+"


def scribble(folder):
    file = folder / "rank-00000-of-00001.safetensors"
    file.write_bytes(b"x" * len(file.read_bytes()))
    return "rank-00000-of-00001.safetensors is not what was written"


def flip(name, place):
    """One bit, `place` of the way into a file."""

    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        (folder / name).write_bytes(content)
        return ".*" if name == "state.json" else f"{name} is not what was written"

    damage.__name__ = f"flip-{name}-{place}"
    return damage


def remove_weights(folder):
    (folder / "rank-00000-of-00001.safetensors").unlink()
    return "rank-00000-of-00001.safetensors: No such file or directory"


def remove_state(folder):
    (folder / "state.json").unlink()
    return "state.json: No such file or directory"


def cut_state(folder):
    (folder / "state.json").write_text((folder / "state.json").read_text()[:100])
    return "state.json: .*line 1 column"


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        scribble,
        remove_weights,
        remove_state,
        cut_state,
        flip("rank-00000-of-00001.safetensors", 0.5),
    ],
    ids=lambda f: f.__name__,
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(damage, pretrain):
    whole = pretrain("whole", max_steps=6, save_steps=2)
    ended = pretrain("part", max_steps=4, save_steps=2)
    newest = ended.folder / "checkpoints" / "step-00000004"
    problem = damage(newest)
    before = contents(ended.folder)
    refused = pretrain("part", max_steps=6, save_steps=2)
    assert refused.status == 2
    remedy = f"Remove it to go on from {ended.folder}/checkpoints/step-00000002"
    assert_matches(rf"error: {newest} is damaged: {problem}.*\. {remedy}\n", refused.error)
    assert contents(ended.folder) == before
    shutil.rmtree(newest)
    ended = pretrain("part", max_steps=6, save_steps=2)
    assert ended.status == 0
    assert metrics(ended.folder) == metrics(whole.folder)
    final = [(e.folder / "model/model.safetensors").read_bytes() for e in (ended, whole)]
    assert final[0] == final[1]


@pytest.mark.parametrize("place", [0, 0.1, 0.5, 1])
def test_a_bit_that_has_changed_is_seen_in_every_file(place, pretrain):
    ended = pretrain(max_steps=2)
    (folder,) = checkpoints(ended.folder)
    names = [path.name for path in folder.iterdir()]
    assert {"rank-00000-of-00001.safetensors", "state.json", "tokenizer.json"} < {*names}
    checkpoint.verify(folder)
    for name in names:
        content = (folder / name).read_bytes()
        problem = flip(name, place)(folder)
        remedy = "Remove it to begin again: there is none before it"
        with pytest.raises(InputError, match=rf"^{folder} is damaged: {problem}.*\. {remedy}$"):
            checkpoint.verify(folder)
        (folder / name).write_bytes(content)
    checkpoint.verify(folder)


def test_several_processes_verify_every_file_and_each_its_own(tmp_path, monkeypatch):
    model, optimizer = make_model()
    folder = tmp_path / "step-00000001"
    checkpoint.save(folder, model, optimizer, {})
    for rank in (1, 2):
        (folder / f"rank-0000{rank}-of-00003.safetensors").write_bytes(b"weights")
    files = {path.name: size_and_checksum(path) for path in folder.glob("rank*")}
    checkpoint.update(folder, {"files": files})
    (folder / "rank-00001-of-00003.safetensors").write_bytes(b"Weights")
    checkpoint.verify(folder, 0, 3)
    checkpoint.verify(folder, 2, 3)
    for share in [(1, 3), (0, 1)]:
        with pytest.raises(InputError, match=r"rank-00001-of-00003.* is not what was written"):
            checkpoint.verify(folder, *share)


def assert_matches(pattern, text):
    assert re.fullmatch(pattern, text), text


CHANGES = {
    "seed": ({"seed": 1}, "seed was 0 and is 1"),
    "sequence_length": ({"sequence_length": 16}, "sequence_length was 32 and is 16"),
    "global batch": ({"global_batch_size": 32}, "global_batch_size was 16 and is 32"),
    "width": ({"model.hidden_size": 64}, "model.hidden_size was 32 and is 64"),
    "depth": ({"model.num_hidden_layers": 3}, "model.num_hidden_layers was 2 and is 3"),
    "architecture": (
        {"model.model_type": "gpt_neox"},
        "model.architectures was .*Llama.* and is .*NeoX.*",
    ),
    "lanes": ({"lanes": 16}, "the training data.lanes was 8 and is 16"),
    "shuffling": (
        {"shuffle_documents": 99},
        "the training data.shuffle_documents was 512 and is 99",
    ),
    "bound": (
        {"max_document_bytes": 10**6},
        "the training data.max_document_bytes was None and is 1000000",
    ),
    "weight": (
        {"train_sources.0.weight": 2},
        r"the training data.weight was \[1.0\] and is \[2.0\]",
    ),
    "file": (
        {"train_sources": [{"path": "OTHER"}]},
        r"the training data.files was 1 \([0-9a-f]{16}\) and is 1 \([0-9a-f]{16}\) "
        r"\(train-0.jsonl is gone; train-1.jsonl is new\)",
    ),
    "tokenizer": ({"tokenizer": "TOKENIZER"}, "the tokenizer was [0-9a-f]{16} and is [0-9a-f]{16}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_must_not_change_is_refused_by_name(
    change, pretrain, corpus_folder, tokenizer_folder, tmp_path
):
    changed = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    changed["model"]["merges"] = changed["model"]["merges"][:-1]
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(changed))
    settings, message = CHANGES[change]
    places = {"OTHER": corpus_folder / "train-1.jsonl", "TOKENIZER": tmp_path / "tokenizer"}
    text = json.dumps(settings)
    for word, place in places.items():
        text = text.replace(word, str(place))
    ended = pretrain(max_steps=2)
    before = contents(ended.folder)
    refused = pretrain(max_steps=4, **json.loads(text))
    assert refused.status == 2
    newest = ended.folder / "checkpoints" / "step-00000002"
    remedy = "Change it back, or choose another output_dir"
    assert_matches(rf"error: cannot continue {newest}: {message}\. {remedy}\n", refused.error)
    assert contents(ended.folder) == before


def test_what_a_run_writes_among_its_data_is_no_source(pretrain, tmp_path):
    """Not at the second start, when it is there, and not for another run beside it."""
    data = tmp_path / "data"
    data.mkdir()
    write_jsonl(data / "a.jsonl", make_documents("a", 50))
    settings = {"train_sources": [{"path": str(data)}], "save_steps": 2}
    whole = pretrain("whole", max_steps=4, **settings)
    for max_steps in (2, 4):
        inside = pretrain("data/run", max_steps=max_steps, **settings)
        assert inside.status == 0, inside.error
    assert (data / "run/metrics.jsonl").exists()
    beside = pretrain("beside", max_steps=4, **settings)
    assert f"{data}: 1 files that runs have written there are left out" in inside.error
    for ended in (inside, beside):
        assert steps(ended.folder) == steps(whole.folder)


def test_a_file_that_has_grown_is_other_data(pretrain, tmp_path):
    data = tmp_path / "data.jsonl"
    write_jsonl(data, make_documents("first", 50))
    assert pretrain(max_steps=2, train_sources=[{"path": str(data)}]).status == 0
    write_jsonl(data, make_documents("first", 51))
    refused = pretrain(max_steps=4, train_sources=[{"path": str(data)}])
    assert refused.status == 2
    assert "the training data.files was" in refused.error


def test_a_checkpoint_whose_data_were_not_described_by_name(pretrain):
    """As checkpoints once were: it is continued, and what differs is named all the same."""
    whole = pretrain("whole", max_steps=4)
    first = pretrain(max_steps=2)
    (checkpoint,) = checkpoints(first.folder)
    older = state(checkpoint)
    data = older["fixed"]["the training data"]
    names = ("sources and files", "lanes", "shuffle_documents", "shuffle_bytes")
    older["fixed"]["the training data"] = [data[name] for name in names]
    write_state(checkpoint, older)
    refused = pretrain(max_steps=4, lanes=4)
    assert "the training data.lanes was 8 and is 4. Change it back" in refused.error
    ended = pretrain(max_steps=4)
    assert ended.status == 0
    assert steps(ended.folder) == steps(whole.folder)


def test_what_may_change_does(pretrain):
    pretrain(max_steps=2)
    changed = {"learning_rate": 1e-4, "weight_decay": 0.0, "save_steps": 1, "keep_last": 1}
    ended = pretrain(max_steps=4, per_device_batch_size=2, mixed_precision="bf16", **changed)
    assert ended.status == 0
    rates = [record["learning_rate"] for record in steps(ended.folder)]
    assert rates == [3e-3, 3e-3, 1e-4, 1e-4]
    assert "weight_decay: 0.0" in (ended.folder / "config.yaml").read_text()


def test_the_state_is_small_and_says_what_was_seen(pretrain, corpus_folder):
    domain = "meta.redpajama_set_name"
    source = {"path": str(corpus_folder / "train-0.jsonl"), "label": "t", "domain_field": domain}
    ended = pretrain(max_steps=5, lanes=16, train_sources=[source])
    (newest,) = checkpoints(ended.folder)
    assert (newest / "state.json").stat().st_size < 25_000
    seen = {"t/Book": 0, "t/Code": 0, "t/Web": 0}
    for lane in state(newest)["stream"].values():
        for name, tokens in lane["seen"].items():
            seen[name] += tokens
    assert sum(seen.values()) == state(newest)["counters"]["tokens"] == 5 * 16 * 32
    assert metrics(ended.folder)[-1] == {
        "step": 5,
        "tokens_by_source": seen,
        "epoch_by_source": {"t": 0},
    }


# export


@pytest.fixture
def trained(monkeypatch):
    """The models that the recipe has trained, as it left them."""
    models = []
    build_model = causal_lm.build_model
    monkeypatch.setattr(
        causal_lm, "build_model", lambda *args: models.append(build_model(*args)) or models[-1]
    )
    return models


MODELS = {
    "llama": TINY_RUN["model"],
    "llama, tied": {**TINY_RUN["model"], "tie_word_embeddings": True},
    "gpt2, tied": {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64
    },
    "phi, bias": {**TINY_RUN["model"], "model_type": "phi"},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_export_reloads_with_equal_logits(name, pretrain, trained, tokenizer):
    ended = pretrain(max_steps=3, model=MODELS[name])
    assert ended.status == 0, ended.error
    (model,) = trained
    folder = ended.folder / "model"
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    reloaded = AutoTokenizer.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert loaded.dtype == torch.float32
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == ("tied" in name)
    text = "kato mirenka <|end_of_text|> 東🙂"
    assert reloaded(text) == tokenizer(text)
    assert (loaded.config.eos_token_id, loaded.config.bos_token_id) == (2, 1)
    tokens = torch.tensor([reloaded(text).input_ids])
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
    output = loaded.generate(tokens, max_new_tokens=5)
    assert output.shape[1] > tokens.shape[1]


@pytest.fixture
def run_export(monkeypatch, capfd):
    def run(**settings):
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", ["export.py", *words])
        with pytest.raises(SystemExit) as end:
            command(export.main)
        return end.value.code, *capfd.readouterr()

    return run


def test_any_checkpoint_can_be_exported(pretrain, run_export, tmp_path):
    ended = pretrain(max_steps=4, save_steps=2)
    shorter = pretrain("shorter", max_steps=2)
    for step, folder in ((4, ended.folder), (2, shorter.folder)):
        source = ended.folder / f"checkpoints/step-{step:08d}"
        status, output, _ = run_export(checkpoint=source, output_dir=tmp_path / f"{step}")
        assert (status, output) == (0, f"{tmp_path}/{step}: 53,408 parameters in float32\n")
        expected = contents(folder / "model")
        for path, content in contents(tmp_path / f"{step}").items():
            assert content == expected[folder / "model" / path.name]
    half = tmp_path / "half"
    status, *_ = run_export(checkpoint=source, output_dir=half, dtype="bfloat16")
    assert status == 0
    model = AutoModelForCausalLM.from_pretrained(half)
    assert model.dtype == torch.bfloat16
    exact = load_file(tmp_path / "2" / "model.safetensors")
    for name, tensor in load_file(half / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].bfloat16())


def test_the_last_checkpoints_are_averaged(pretrain, run_export, tmp_path):
    ended = pretrain(max_steps=3, save_steps=1, keep_last=3)
    *_, source = folders = checkpoints(ended.folder)
    out = {"checkpoint": source, "output_dir": tmp_path / "mean"}
    status, output, error = run_export(**out, average_last=3)
    assert (status, output.endswith("float32, the mean of 3 checkpoints\n")) == (0, True), error
    for folder in folders:
        assert run_export(checkpoint=folder, output_dir=tmp_path / folder.name)[0] == 0
    single = [load_numpy(tmp_path / f.name / "model.safetensors") for f in folders]
    for name, values in load_numpy(tmp_path / "mean" / "model.safetensors").items():
        expected = sum(tensors[name].astype("f8") for tensors in single) / 3
        np.testing.assert_array_equal(values, expected.astype("f4"), err_msg=name)
        assert (values != single[2][name]).any(), name
    for path in ("config.json", "tokenizer.json"):
        assert (tmp_path / "mean" / path).read_bytes() == (source / path).read_bytes()

    out["output_dir"] = tmp_path / "out"
    other = pretrain("other", max_steps=2, model={**TINY_RUN["model"], "attention_bias": True})
    shutil.rmtree(folders[1])
    shutil.copytree(checkpoints(other.folder)[-1], folders[1])
    problem = "different models: one of them does not hold model.layers.0.self_attn.k_proj.bias"
    status, _, error = run_export(**out, average_last=2)
    assert (status, problem in error) == (2, True), error
    status, _, error = run_export(**out, average_last=4)
    assert (status, "average_last: 4 of the 3 checkpoints" in error) == (2, True), error
    shutil.rmtree(folders[1])
    problem = truncate(folders[0])
    status, _, error = run_export(**out, average_last=2)
    assert status == 2
    assert_matches(f"error: {folders[0]} is damaged: {problem}. .*\n", error)
    assert not (tmp_path / "out").exists()


def test_an_export_that_is_refused_writes_nothing(pretrain, run_export, tmp_path):
    ended = pretrain(max_steps=1)
    (source,) = checkpoints(ended.folder)
    status, _, error = run_export(checkpoint=source, output_dir=ended.folder)
    assert (status, error) == (2, f"error: output_dir: {ended.folder} exists\n")
    status, _, error = run_export(checkpoint=tmp_path / "none", output_dir=tmp_path / "out")
    assert (status, error) == (2, f"error: no checkpoint {tmp_path}/none\n")
    problem = truncate(source)
    status, _, error = run_export(checkpoint=source, output_dir=tmp_path / "out")
    assert status == 2
    assert_matches(f"error: {source} is damaged: {problem}. .*\n", error)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_for_which_there_is_no_space(pretrain, run_export, tmp_path, monkeypatch):
    ended = pretrain(max_steps=1)
    (source,) = checkpoints(ended.folder)
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    status, _, error = run_export(checkpoint=source, output_dir=tmp_path / "out")
    assert status == 2
    message = "[Errno 28] No space left on device"
    assert error == f"error: cannot write {tmp_path}/out: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_parameter_that_never_had_a_gradient_is_read_again(tmp_path):
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 3), "idle": torch.nn.Linear(3, 3)})
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    model, optimizer = make()
    model["used"](torch.ones(3)).sum().backward()
    optimizer.step()
    folder = tmp_path / "step-00000001"
    checkpoint.save(folder, model, optimizer, {"optimizer_step": 1})
    other, its_optimizer = make()
    checkpoint.load(folder, other, its_optimizer, 1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))
        moment = its_optimizer.state[other.get_parameter(name)]["exp_avg"]
        assert torch.equal(moment, optimizer.state[parameter].get("exp_avg", torch.zeros(()))) or (
            name.startswith("idle.") and not moment.any()
        )
