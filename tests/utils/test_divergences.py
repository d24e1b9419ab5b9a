from itertools import product

import pytest
import torch
from torch.nn.functional import cross_entropy

from top_tokens import top_tokens
from utils import divergences
from utils.divergences import Divergence, Logits, summed_losses
from utils.loss import IGNORE_INDEX

ROWS, WIDTH, VOCABULARY = 30, 8, 70
KINDS = [
    *product(("forward_kl", "reverse_kl", "tvd"), [0.5]),
    *product(["jsd"], [0, 0.1, 0.5, 0.9, 1]),
]
kinds = pytest.mark.parametrize(("kind", "beta"), KINDS, ids=str)
temperatures = pytest.mark.parametrize("temperature", [1.0, 0.05, 2.0, 7.0])


@pytest.fixture(params=[1, 7, ROWS, 10 * ROWS], ids=lambda rows: f"{rows} rows a chunk")
def chunks(request, monkeypatch):
    elements = request.param * VOCABULARY + VOCABULARY // 2
    monkeypatch.setattr(divergences, "CHUNK_ELEMENTS", elements)


def projection(seed, dtype=torch.float32, width=WIDTH, vocabulary=VOCABULARY, size=1.0):
    draw = torch.Generator().manual_seed(seed)
    shapes = (ROWS, width), (vocabulary, width), (vocabulary,)
    tensors = [size * torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    return Logits(*(tensor.to(dtype).requires_grad_() for tensor in tensors))


def dense(logits):
    """In float64, from the very numbers that the chunked one is given."""
    hidden, weight, bias = (tensor.double() for tensor in logits[:3])
    z = (hidden @ weight.T + bias) * logits.scale
    return z if logits.cap is None else logits.cap * torch.tanh(z / logits.cap)


def divergence(student, teacher, kind, beta, temperature):
    """By the definitions, of dense logits in float64: of each row."""
    log_p, log_q = (torch.log_softmax(z / temperature, -1) for z in (student, teacher))
    p, q = log_p.exp(), log_q.exp()
    kl = torch.nn.functional.kl_div
    if kind == "tvd":
        found = (p - q).abs().sum(-1) / 2
    elif kind == "forward_kl" or (kind, beta) == ("jsd", 0):
        found = kl(log_p, log_q, log_target=True, reduction="none").sum(-1)
    elif kind == "reverse_kl" or (kind, beta) == ("jsd", 1):
        found = kl(log_q, log_p, log_target=True, reduction="none").sum(-1)
    else:
        log_m = ((1 - beta) * p + beta * q).log()
        to_teacher = kl(log_m, log_q, log_target=True, reduction="none").sum(-1)
        found = beta * to_teacher + (1 - beta) * (p * (log_p - log_m)).sum(-1)
    return found * temperature**2


def gradients(value, *tensors):
    return torch.autograd.grad(value, tensors)


def assert_near(mine, theirs, tolerance=1e-6):
    for ours, expected in zip(mine, theirs, strict=True):
        assert (ours.double() - expected).norm() <= tolerance * expected.norm() + 1e-12


@kinds
@temperatures
def test_a_divergence_and_its_gradient_are_those_of_its_definition(chunks, kind, beta, temperature):
    student, teacher = projection(0, torch.float64), projection(1, torch.float64, width=5)
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(2))
    given = Divergence(kind, beta, temperature)
    _, value = summed_losses(student, None, teacher, given, weights)
    of_rows = divergence(dense(student), dense(teacher), kind, beta, temperature)
    expected = (weights.double() * of_rows).sum()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    ours = gradients(0.25 * value + value, *student[:3])
    assert_near(ours, gradients(1.25 * expected, *student[:3]), 1e-9)


@kinds
def test_in_float32_it_is_exact_to_a_millionth(chunks, kind, beta):
    student, teacher = projection(0), projection(1)
    _, value = summed_losses(student, None, teacher, Divergence(kind, beta, 2.0))
    expected = divergence(dense(student), dense(teacher), kind, beta, 2.0).sum()
    assert value.dtype == torch.float32
    assert abs(value.double() / expected - 1) < 1e-6
    assert_near(gradients(value, *student[:3]), gradients(expected, *student[:3]), 2e-6)


