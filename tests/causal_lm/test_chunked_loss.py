import pytest
import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from chunked_loss import summed_cross_entropy, token_scores
from utils import divergences
from utils.loss import IGNORE_INDEX

ROWS, HIDDEN, VOCABULARY = 50, 16, 90


@pytest.fixture(params=[1, 7, ROWS - 1, ROWS, 10 * ROWS], ids=lambda rows: f"{rows} rows a chunk")
def chunks(request, monkeypatch):
    elements = request.param * VOCABULARY + VOCABULARY // 2
    monkeypatch.setattr(divergences, "CHUNK_ELEMENTS", elements)


def inputs(dtype=torch.float32, bias=True, shape=(ROWS,)):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, HIDDEN, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=draw).to(dtype).requires_grad_()
    offset = torch.randn(VOCABULARY, generator=draw).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(VOCABULARY, shape, generator=draw)
    labels[torch.rand(shape, generator=draw) < 0.3] = IGNORE_INDEX
    return hidden, weight, labels, offset


def whole(hidden, weight, labels, bias=None, scale=1.0, cap=None, reduction="sum"):
    logits = linear(hidden, weight, bias).float() * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction
    )


# as Cohere, Gemma 2, Granite and one that has both scale and cap their logits
CHANGES = [(1.0, None), (0.0625, None), (1.0, 3.0), (1 / 8, None), (2.0, 5.0)]


def gradients(value, *tensors):
    return torch.autograd.grad(value, [tensor for tensor in tensors if tensor is not None])


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_value_and_gradients_are_those_of_cross_entropy(chunks, bias, change):
    hidden, weight, labels, offset = inputs(bias=bias)
    expected = whole(hidden, weight, labels, offset, *change)
    value = summed_cross_entropy(hidden, weight, labels, offset, *change)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    # a loss is scaled and added to others before its backward
    ours = gradients(0.25 * value + value, hidden, weight, offset)
    for mine, theirs in zip(ours, gradients(1.25 * expected, hidden, weight, offset), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert abs(mine.norm() / theirs.norm() - 1) < 1e-6


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_truth_as_whole_logits(chunks, dtype, change):
    hidden, weight, labels, _ = inputs(dtype, bias=False)
    truth = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    value = summed_cross_entropy(hidden, weight, labels, None, *change)
    exact = whole(*truth, labels, None, *change)
    epsilon = torch.finfo(dtype).eps
    assert abs(value / exact - 1) < epsilon
    for mine, theirs in zip(
        gradients(value, hidden, weight), gradients(exact, *truth), strict=True
    ):
        assert mine.dtype == dtype
        # the norm of the error: single elements near zero have no relative precision
        assert (mine.float() - theirs).norm() < 2 * epsilon * theirs.norm()


def test_weights_in_fp32_under_hidden_states_in_bf16(monkeypatch):
    """As autocast hands them over: over the chunks their gradient is summed in fp32."""
    monkeypatch.setattr(divergences, "CHUNK_ELEMENTS", VOCABULARY)
    hidden, weight, labels, _ = inputs(bias=False, shape=(1000,))
    low = hidden.detach().bfloat16().requires_grad_()
    value = summed_cross_entropy(low, weight, labels)
    truth = [x.detach().bfloat16().float().requires_grad_() for x in (low, weight)]
    exact = whole(*truth, labels)
    epsilon = torch.finfo(torch.bfloat16).eps
    assert abs(value / exact - 1) < epsilon
    hidden_gradient, weight_gradient = gradients(value, low, weight)
    assert (hidden_gradient.dtype, weight_gradient.dtype) == (torch.bfloat16, torch.float32)
    _, expected = gradients(exact, *truth)
    assert (weight_gradient - expected).norm() < 0.5 * epsilon * expected.norm()


def test_rows_that_are_all_ignored_add_nothing(chunks):
    hidden, weight, labels, offset = inputs()
    labels[:] = IGNORE_INDEX
    value = summed_cross_entropy(hidden, weight, labels, offset)
    assert value.item() == 0
    for gradient in gradients(value, hidden, weight, offset):
        assert not gradient.any()


def test_extreme_logits_stay_finite(chunks):
    hidden, weight, labels, _ = inputs(bias=False)
    with torch.no_grad():
        hidden *= 1e3
    value, expected = summed_cross_entropy(hidden, weight, labels), whole(hidden, weight, labels)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients(value, hidden, weight))


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, labels, _ = inputs(bias=False)
    value = summed_cross_entropy(hidden, weight.detach(), labels)
    (gradient,) = gradients(value, hidden)
    (expected,) = gradients(whole(hidden, weight.detach(), labels), hidden)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not summed_cross_entropy(hidden, weight, labels).requires_grad


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_loss_of_each_token(chunks, change):
    hidden, weight, labels, offset = inputs(shape=(5, ROWS // 5))
    losses, _ = token_scores(hidden, weight, labels, offset, *change)
    expected = whole(hidden, weight, labels, offset, *change, "none").view(labels.shape)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    assert not losses.requires_grad
    assert not losses[labels == IGNORE_INDEX].any()
    total = summed_cross_entropy(hidden, weight, labels, offset, *change)
    torch.testing.assert_close(losses.sum(), total.detach(), rtol=1e-6, atol=0)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("function", [summed_cross_entropy, token_scores])
def test_no_tensor_is_larger_than_a_chunk(function, monkeypatch):
    monkeypatch.setattr(divergences, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    hidden, weight, labels, _ = inputs(bias=False)
    with LargestTensor() as largest:
        value = function(hidden, weight, labels)
        if function is summed_cross_entropy:
            value.backward()
    assert largest.elements == max(weight.numel(), hidden.numel(), 4 * VOCABULARY)
    narrow = [tensor.detach()[:, :1].clone() for tensor in (hidden, weight)]
    with LargestTensor() as largest:  # beside a chunk of the logits the slope of its cap
        function(*narrow, labels, None, 1.0, 3.0)
    assert largest.elements == 2 * VOCABULARY
    with LargestTensor() as largest:
        whole(hidden, weight, labels).backward()
    assert largest.elements == ROWS * VOCABULARY


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 0.01), (0.3, 0.02)])
def test_smoothed_labels_and_z_loss_are_the_plain_formula(chunks, change, smoothing, z_loss):
    hidden, weight, labels, offset = inputs(torch.float64)
    scale, cap = change
    logits = linear(hidden, weight, offset) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    kept = labels != IGNORE_INDEX
    log_p, log_z = logits.log_softmax(1)[kept], logits.logsumexp(1)[kept]
    right = -log_p.gather(1, labels[kept, None]).sum()
    expected = (1 - smoothing) * right - smoothing * log_p.mean(1).sum()
    expected = expected + z_loss * log_z.square().sum()
    value = summed_cross_entropy(hidden, weight, labels, offset, *change, smoothing, z_loss)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    ours, theirs = (gradients(loss, hidden, weight, offset) for loss in (3 * value, 3 * expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
