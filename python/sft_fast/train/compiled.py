"""`torch.compile` of the layers of a model, piece by piece, so that no shape of a batch makes it compile again.

The layers have the same code, so that one compilation serves them all. Attention over the
samples of a pack stays as it is, between two compiled pieces: how many samples there are and where they end is for the
kernel to know, and no shape that a compiler should see. The number of tokens is a symbol.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sft_fast.errors import ConfigError
from sft_fast.train.memory import decoder_layers

# What only attention looks at: how long the samples are, and which ranks share a row.
_OF_ATTENTION = ("segment_lengths", "sequence_group")

# Marks a model whose layers are compiled.
_MARK = "_sft_fast_is_compiled"


def check_compiler(device_type: str) -> None:
    """Raises `ConfigError` where nothing on this machine can compile for a device: `cpu` or `cuda`."""
    reason = None
    if device_type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            reason, hint = "there is no C++ compiler", "install g++ (Debian's package g++), or set it to false"
    else:
        from torch.utils._triton import has_triton

        if not has_triton():
            reason, hint = "Triton is not installed, or cannot use this GPU", "pip install triton, or set it to false"
    if reason is not None:
        raise ConfigError(
            f"torch.compile cannot work here: {reason}",
            code="no_compiler",
            location="sft_train.model_args.compile",
            hint=hint,
        )


def compile_layers(hf: Any) -> None:
    """Compiles the forward pass of the decoder layers of a transformers model when it first runs.

    What stands around it stays outside: hooks that gather weights, and the checkpointing that runs it a second time.

    Raises:
        ConfigError: there is no compiler.
    """
    check_compiler("cuda" if torch.cuda.is_available() else "cpu")
    for layer in decoder_layers(hf):
        layer.forward = types.MethodType(_compiled_forward(type(layer)), layer)  # type: ignore[arg-type]
    setattr(hf, _MARK, True)


@functools.cache
def _compiled_forward(layer_class: type[nn.Module]) -> Callable[..., Any]:
    """The forward method of a class of layers, compiled."""
    forward: Any = layer_class.forward
    can_checkpoint = issubclass(layer_class, GradientCheckpointingLayer)
    # transformers wraps the method of such a layer to checkpoint it; inside that is the code.
    compiled = torch.compile(forward.__wrapped__ if can_checkpoint else forward, dynamic=True)

    def run(self: Any, *arguments: Any, **named: Any) -> Any:
        named |= {name: _Hidden(named[name]) for name in _OF_ATTENTION if name in named}
        if can_checkpoint and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(functools.partial(compiled, self, **named), *arguments)
        return compiled(self, *arguments, **named)  # type: ignore[no-untyped-call]

    return run


class _Hidden:
    """A value that compiled code carries along without looking at it, so that another one is no reason to compile."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _shown(value: Any) -> Any:
    return value.value if isinstance(value, _Hidden) else value


def between_compiled(attention: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function of compiled layers: as it is, whatever it is told of the samples."""

    def call(*arguments: Any, **named: Any) -> Any:
        return attention(*arguments, **{name: _shown(value) for name, value in named.items()})

    function: Callable[..., Any] = torch.compiler.disable(call)
    return function


@contextlib.contextmanager
def running_as_written(hf: Any) -> Iterator[None]:
    """Inside, a compiled model runs its Python code: for the few passes that are not worth compiling for."""
    if not getattr(hf, _MARK, False):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
