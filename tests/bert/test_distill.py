"""Distilling encoders: every loss by its definition, one sequence at a time, in float64; runs."""

import copy
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)

from conftest import make_prose
from example_rows import features, fit
from launching import TINY_BERT, checkpoints, metrics, run, state, steps, tiny_run
from masking import ExampleMaker, MaskingArguments
from recipes.bert import distill
from recipes.bert.distill import Arguments, DistillationLoss, observed
from sentence_encoder import SentenceEncoder
from utils.divergences import add_projection
from utils.loss import IGNORE_INDEX
from utils.stream import collate

DISTILL = "recipes/bert/distill.py"
TEACHER = TINY_BERT["model"] | {"num_hidden_layers": 4, "vocab_size": 320}
NARROW = TINY_BERT["model"] | {"hidden_size": 16, "vocab_size": 320}
WEIGHTS = {
    "soft_weight": 5.0,
    "hard_weight": 2.0,
    "cosine_weight": 1.0,
    "hidden_weight": 0.5,
    "attention_weight": 0.25,
    "relation_weight": 3.0,
}
LAYERS = [2, 4]
EVERYTHING = WEIGHTS | {
    "temperature": 2.0,
    "relation_heads": 8,
    "relation_layer": 3,
    "layer_map": LAYERS,
}


def build(settings, seed=0, auto_model=AutoModelForMaskedLM):
    config = AutoConfig.for_model(**(settings | {"pad_token_id": 0}))
    torch.manual_seed(seed)
    model = auto_model.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # whatever is computed is to have an effect
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def batch(wordpiece):
    """batch(packing, objective): 12 masked examples in rows of 64 tokens."""
    sentences = SentenceEncoder(wordpiece)([d["text"] for d in make_prose("document", 12)])

    def make(packing, objective="mlm"):
        maker = ExampleMaker(wordpiece, MaskingArguments(objective=objective))
        made = list(islice(maker(sentences, range(12), 40, 0, "test"), 12))
        return collate([features(group, 64) for group in fit(made, 64, packing)])

    return make


def objective_of(student=NARROW, teacher=TEACHER, layers=LAYERS, packing=True, **settings):
    arguments = Arguments(packing=packing, **(EVERYTHING | settings))
    model = build(student, auto_model=arguments.auto_model)
    teacher = build(teacher, seed=1, auto_model=arguments.auto_model).requires_grad_(False)
    projection = add_projection(model, teacher, 0)
    return DistillationLoss(
        model, observed(teacher, layers, arguments), projection, layers, arguments
    )


def total(objective, batch):
    sums, counts = objective(**batch), objective.counts(batch)
    return sum(w * sums[name] / counts[name] for name, w in objective.weights.items())


