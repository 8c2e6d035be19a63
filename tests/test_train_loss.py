"""The chunked cross-entropy against the one of torch over all logits."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sft_fast.train.loss import attach_loss, cross_entropy_sum

NUM_ROWS, HIDDEN_SIZE, VOCAB_SIZE = 37, 16, 101


def inputs(dtype: torch.dtype = torch.float32, bias: bool = False) -> dict[str, Any]:
    """Hidden states, a head and targets; everything that has a gradient is a leaf."""
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    values = {"hidden": leaf(NUM_ROWS, HIDDEN_SIZE), "weight": leaf(VOCAB_SIZE, HIDDEN_SIZE)}
    if bias:
        values["bias"] = leaf(VOCAB_SIZE)
    values["targets"] = torch.randint(VOCAB_SIZE, (NUM_ROWS,), generator=generator)
    return values


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The same from all logits at once."""
    logits = nn.functional.linear(hidden, weight, bias).float() * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


def gradients(loss: torch.Tensor, values: dict[str, Any]) -> list[torch.Tensor]:
    """Gradients of the leaves, taken once."""
    leaves = [value for value in values.values() if value.requires_grad]
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("chunk_rows", [1, 8, NUM_ROWS, 1000])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 1.7, "softcap": 3.0}])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_equal_those_of_all_logits(chunk_rows: int, options: dict[str, float], bias: bool) -> None:
    """Neither the chunks, nor a bias, a scale or a softcap change the loss or a gradient."""
    values = inputs(bias=bias)

    expected = 0.25 * reference(**values, **options)
    actual = cross_entropy_sum(**values, **options, factor=0.25, chunk_rows=chunk_rows)

    torch.testing.assert_close(actual, expected)
    for mine, theirs in zip(gradients(3.0 * actual, values), gradients(3.0 * expected, values), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"softcap": 2.0}])
@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_label_smoothing_is_that_of_torch(options: dict[str, Any], smoothing: float) -> None:
    """Value and gradients are those of torch's cross-entropy with `label_smoothing`."""
    values = inputs(bias=True)
    actual = cross_entropy_sum(**values, **options, label_smoothing=smoothing, chunk_rows=8)
    expected = reference(**values, **options, label_smoothing=smoothing)

    torch.testing.assert_close(actual, expected)
    for mine, theirs in zip(gradients(actual, values), gradients(expected, values), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_makes_its_gradient_so() -> None:
    """Even where the gradient of the formula would be finite: what all ranks look at is the gradient."""
    values = inputs()
    with torch.no_grad():
        values["weight"][:, 0] = torch.finfo(torch.float32).max
    loss = cross_entropy_sum(**values)

    assert not torch.isfinite(loss)
    for gradient in gradients(loss, values):
        assert not torch.isfinite(gradient).all()


def test_bfloat16_loses_no_more_than_its_logits() -> None:
    """In bfloat16 the loss is that of float32 logits, and gradients are right to the precision of the dtype."""
    values = inputs(torch.bfloat16)
    exact = {name: value.detach().float().requires_grad_() for name, value in values.items() if name != "targets"}
    exact["targets"] = values["targets"]

    actual, expected = cross_entropy_sum(**values, chunk_rows=5), reference(**exact)

    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=0)
    for mine, theirs in zip(gradients(actual, values), gradients(expected, exact), strict=True):
        assert (mine.float() - theirs).norm() < 1e-2 * theirs.norm()


def test_a_factor_that_bfloat16_cannot_hold_scales_the_gradient_exactly() -> None:
    """A divisor such as 1/1000 is applied before rounding: the gradients are not all off by the same part."""
    values = inputs(torch.bfloat16)
    plain = gradients(cross_entropy_sum(**values), values)
    scaled = gradients(cross_entropy_sum(**values, factor=1 / 1000), values)

    for one, thousandth in zip(plain, scaled, strict=True):
        ratio = (thousandth.float() * 1000).norm() / one.float().norm()
        assert abs(ratio.item() - 1) < 2e-4


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


def test_no_tensor_is_larger_than_a_chunk_or_the_head() -> None:
    """All logits never exist at one time, in the forward pass or the backward pass."""
    hidden = torch.randn(4000, 4, requires_grad=True)
    weight = torch.randn(50, 4, requires_grad=True)
    targets = torch.randint(50, (4000,))
    all_logits = hidden.shape[0] * weight.shape[0]

    with LargestTensor() as ours:
        cross_entropy_sum(hidden, weight, targets, chunk_rows=100).backward()
    with LargestTensor() as theirs:
        reference(hidden, weight, targets).backward()

    assert ours.num_elements <= max(hidden.numel(), weight.numel(), 100 * 50)
    assert theirs.num_elements >= all_logits, "the reference shows that a full tensor would be seen"


def test_without_gradients_only_the_value_is_computed() -> None:
    """Under `no_grad` the loss is the same and carries no graph."""
    values = inputs()
    with torch.no_grad():
        loss = cross_entropy_sum(**values)

    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(**values).detach())


def test_no_label_gives_zero_and_zero_gradients() -> None:
    """A rank without labels still has a graph, whose gradients are zero."""
    values = inputs()
    loss = cross_entropy_sum(values["hidden"][:0], values["weight"], values["targets"][:0])

    assert loss.item() == 0.0
    (grad,) = torch.autograd.grad(loss, [values["weight"]])
    assert not grad.any()


def test_a_head_still_gives_logits() -> None:
    """A layer that has learned the loss gives logits as before when it is called without targets."""
    head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE)
    hidden = torch.randn(NUM_ROWS, HIDDEN_SIZE)
    expected = head(hidden)

    attach_loss(head)

    assert torch.equal(head(hidden), expected)
    targets = torch.randint(VOCAB_SIZE, (NUM_ROWS,))
    torch.testing.assert_close(head(hidden, targets), nn.functional.cross_entropy(expected, targets, reduction="sum"))