@kinds
@pytest.mark.parametrize("types", list(product([torch.float32, torch.bfloat16], repeat=2)), ids=str)
def test_mixed_precisions(kind, beta, types):
    """Softmax is in float32, whatever the hidden states: only the logits are rounded."""
    student, teacher = projection(0, types[0], size=0.5), projection(1, types[1], size=0.5)
    _, value = summed_losses(student, None, teacher, Divergence(kind, beta))
    rounded = [dense(x).to(x.hidden.dtype).double() for x in (student, teacher)]
    expected = divergence(*rounded, kind, beta, 1.0).sum()
    assert abs(value.double() / expected - 1) < (1e-6 if {*types} == {torch.float32} else 5e-3)
    assert all(g.isfinite().all() for g in gradients(value, *student[:3]))


@kinds
def test_near_convergence_it_is_neither_negative_nor_noise(kind, beta):
    student = projection(0)
    moved = student.hidden.detach() + 1e-3 * projection(1).hidden.detach()
    teacher = student._replace(hidden=moved)
    for rows in range(ROWS):
        one, other = (x._replace(hidden=x.hidden[rows : rows + 1]) for x in (student, teacher))
        _, value = summed_losses(one, None, other, Divergence(kind, beta))
        expected = divergence(dense(one), dense(other), kind, beta, 1.0).sum()
        assert value >= 0
        assert abs(value - expected) < 1e-6 + 1e-3 * expected


@kinds
@temperatures
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(kind, beta, temperature):
    student = projection(0)
    _, value = summed_losses(student, None, student, Divergence(kind, beta, temperature))
    assert value.item() == 0
    assert (
        all(not g.any() for g in gradients(value, *student[:3]))
        or max(g.abs().max() for g in gradients(value, *student[:3])) < 1e-5 * temperature
    )


def test_student_and_teacher_are_not_swapped():
    """KL(teacher ‖ student) is what forward is: it punishes where the student has nothing."""
    student = Logits(torch.tensor([[0.0, -30.0]], requires_grad=True))
    teacher = Logits(torch.tensor([[0.0, 0.0]]))
    forward, reverse = (
        summed_losses(student, None, teacher, Divergence(kind))[1].item()
        for kind in ("forward_kl", "reverse_kl")
    )
    assert forward == pytest.approx(15 - 0.6931, abs=1e-3)
    assert reverse == pytest.approx(0.6931, abs=1e-3)


def test_jsd_over_its_weights_tends_to_both_divergences():
    student, teacher = (projection(seed, torch.float64, size=0.3) for seed in (0, 1))

    def value(kind, beta=0.5):
        return summed_losses(student, None, teacher, Divergence(kind, beta))[1].item()

    for beta, kind in ((1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")):
        found = value("jsd", beta) / (beta * (1 - beta))
        assert found == pytest.approx(value(kind), rel=1e-4)
    assert value("jsd", 0) == value("forward_kl")
    assert value("jsd", 1) == value("reverse_kl")


@kinds
@temperatures
def test_gradients_are_those_of_finite_differences(kind, beta, temperature):
    draw = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 3, 5, generator=draw, dtype=torch.float64).unbind()

    def function(z):
        return summed_losses(Logits(z), None, Logits(teacher), Divergence(kind, beta, temperature))[
            1
        ]

    assert torch.autograd.gradcheck(function, logits.requires_grad_())


@kinds
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("change", [(0.5, None), (1.0, 3.0), (2.0, 5.0)], ids=str)
def test_labels_and_teacher_in_one_pass_of_scaled_and_capped_logits(
    chunks, kind, beta, temperature, change
):
    student = projection(0, torch.float64)._replace(scale=change[0], cap=change[1])
    teacher = projection(1, torch.float64)._replace(cap=change[1])
    labels = torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(0))
    labels[::4] = IGNORE_INDEX
    given = Divergence(kind, beta, temperature)
    hard, soft = summed_losses(student, labels, teacher, given, None, 0.3, 1.7)
    expected = (
        cross_entropy(dense(student), labels, ignore_index=IGNORE_INDEX, reduction="sum"),
        divergence(dense(student), dense(teacher), kind, beta, temperature).sum(),
    )
    torch.testing.assert_close((hard, soft), expected, rtol=1e-9, atol=0)
    ours = gradients(2 * (0.3 * hard + 1.7 * soft), *student[:3])
    theirs = gradients(2 * (0.3 * expected[0] + 1.7 * expected[1]), *student[:3])
    assert_near(ours, theirs, 1e-9)


def test_other_weights_than_those_it_was_told_are_an_error():
    student, teacher = projection(0), projection(1)
    labels = torch.zeros(ROWS, dtype=torch.long)
    hard, soft = summed_losses(student, labels, teacher, Divergence(), None, 1.0, 2.0)
    with pytest.raises(RuntimeError):
        (hard + soft).backward()