def reference(objective, batch, soft_tokens="all"):
    """(sum of each loss, what it is divided by): of each sequence alone, dense, in float64."""
    student = copy.deepcopy(objective.model).double()
    teacher = copy.deepcopy(objective.taught.model).double()
    for model in (student, teacher):
        model.base_model._forward_hooks.clear()
    projection = getattr(student, "distillation_projection", lambda x: x)
    names = [
        f"{name}_loss" for name in ("hard", "soft", "cosine", "hidden", "attention", "relation")
    ]
    sums = dict.fromkeys(names, 0.0)
    tokens = targets = 0
    for ids, row_labels, numbers in zip(
        batch["input_ids"], batch["labels"], batch["sequence_ids"], strict=True
    ):
        for number in range(1, int(numbers.max()) + 1):
            of, labels = ids[numbers == number], row_labels[numbers == number]
            masked = labels != IGNORE_INDEX
            tokens, targets = tokens + len(of), targets + int(masked.sum())
            s, t = (m(of[None].long(), output_hidden_states=True) for m in (student, teacher))
            log_p = log_softmax(s.logits[0], -1)
            sums["hard_loss"] -= log_p[masked, labels[masked].long()].sum()
            log_p, log_q = (log_softmax(x.logits[0] / 2, -1) for x in (s, t))
            of_soft = masked if soft_tokens == "masked" else slice(None)
            soft = kl_div(log_p[of_soft], log_q[of_soft], log_target=True, reduction="sum")
            sums["soft_loss"] += 4 * soft
            last = [x.hidden_states[-1][0] for x in (s, t)]
            sums["cosine_loss"] += (1 - cosine_similarity(projection(last[0]), last[1])).sum()
            squares = [
                (projection(s.hidden_states[mine][0]) - t.hidden_states[theirs][0]).square()
                for mine, theirs in enumerate([0, *LAYERS])
            ]
            sums["hidden_loss"] += sum(x.mean(1).sum() for x in squares) / 3
            for mine, theirs in enumerate(LAYERS, 1):
                scores = []
                for query, key, _ in (projected(student, s, mine), projected(teacher, t, theirs)):
                    q, k = (heads(x, 2) for x in (query, key))
                    scores.append(q @ k.transpose(1, 2) / q.shape[2] ** 0.5)
                difference = (scores[0] - scores[1]).square()
                sums["attention_loss"] += difference.mean((0, 2)).sum() / 2
            pair = projected(student, s, 2), projected(teacher, t, 3)
            for mine, theirs in zip(*pair, strict=True):
                p, q = (heads(x, 8) for x in (mine, theirs))
                p, q = (log_softmax(x @ x.transpose(1, 2) / x.shape[2] ** 0.5, -1) for x in (p, q))
                sums["relation_loss"] += kl_div(p, q, log_target=True, reduction="sum") / 8
    counts = dict.fromkeys(names, tokens) | {"hard_loss": targets}
    if soft_tokens == "masked":
        counts["soft_loss"] = targets
    return student, sums, counts


def projected(model, output, layer):
    """Queries, keys and values of a layer, from 1."""
    attention = model.bert.encoder.layer[layer - 1].attention.self
    inputs = output.hidden_states[layer - 1][0]
    return [part(inputs) for part in (attention.query, attention.key, attention.value)]


def heads(vectors, count):
    """(tokens, width) → (heads, tokens, width of a head)."""
    return vectors.view(len(vectors), count, -1).transpose(0, 1)


