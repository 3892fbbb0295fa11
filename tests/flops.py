"""FLOPs of a training step as PyTorch's own counter sees them, in eager mode and while compiled code runs."""

import contextlib

import torch
import zoo
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

from ssprop_fx.convolutions import conv_backward_flops

BACKWARD = torch.ops.aten.convolution_backward


def grouped_flops(grad, x, w, _b, _s, _p, _d, transposed, _o, groups, mask, out_shape=None, **_):
    """PyTorch's own formula counts the weight gradient of a grouped convolution as if it were not grouped."""
    return conv_backward_flops(x if transposed else grad, w, sum(mask[:2]))


class _Global:
    """In place of the counter's module tracker, whose global hooks would make compiled code be compiled again."""

    parents = frozenset({"Global"})

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


@contextlib.contextmanager
def _inside_compiled_code():
    """Let Dynamo run what it has compiled although the counter's mode is active."""
    _FlopCounterMode.ignore_compile_internals = classmethod(lambda cls: True)
    try:
        yield
    finally:
        del _FlopCounterMode.ignore_compile_internals


def count_step(model, arguments, grouped=False):
    """(FLOPs of the convolutions' backward passes, FLOPs of all) of one step; compiled code must have run before.

    Args:
        grouped: with :func:`grouped_flops`, which is PyTorch's formula where nothing is grouped.
    """
    counter = FlopCounterMode(display=False, custom_mapping={BACKWARD: grouped_flops} if grouped else {})
    counter.mod_tracker = _Global()
    with _inside_compiled_code(), counter:
        zoo.run_step(model, arguments)
    return counter.get_flop_counts()["Global"][BACKWARD], counter.get_total_flops()
