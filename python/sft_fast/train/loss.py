"""Cross-entropy over a large vocabulary without ever holding all logits.

The head and the loss are one step: logits of a chunk of positions are made, used and thrown away, and the gradients
are taken on the way, in the forward pass, because the loss is the last thing that happens. Peak memory is one chunk.
The value is a *sum* over label tokens, times a factor of the caller, who alone knows the whole global batch.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from sft_fast.errors import ConfigError

# Logits of one chunk: 2**23 float32 values are 32 MiB. More does not run faster on a CPU; a GPU wants larger products.
_CHUNK_ELEMENTS_CPU = 2**23
_CHUNK_ELEMENTS_GPU = 2**27


class _ChunkedCrossEntropy(torch.autograd.Function):
    """factor * sum of -log softmax(logits)[target], in float32 whatever the dtype of the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: float,
        softcap: float | None,
        label_smoothing: float,
        factor: float,
        chunk_rows: int,
    ) -> torch.Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        num_rows = hidden.shape[0]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Chunks are added up in float32: adding in bfloat16 would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants_bias else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)

        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, min(start + chunk_rows, num_rows))
            chunk, target = hidden[rows], targets[rows, None]
            logits = (chunk @ weight.t()).float()
            if bias is not None:
                logits += bias
            if scale != 1.0:
                logits *= scale
            if softcap is not None:
                logits = torch.tanh_(logits.div_(softcap)).mul_(softcap)
            log_total = torch.logsumexp(logits, dim=-1, keepdim=True)
            loss += log_total.sum() - (1 - label_smoothing) * logits.gather(1, target).sum()
            if label_smoothing:
                loss -= label_smoothing * logits.mean(dim=-1).sum()
            if not (wants_hidden or wants_weight or wants_bias):
                continue

            # d loss / d logits = softmax - target distribution, then back through the softcap and the scale.
            slope = 1 - (logits / softcap).square_() if softcap is not None else None
            grad = logits.sub_(log_total).exp_()
            grad.scatter_add_(1, target, grad.new_full((), label_smoothing - 1.0).expand(target.shape))
            if label_smoothing:
                grad -= label_smoothing / logits.shape[-1]
            if slope is not None:
                grad *= slope
            # The factor goes in while the gradient is float32: it is no round number in bfloat16.
            grad *= scale * factor
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                if weight.dtype == torch.float32:
                    grad_weight.addmm_(grad.t(), chunk)
                else:
                    grad_weight += grad.t() @ chunk

        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, loss)
        ctx.weight_dtype = weight.dtype
        return loss * factor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        *grads, loss = ctx.saved_tensors
        # A loss that is not finite makes its gradient so, and through it the norm that every rank sees.
        factor = grad_outputs[0] + loss * 0
        grad_hidden, grad_weight, grad_bias = (
            None if grad is None else (grad.float() * factor).to(ctx.weight_dtype) for grad in grads
        )
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def chunk_rows_of(vocab_size: int, on_gpu: bool) -> int:
    """Positions whose logits exist at one time."""
    return max(64, (_CHUNK_ELEMENTS_GPU if on_gpu else _CHUNK_ELEMENTS_CPU) // vocab_size)


def cross_entropy_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    factor: float = 1.0,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """`factor` times the sum of the cross-entropy of `softcap(scale * (hidden @ weight.T + bias))` and `targets`.

    Args:
        hidden: float `[n, hidden_size]`, the positions that have a label and no others.
        weight: float `[vocab_size, hidden_size]`.
        targets: int64 `[n]`.
        bias: float `[vocab_size]`, or None.
        scale: factor of the logits.
        softcap: logits become `softcap * tanh(logits / softcap)`; None for none.
        label_smoothing: share of the target that is spread evenly over the vocabulary, as in torch's cross-entropy.
        factor: factor of the loss.
        chunk_rows: positions whose logits exist at one time; None chooses by the vocabulary and the device.

    Returns:
        float32 scalar, in nats.
    """
    if chunk_rows is None:
        chunk_rows = chunk_rows_of(weight.shape[0], hidden.device.type != "cpu")
    # Without gradients autograd still asks for them by the inputs' flags: detached inputs say what is meant.
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(
        hidden, weight, bias, targets, scale, softcap, label_smoothing, factor, chunk_rows
    )
    return loss


def attach_loss(head: nn.Linear, *, scale: float = 1.0, softcap: float | None = None) -> None:
    """Teaches the output layer to return the loss when it is called with `targets`, and logits otherwise.

    The loss is taken inside the layer's own forward because ZeRO-3 gathers a layer's weight around that call only.
    """

    def forward(
        self: nn.Linear,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        factor: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        if targets is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        return cross_entropy_sum(
            hidden,
            self.weight,
            targets,
            bias=self.bias,
            scale=scale,
            softcap=softcap,
            label_smoothing=label_smoothing,
            factor=factor,
        )

    head.forward = types.MethodType(forward, head)  # type: ignore[method-assign]


def head_transform(config: Any) -> tuple[float, float | None]:
    """Scale and softcap that a model's forward applies to its logits, read from its transformers configuration.

    Raises:
        ConfigError: both are set, in an order that is not known.
    """
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:
        scale = 1.0 / float(config.logits_scaling)
    if softcap is not None and scale != 1.0:
        raise ConfigError("a model with both scaled and softcapped logits is not supported", code="unsupported_model")
    return scale, softcap