@pytest.mark.parametrize("soft_tokens", ["all", "masked"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_every_loss_and_its_gradient_are_those_of_its_definition(packing, soft_tokens, batch):
    rows = batch(packing)
    objective = objective_of(packing=packing, soft_tokens=soft_tokens)
    student, expected, counts = reference(objective, rows, soft_tokens)
    sums = objective(**rows)
    assert objective.counts(rows) == counts
    assert {*sums} == {*objective.names} == {*expected}
    for name, value in expected.items():
        assert value > 0.1
        assert sums[name].item() == pytest.approx(value.item(), rel=2e-6), name
    # each by itself, to the last parameter
    for name, value in expected.items():
        mine, theirs = gradients(objective.model, sums[name]), gradients(student, value)
        largest = max(gradient.norm() for gradient in theirs.values())
        for key, gradient in theirs.items():
            assert (mine[key] - gradient).norm() < 1e-5 * gradient.norm() + 1e-7 * largest, key


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("model_type", "objective"),
    [("bert", "mlm_nsp"), ("albert", "mlm_sop"), ("big_bird", "mlm_nsp")],
)
def test_pairs_teach_as_their_tokens_do(model_type, objective, packing, batch):
    """Beside the forward of transformers, one sequence at a time, dense, in float64."""
    rows, kind = (
        batch(packing, objective),
        {"model_type": model_type, "attention_type": "original_full"},
    )
    settings = {"objective": objective, "attention_weight": 0.0, "relation_weight": 0.0}
    loss = objective_of(NARROW | kind, TEACHER | kind, packing=packing, **settings)
    for model in (loss.model, loss.taught.model):
        for name, parameter in model.named_parameters():
            if "seq_relationship" in name or "sop_classifier" in name:
                parameter.data *= 30  # of new ones the probabilities are almost equal
    term = objective.removeprefix("mlm_")
    names = ("soft_loss", f"soft_{term}_loss", f"hard_{term}_loss")
    expected, pairs = dict.fromkeys(names, 0.0), 0
    both = [copy.deepcopy(model).double() for model in (loss.model, loss.taught.model)]
    for model in both:
        model.base_model._forward_hooks.clear()
    for row in range(len(rows["input_ids"])):
        numbers = rows["sequence_ids"][row]
        for number in range(1, int(numbers.max()) + 1):
            of = {key: values[row][numbers == number].long() for key, values in rows.items()}
            inputs = {key: of[key][None] for key in ("input_ids", "token_type_ids")}
            found = [model(**inputs) for model in both]
            tokens = [x.prediction_logits[0] for x in found]
            of_pairs = [x.get("seq_relationship_logits", x.get("sop_logits")) for x in found]
            label = of["pair_labels"][:1]
            is_pair = [of_pairs] if label.item() != IGNORE_INDEX else []
            for name, logits in zip(names, [tokens, *is_pair], strict=False):
                p, q = (log_softmax(x / 2, -1) for x in logits)
                expected[name] += 4 * kl_div(p, q, log_target=True, reduction="sum")
            for student, _ in is_pair:
                expected[names[2]] += cross_entropy(student, label, reduction="sum")
                pairs += 1
    found, counts = loss(**rows), loss.counts(rows)
    assert counts["hard_loss"] < counts["soft_loss"] == int((rows["sequence_ids"] > 0).sum())
    assert counts[names[1]] == counts[names[2]] == pairs > 4
    assert [loss.weights[name] for name in names] == [5.0, 5.0, 2.0]
    for name, value in expected.items():
        assert value > 0.01
        assert found[name].item() == pytest.approx(value.item(), rel=2e-6), name
        mine, theirs = gradients(loss.model, found[name]), gradients(both[0], value)
        largest = max(gradient.norm() for gradient in theirs.values())
        for key, gradient in theirs.items():
            assert (mine[key] - gradient).norm() < 1e-5 * gradient.norm() + 1e-7 * largest, key


def test_what_has_no_weight_is_not_computed_of_pairs_either(batch):
    settings = {"objective": "mlm_nsp", "soft_weight": 0.0}
    rows, loss = batch(True, "mlm_nsp"), objective_of(**settings)
    assert {*loss(**rows)} == {*loss.counts(rows)} == {*loss.names}
    assert "hard_nsp_loss" in loss.names
    assert not [name for name in loss.names if name.startswith("soft")]


def gradients(model, loss):
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), None, True, allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {key: torch.zeros_like(p) if g is None else g for (key, p), g in pairs}