def test_what_has_no_weight_is_measured_and_gives_zeros():
    """Not None: DistributedDataParallel waits for a gradient of every parameter."""
    student, teacher = projection(0), projection(1)
    labels = torch.zeros(ROWS, dtype=torch.long)
    hard, soft = summed_losses(student, labels, teacher, Divergence(), None, 0.0, 0.0)
    (alone, _) = summed_losses(student, labels, hard_weight=0.0)
    assert hard == alone > 0 < soft
    for value in (0.0 * hard + 0.0 * soft, 0.0 * alone):
        for gradient, tensor in zip(gradients(value, *student[:3]), student, strict=False):
            assert gradient.shape == tensor.shape
            assert not gradient.any()


@kinds
def test_vocabularies_that_differ_by_padding(chunks, kind, beta):
    """The divergence is over the tokens that both have, the labels' loss over the student's."""
    wide, narrow = (projection(i, torch.float64, vocabulary=n) for i, n in enumerate((70, 64)))
    labels = torch.arange(ROWS)
    for student, teacher in ((wide, narrow), (narrow, wide)):
        hard, soft = summed_losses(student, labels, teacher, Divergence(kind, beta))
        expected = (
            cross_entropy(dense(student), labels, reduction="sum"),
            divergence(dense(student)[:, :64], dense(teacher)[:, :64], kind, beta, 1.0).sum(),
        )
        torch.testing.assert_close((hard, soft), expected, rtol=1e-9, atol=0)
        assert_near(
            gradients(hard + soft, *student[:3]), gradients(sum(expected), *student[:3]), 1e-9
        )


@kinds
def test_masked_tokens_of_a_vocabulary(kind, beta):
    """Some models give -inf to tokens that are none: no NaN, and none of it in the gradient."""
    masked = torch.zeros(6).masked_fill_(torch.arange(6) > 3, -torch.inf)
    draw = torch.Generator().manual_seed(0)
    raw, other = torch.randn(2, 4, 6, generator=draw).unbind()
    raw.requires_grad_()
    _, value = summed_losses(
        Logits(raw + masked), None, Logits(other + masked), Divergence(kind, beta)
    )
    (gradient,) = gradients(value, raw)
    expected = divergence(raw[:, :4].double(), other[:, :4].double(), kind, beta, 1.0).sum()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all()
    assert not gradient[:, 4:].any()


@kinds
@temperatures
def test_all_tokens_of_a_cache_are_the_dense_divergence(chunks, kind, beta, temperature):
    student, teacher = projection(0, torch.float64), projection(1, torch.float64)
    given = Divergence(kind, beta, temperature)
    _, value = summed_losses(student, None, top_tokens(teacher, VOCABULARY, temperature), given)
    _, expected = summed_losses(student, None, teacher, given)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    assert_near(gradients(value, *student[:3]), gradients(expected, *student[:3]), 1e-9)


@kinds
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, VOCABULARY - 1])
def test_all_tokens_that_were_cut_off_are_one(chunks, kind, beta, temperature, k):
    student, teacher = projection(0, torch.float64), projection(1, torch.float64)
    kept = top_tokens(teacher, k, temperature)
    _, value = summed_losses(student, None, kept, Divergence(kind, beta, temperature))

    def merged(logits):
        """Logits of the tokens that are kept, and one more that weighs what all others weigh."""
        z = logits / temperature
        others = z.scatter(1, kept.token_ids, -torch.inf).logsumexp(1, keepdim=True)
        return temperature * torch.cat([z.gather(1, kept.token_ids), others], 1)

    expected = divergence(merged(dense(student)), merged(dense(teacher)), kind, beta, temperature)
    torch.testing.assert_close(value, expected.sum(), rtol=1e-8, atol=1e-12)
    assert_near(gradients(value, *student[:3]), gradients(expected.sum(), *student[:3]), 1e-7)
    assert value >= 0


@kinds
def test_rows_come_to_the_same_sum_however_they_are_split(kind, beta):
    student, teacher = projection(0), projection(1)
    _, whole = summed_losses(student, None, teacher, Divergence(kind, beta))
    parts = [
        summed_losses(
            student._replace(hidden=student.hidden[part]),
            None,
            teacher._replace(hidden=teacher.hidden[part]),
            Divergence(kind, beta),
        )[1]
        for part in (slice(0, 11), slice(11, 12), slice(12, None), slice(0, 0))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)
    assert_near(gradients(sum(parts), *student[:3]), gradients(whole, *student[:3]), 1e-6)