@pytest.mark.parametrize("model_type", ["roberta", "distilbert", "electra", "albert", "modernbert"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_give_the_numbers_of_padded_ones(model_type, attention, batch):
    """With the queries and keys of any attention of transformers: fused, shared, rotary."""
    settings = {**TEACHER, "model_type": model_type, "max_position_embeddings": 72}
    if model_type == "modernbert":
        names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
        settings |= {"local_attention": 128, **dict.fromkeys(names, 1)}
    student = settings | {"num_hidden_layers": 2, "attn_implementation": attention}
    found = []
    for packing in (True, False):
        objective = objective_of(student, settings, packing=packing)
        rows = batch(packing)
        found.append((objective(**rows), gradients(objective.model, total(objective, rows))))
    for name, value in found[0][0].items():
        assert value.item() == pytest.approx(found[1][0][name].item(), rel=1e-5), name
    largest = max(gradient.norm() for gradient in found[1][1].values())
    for key, gradient in found[1][1].items():
        assert (found[0][1][key] - gradient).norm() < 1e-4 * gradient.norm() + 1e-6 * largest, key


def test_scores_are_those_that_become_probabilities(batch):
    """Of ModernBERT, whose queries and keys are one projection and turned by their positions."""
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "local_attention")
    settings = {**TEACHER, "model_type": "modernbert", **dict.fromkeys(names[:4], 1), names[4]: 256}
    objective = objective_of(settings, settings, [1, 2, 3, 4])
    rows = {name: values[:1] for name, values in batch(False).items()}
    size = int((rows["sequence_ids"] > 0).sum())
    rows = {name: values[:, :size] for name, values in rows.items()}
    objective.packing = False
    objective.taught.packing = False
    model = objective.taught.model
    found = objective.taught(**rows).attention
    model.set_attn_implementation("eager")
    output = model(rows["input_ids"], output_attentions=True)
    assert len(output.attentions) == len(found) == 4
    for layer, probabilities in enumerate(output.attentions, 1):
        torch.testing.assert_close(found[layer].scores().softmax(-1), probabilities)


def test_activations_that_are_computed_again_change_nothing(batch):
    objective, rows = objective_of(), batch(True)
    found = []
    for enable in (False, True):
        if enable:
            objective.model.gradient_checkpointing_enable({"use_reentrant": False})
        objective.train()
        found.append(gradients(objective.model, total(objective, rows)))
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient)


def test_the_teacher_is_out_of_reach(batch):
    """Of `train()`, of gradients and of the parameters; the student drops out, it does not."""
    dropping = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    objective, rows = objective_of(NARROW | dropping, TEACHER | dropping), batch(True)
    seen = []
    objective.taught.model.register_forward_hook(lambda *given: seen.append(given[-1].logits))
    objective.train()
    losses = [total(objective, rows) for _ in range(2)]
    assert losses[0] != losses[1]
    assert torch.equal(*seen)
    losses[0].backward()
    teacher = objective.taught.model
    assert not any(module.training for module in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not {*map(id, objective.parameters())} & {*map(id, teacher.parameters())}
    assert {*objective.state_dict()} == {f"model.{key}" for key in objective.model.state_dict()} | {
        f"projection.{key}" for key in objective.projection.state_dict()
    }


def test_what_projects_is_of_the_students_dtype():
    """ZeRO-3 splits all weights together, and takes but one."""
    student, teacher = build(NARROW).to(torch.bfloat16), build(TEACHER)
    assert add_projection(student, teacher, 0).weight.dtype == torch.bfloat16
    assert isinstance(add_projection(teacher, teacher, 0), torch.nn.Identity)


def test_rows_without_any_target_count_nothing(batch):
    objective = objective_of()
    rows = collate([features([], 64)])
    sums = objective(**rows)
    assert {name: value.item() for name, value in sums.items()} == dict.fromkeys(sums, 0)
    assert objective.counts(rows) == dict.fromkeys(sums, 0)
    sum(sums.values()).backward()
    assert all(p.grad is None or not p.grad.any() for p in objective.parameters())


# runs


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory, wordpiece):
    folder = tmp_path_factory.mktemp("teacher") / "model"
    build(TEACHER, seed=1).save_pretrained(folder)
    wordpiece.save_pretrained(folder)
    return folder


SETTINGS = {
    "teacher.model_name_or_path": "TEACHER",
    "student_layers": [0, 2],
    "max_steps": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    **WEIGHTS,
    "relation_heads": 8,
}


def words(folder, teacher, prose_folder, tokenizer, **settings):
    values = {name: value for name, value in (SETTINGS | settings).items() if value is not None}
    given = values.get("teacher.model_name_or_path")
    values |= {"teacher.model_name_or_path": str(teacher)} if given == "TEACHER" else {}
    listed = tiny_run(folder, prose_folder / "train.jsonl", tokenizer, **values)
    if "model" in values:
        return listed
    place = listed.index("--model")  # a student of its own is given by none of these tests
    return listed[:place] + listed[place + 2 :]


@pytest.fixture
def distil(call, prose_folder, wordpiece_folder, teacher_folder, tmp_path):
    """distil(name, **settings): the recipe; null leaves a setting out."""

    def start(name="run", **settings):
        folder = tmp_path / name
        settings = {"output_dir": str(folder)} | settings
        tokenizer = settings.pop("tokenizer", wordpiece_folder)
        output_dir = settings.pop("output_dir")
        line = words(output_dir, teacher_folder, prose_folder, tokenizer, **settings)
        return call(distill.main, line, folder)

    return start


@pytest.mark.parametrize("objective", ["mlm", "mlm_nsp"])
def test_a_student_that_is_its_teacher_has_no_loss_and_does_not_move(
    objective, distil, teacher_folder, wordpiece, tmp_path
):
    if objective == "mlm_nsp":
        teacher_folder = tmp_path / "teacher"
        build(TEACHER, auto_model=AutoModelForPreTraining).save_pretrained(teacher_folder)
        wordpiece.save_pretrained(teacher_folder)
    settings = {"objective": objective, "teacher.model_name_or_path": str(teacher_folder)}
    ended = distil(student_layers=[0, 1, 2, 3], hard_weight=0.0, weight_decay=0.0, **settings)
    assert ended.status == 0, ended.error
    pairs = ("soft_nsp",) if objective == "mlm_nsp" else ()
    for record in steps(ended.folder):
        assert record["loss"] == record["grad_norm"] == 0
        for name in ("soft", "cosine", "hidden", "attention", "relation", *pairs):
            assert record[f"{name}_loss"] == 0
        assert record["hard_loss"] > 1
        assert not pairs or record["hard_nsp_loss"] > 0.1
    given, trained = (
        load_file(f / "model.safetensors") for f in (teacher_folder, ended.folder / "model")
    )
    assert given.keys() == trained.keys()
    assert all(torch.equal(trained[key], tensor) for key, tensor in given.items())


def test_a_run_learns_resumes_and_exports_what_clients_read(
    distil, prose_folder, teacher_folder, tmp_path
):
    """Of a narrower student: what it is projected with is in checkpoints and not in the export."""
    validation = [{"path": str(prose_folder / "validation.jsonl")}]
    model = {**NARROW, "num_attention_heads": 2}
    settings = {"student_layers": None, "model": model, "max_steps": 20, "save_steps": 8}
    settings |= {"test_sources": validation, "validation_sources": validation, "eval_steps": 10}
    ended = distil("whole", **settings, keep_last=9)
    assert ended.status == 0, ended.error
    records = steps(ended.folder)
    for name in ("soft", "cosine", "hidden", "attention", "relation"):
        first, last = (np.mean([r[f"{name}_loss"] for r in p]) for p in (records[:3], records[-3:]))
        assert last < first, name
    for record in records:
        weighted = [
            w * record[f"{name.removesuffix('_weight')}_loss"] for name, w in WEIGHTS.items()
        ]
        assert record["loss"] == pytest.approx(sum(weighted), rel=1e-5)
    assert "teacher mlm loss of the test documents" in ended.output

    trained, report = AutoModelForMaskedLM.from_pretrained(
        ended.folder / "model", output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    assert trained.config.hidden_size == 16
    assert not any(
        "projection" in key for key in load_file(ended.folder / "model" / "model.safetensors")
    )

    found = checkpoints(ended.folder)[0]
    copied = tmp_path / "copied"
    shutil.copytree(found, copied / "checkpoints" / found.name)
    size = state(found)["counters"]["metrics_size"]
    (copied / "metrics.jsonl").write_bytes((ended.folder / "metrics.jsonl").read_bytes()[:size])
    resumed = distil("copied", **settings, keep_last=9)
    assert resumed.status == 0, resumed.error
    assert f"continuing {copied / 'checkpoints' / found.name}" in resumed.output
    assert metrics(copied) == metrics(ended.folder)
    weights = [folder / "model" / "model.safetensors" for folder in (copied, ended.folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    changed = distil("copied", **settings | {"soft_tokens": "masked", "max_steps": 30})
    assert changed.status == 2
    assert "soft_tokens was all and is masked" in changed.error


def test_a_carved_student_begins_with_layers_of_the_teacher(distil, teacher_folder):
    ended = distil(student_layers=[0, 3], max_steps=1)
    assert ended.status == 0, ended.error
    given = load_file(teacher_folder / "model.safetensors")
    student = load_file(ended.folder / "student" / "model.safetensors")
    for key, tensor in student.items():
        assert torch.equal(tensor, given[key.replace("layer.1.", "layer.3.")]), key
    assert len({key.split("layer.")[1][0] for key in student if "layer." in key}) == 2
    assert any(
        not torch.equal(t, student[k])
        for k, t in load_file(ended.folder / "model" / "model.safetensors").items()
    )


def test_a_student_that_was_not_trained_is_carved_anew(distil, teacher_folder):
    """A start may have been killed before its first checkpoint, and its layers may be others."""
    given = load_file(teacher_folder / "model.safetensors")
    for layer in (1, 3):
        ended = distil(student_layers=[layer], max_steps=1)
        assert ended.status == 0, ended.error
        student = load_file(ended.folder / "student" / "model.safetensors")
        key = "bert.encoder.layer.{}.output.dense.weight"
        assert torch.equal(student[key.format(0)], given[key.format(layer)])
        for path in ended.folder.iterdir():
            if path.is_file():
                path.unlink()
            elif path.name != "student":
                shutil.rmtree(path)


LAUNCHES = {"multi_cpu": {"hidden_weight": 1.0}, "zero1": WEIGHTS, "zero3": WEIGHTS}


@pytest.mark.parametrize("config", LAUNCHES)
def test_two_processes_are_as_one(
    config, distil, tmp_path, teacher_folder, prose_folder, wordpiece_folder
):
    """Whatever is learnt, no weight is left without a gradient; ZeRO-3 splits both models."""
    settings = {
        "teacher.model_name_or_path": None,
        "teacher.model": TEACHER | {"hidden_size": 64, "vocab_size": 2048},
        "student_layers": None,
        "model": NARROW | {"vocab_size": 2048},
        "max_steps": 3,
        **dict.fromkeys(WEIGHTS, 0.0),
        **LAUNCHES[config],
    }
    one = distil("one", **settings)
    assert one.status == 0, one.error
    line = words(tmp_path / "two", teacher_folder, prose_folder, wordpiece_folder, **settings)
    run(config, 2, line, tmp_path / "log.txt", script=DISTILL)
    one, two = steps(one.folder), steps(tmp_path / "two")
    assert len(one) == 3
    assert one[0].keys() == two[0].keys()
    for key in one[0]:
        expected = [record[key] for record in one]
        np.testing.assert_allclose([r[key] for r in two], expected, rtol=1e-5, err_msg=key)


SCRATCH = {"teacher.model_name_or_path": None}
OTHER_HEADS = {"student_layers": None, "model": NARROW | {"num_attention_heads": 4}}
REFUSED = [
    ({"temperature": 0}, "temperature must be more than 0, not 0"),
    ({"temperature": -1.5}, "temperature must be more than 0, not -1.5"),
    ({"cosine_weight": -1.0}, "cosine_weight must be 0 or more, not -1.0"),
    (
        dict.fromkeys(WEIGHTS, 0.0),
        "soft_weight, hard_weight, hidden_weight, cosine_weight, attention_weight, "
        "relation_weight: all are 0: there is nothing to learn",
    ),
    ({"objective": "mlm_nsp"}, "has no cls.seq_relationship.bias: it is of another task"),
    ({"student_layers": [0, 4]}, "student_layers: [0, 4] are not among the teacher's 0 to 3"),
    ({"layer_map": [2, 5]}, "layer_map: [2, 5] must name for each of the student's 2 layers one"),
    ({"layer_map": [4]}, "layer_map: [4] must name for each of the student's 2 layers one of the"),
    ({"relation_layer": 5}, "relation_layer: 5 is not among the teacher's 1 to 4"),
    ({"relation_layer": 0}, "relation_layer must be at least 1, not 0"),
    ({"relation_heads": 0}, "relation_heads must be at least 1, not 0"),
    ({"relation_heads": 48}, "relation_heads: 48 do not divide the student's width of 32"),
    (OTHER_HEADS, "attention_weight: the student has 4 heads a layer and the teacher 2: make"),
    ({"torch_compile": True}, "torch_compile: attention_weight and relation_weight look into the"),
    (SCRATCH, "teacher: give its model_name_or_path, or a model from scratch"),
    (SCRATCH | {"teacher.model": TEACHER, "teacher.dtype": "4bit"}, "teacher.dtype: 4bit is for"),
    ({"teacher.model": TEACHER}, "teacher: give its model_name_or_path, or a model from scratch"),
    (
        {"model_name_or_path": "TEACHER"},
        "student_layers: model_name_or_path and model are students",
    ),
    (
        {"teacher.model_name_or_path": "OWN"},
        "is in the output_dir of its own student: name another",
    ),
    (
        {"teacher.model_name_or_path": "HEADLESS"},
        "cls.predictions.bias: it is of another task",
    ),
    ({"teacher.model_name_or_path": "OTHER"}, "is not that of"),
    (
        {"teacher.model_name_or_path": "SHORT"},
        "64 is more than the model's max_position_embeddings",
    ),
    (
        SCRATCH | {"teacher.model": TEACHER | {"model_type": "deberta"}},
        "teacher: model: deberta cannot be trained on packed rows",
    ),
    (
        SCRATCH | {"teacher.model": TEACHER | {"model_type": "deberta"}, "packing": False},
        "teacher: model: deberta has an attention of its own, which attention_weight and",
    ),
]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, teacher_folder, wordpiece):
    """What cannot teach: one without a head, one of another tokenizer, one of shorter rows."""
    folder = tmp_path_factory.mktemp("teachers")
    headless = AutoModelForSequenceClassification.from_pretrained(teacher_folder)
    build(TEACHER | {"max_position_embeddings": 40}).save_pretrained(folder / "SHORT")
    for model, name in ((headless, "HEADLESS"), (build(TEACHER), "OTHER")):
        model.save_pretrained(folder / name)
    for name in ("HEADLESS", "SHORT"):
        wordpiece.save_pretrained(folder / name)
    vocabulary = wordpiece.get_vocab()
    first, second = (t for t, i in sorted(vocabulary.items(), key=lambda x: x[1])[40:42])
    swapped = vocabulary | {first: vocabulary[second], second: vocabulary[first]}
    type(wordpiece)(vocab=swapped, do_lower_case=True).save_pretrained(folder / "OTHER")
    return {name: str(folder / name) for name in ("HEADLESS", "OTHER", "SHORT")}


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_bad_input_is_one_message(settings, message, distil, teachers, teacher_folder, tmp_path):
    own = tmp_path / "run" / "model"
    places = teachers | {"OWN": str(own), "TEACHER": str(teacher_folder)}
    if "OWN" in settings.values():
        shutil.copytree(teacher_folder, own)
    settings = {
        key: places.get(value, value) if isinstance(value, str) else value
        for key, value in settings.items()
    }
    ended = distil(**{"sequence_length": 64} | settings)
    assert ended.status == 2, ended.error
    (line,) = [line for line in ended.error.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not [path for path in (tmp_path / "run").rglob("*") if own not in (path, *path.parents)]
