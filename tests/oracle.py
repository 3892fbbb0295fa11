"""The slow way: what a sparse backward pass has to give, and configurations to try it on.

Nothing here is shared with the package except the table of convolution functions. Importance is computed in float64 from the
gradient itself, the dropped channels are set to zero, and PyTorch's dense autograd does the rest, in float64 too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any

import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ssprop_fx.convolutions import CONVOLUTIONS, ConvSpec

CRITERIA = ("l1", "l2", "taylor", "random")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Componentwise error of a gradient, in units of eps · Σ|terms|. One rounding of the result is 0.5; float32 and float64
# also accumulate in that type. float64 is held to 1e-10 of the terms.
_ROUNDINGS = {
    torch.float64: 1e-10 / torch.finfo(torch.float64).eps,
    torch.float32: 16.0,
    torch.bfloat16: 2.0,
    torch.float16: 2.0,
}


def generated(examples: int) -> Callable[[Any], Any]:
    """Run a test on that many examples, the same ones every time."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


@dataclass(frozen=True)
class Case:
    """One convolution, its tensors' types and layouts, and the settings of its backward pass."""

    spec: ConvSpec
    batch: int | None  # None: unbatched
    in_channels: int
    out_channels: int
    groups: int
    spatial: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    bias: bool
    padding_mode: str
    dtype: torch.dtype
    channels_last: bool
    grad_layout: str
    frozen: str
    drop_rate: float
    criterion: str
    round_to: Any
    gradients: str
    seed: int

    @property
    def channels(self) -> int:
        """How many channels (or whole groups) one choice is made from."""
        per_group = self.out_channels // self.groups
        return self.groups if per_group == 1 else per_group

    @property
    def wanted(self) -> Fraction:
        """(1 − d) · channels, exactly, for the decimal number that the rate was written as."""
        return (1 - Fraction(str(self.drop_rate))) * self.channels

    def keep(self) -> int:
        """The number of kept channels, for a whole-number ``round_to``; ties of nearest go up."""
        if self.drop_rate == 0:
            return self.channels
        unit = self.round_to
        count = floor(self.wanted) if unit == 1 else unit * floor(self.wanted / unit + Fraction(1, 2))
        return min(max(count, 1), self.channels)

    def module(self) -> nn.Module:
        """The convolution module, with the case's frozen parameters and types."""
        torch.manual_seed(self.seed)
        options = {"output_padding": self.output_padding} if self.spec.transposed else {}
        module = self.spec.module(
            self.in_channels,
            self.out_channels,
            self.kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias,
            padding_mode=self.padding_mode,
            **options,
        ).to(self.dtype)
        if self.channels_last:
            module = module.to(memory_format=self._memory_format())
        module.weight.requires_grad_(self.frozen != "weight")
        return module

    def input(self) -> Tensor:
        """(N, C, *in), or (C, *in) when unbatched."""
        torch.manual_seed(self.seed + 1)
        shape = (self.in_channels, *self.spatial)
        input = torch.randn(shape if self.batch is None else (self.batch, *shape)).to(self.dtype)
        if self.channels_last:
            input = input.to(memory_format=self._memory_format())
        return input.requires_grad_(self.frozen != "input")

    def call(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The functional call (zero padding)."""
        options = {"output_padding": self.output_padding} if self.spec.transposed else {}
        return self.spec.function(
            input,
            weight,
            bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            **options,
        )

    def output_grad(self, output: Tensor) -> Tensor:
        """A gradient of the output's shape, in the case's layout; its channels differ in magnitude."""
        torch.manual_seed(self.seed + 2)
        shape = list(output.shape)
        channel = output.dim() - self.spec.dim - 1
        scale = torch.rand(shape[channel]) + 0.1
        scale = scale.view(-1, *[1] * self.spec.dim)
        if self.grad_layout == "expanded":
            return (torch.randn(shape[-self.spec.dim - 1 :]) * scale).to(output.dtype).expand(shape)
        if self.grad_layout == "strided":
            shape[-1] *= 2
            return (torch.randn(shape) * scale).to(output.dtype)[..., ::2]
        if self.grad_layout == "transposed":
            grad = torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
            return (grad * scale.expand(output.shape[-self.spec.dim - 1 :])).to(output.dtype)
        grad = (torch.randn(shape) * scale).to(output.dtype)
        if self.grad_layout == "channels_last" and output.dim() == self.spec.dim + 2 and self.spec.dim > 1:
            grad = grad.to(memory_format=self._memory_format())
        return grad

    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.spec.dim == 2 else torch.channels_last_3d


@st.composite
def cases(draw: Any, modules: bool = False) -> Case:
    """Valid configurations. With ``modules``, the padding modes that only modules have are drawn, too."""
    spec = draw(st.sampled_from(list(CONVOLUTIONS.values())))
    dim = spec.dim
    dtype = draw(st.sampled_from((torch.float64, *DTYPES)))
    form = draw(st.sampled_from(("plain", "plain", "grouped", "depthwise", "multiplier", "wide")))
    if form == "plain":
        groups, outs, ins = 1, draw(st.sampled_from((1, 2, 3, 5, 8, 10, 16, 24, 33, 48))), draw(st.integers(1, 5))
    elif form == "grouped":
        groups = draw(st.integers(2, 4))
        outs, ins = groups * draw(st.sampled_from((2, 3, 5, 20))), groups * draw(st.integers(1, 3))
    else:
        groups = draw(st.sampled_from((2, 3, 6, 10, 24, 40)))
        outs, ins = groups * (1 + (form == "multiplier")), groups * (1 + (form == "wide"))

    def per_dim(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dim))

    kernel, stride, dilation = per_dim(1, 3 if dim < 3 else 2), per_dim(1, 2), per_dim(1, 2)
    padding: Any = per_dim(0, 2)
    output_padding, mode = (0,) * dim, "zeros"
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if spec.transposed:
        output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        least = [max(1, 1 - (r + o - 2 * p) // s) for r, o, p, s in zip(reach, output_padding, padding, stride, strict=True)]
    else:
        special = draw(st.sampled_from((None, None, None, "same", "valid")))
        if special == "same":
            stride = (1,) * dim
        if special:
            padding = special
        pads = (0,) * dim if special == "valid" else tuple(reach) if special == "same" else padding
        if modules:
            mode = draw(st.sampled_from(("zeros", "zeros", "reflect", "circular", "replicate")))
        # a reflected border is smaller than what it reflects
        least = [max(1, r + 1 - (2 * p if special is None else p)) for r, p in zip(reach, pads, strict=True)]
        if mode != "zeros":
            least = [max(low, p + 1) for low, p in zip(least, pads, strict=True)]
    batch = draw(st.sampled_from((None, 1, 2, 3)))
    channels_last = draw(st.booleans()) and dim > 1 and batch is not None
    if channels_last and dtype == torch.bfloat16:
        # oneDNN's own dense weight gradient can be NaN there where the kernel is larger than the input (torch 2.15)
        least = [max(low, r + 1) for low, r in zip(least, reach, strict=True)]
    spatial = tuple(low + draw(st.integers(0, 4 if dim < 3 else 2)) for low in least)
    bias = draw(st.booleans())
    frozen = draw(st.sampled_from(("nothing", "nothing", "nothing", "weight", "input")))
    criterion = draw(st.sampled_from(CRITERIA))
    if criterion == "random" and frozen == "weight":
        bias = True  # which channels were kept shows only in the gradients of the parameters
    return Case(
        spec,
        batch,
        ins,
        outs,
        groups,
        spatial,
        kernel,
        stride,
        padding,
        dilation,
        output_padding,
        bias,
        mode,
        dtype,
        channels_last=channels_last,
        grad_layout=draw(st.sampled_from(("plain", "expanded", "strided", "transposed", "channels_last")))
        if dim > 1
        else draw(st.sampled_from(("plain", "expanded", "strided"))),
        frozen=frozen,
        drop_rate=draw(st.integers(0, 19)) / 20,
        criterion=criterion,
        round_to=draw(st.sampled_from((1, 1, 4, 16, "auto"))),
        gradients=draw(st.sampled_from(("all", "all", "weight"))),
        seed=draw(st.integers(0, 10_000)),
    )


def check_keep(case: Case, keep: int) -> None:
    """The count is the one that is asked for; for ``auto``, one whose FLOPs are within 2 % of it or the nearest."""
    if case.round_to != "auto" or case.drop_rate == 0:
        assert keep == case.keep()
    else:
        assert 1 <= keep <= case.channels
        assert keep == 1 or abs(keep - case.wanted) <= max(Fraction(2, 100) * case.wanted, Fraction(1, 2))


def check_gradients(
    case: Case,
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    tensors: Sequence[Tensor | None],
    output: Tensor,
    grad: Tensor,
    got: Sequence[Tensor | None],
    keep: int,
) -> None:
    """Compare gradients with the oracle's.

    Args:
        forward: the dense convolution.
        tensors: input, weight and bias, requiring a gradient where ``got`` has one.
        output, grad: what ``forward`` gave in the case's type, and its gradient.
        got: gradients of the tensors, None where there should be none.
        keep: channels kept in each choice.
    """
    wanted = [t is not None and t.requires_grad for t in tensors]
    assert [g is not None for g in got] == wanted
    if not any(wanted):
        return
    if keep == case.channels:
        dense = torch.autograd.grad(forward(*tensors), [t for t in tensors if t is not None and t.requires_grad], grad)
        for expected, actual in zip(dense, (g for g in got if g is not None), strict=True):
            assert torch.equal(actual, expected), "a dense backward pass is not bit-equal"
        return

    kept = _kept(case, output, grad, _rows(case, got, _dense(forward, tensors, grad.double())), keep)
    shape = [1] * grad.dim()
    shape[grad.dim() - case.spec.dim - 1] = -1
    masked = torch.where(kept.view(shape), grad.double(), torch.zeros((), dtype=torch.float64))
    expected = _dense(forward, tensors, masked)
    terms = _dense(forward, [None if t is None else t.abs() for t in tensors], masked.abs())
    if case.gradients == "weight":
        expected[0] = _dense(forward, tensors, grad.double())[0]
        terms[0] = _dense(forward, [None if t is None else t.abs() for t in tensors], grad.double().abs())[0]
    unit = torch.finfo(case.dtype).eps * _ROUNDINGS[case.dtype]
    subnormal = torch.finfo(case.dtype).smallest_normal * torch.finfo(case.dtype).eps
    for name, tensor, value, reference, magnitude in zip(
        ("input", "weight", "bias"), tensors, got, expected, terms, strict=True
    ):
        if value is not None:
            assert value.shape == tensor.shape
            assert value.dtype == tensor.dtype
            error = (value.double() - reference).abs()
            worst = (error - unit * magnitude - subnormal).max().item() if error.numel() else 0.0
            assert worst <= 0, f"gradient of the {name} is off by {error.max().item():.3g}"


def importance(case: Case, output: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(K,) importance in float64, and the rounding that an accumulation in at least float32 may leave in it."""
    channel = grad.dim() - case.spec.dim - 1
    g, y = (t.detach().double().movedim(channel, 0).flatten(1) for t in (grad, output))
    accumulate = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps
    if case.criterion == "l1":
        score = g.abs().mean(1)
        terms = score
    elif case.criterion == "l2":
        score = terms = g.square().sum(1).sqrt()
    else:
        score, terms = (g * y).sum(1).abs(), (g * y).abs().sum(1)
    return score, 8 * accumulate * terms


def _dense(forward, tensors, grad) -> list[Tensor | None]:
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    found = list(torch.autograd.grad(forward(*leaves), [t for t in leaves if t is not None], grad))
    return [None if t is None else found.pop(0) for t in leaves]


def _kept(case: Case, output: Tensor, grad: Tensor, shown: Tensor | None, keep: int) -> Tensor:
    """(K,) which channels were kept: by importance, and where that is undecided, by what the gradients show."""
    per_group = case.channels
    if case.criterion == "random":
        assume(shown is not None)
        counts = shown.view(-1, per_group).sum(1)
        assert counts.tolist() == [keep] * len(counts), "random keeps a wrong number of channels"
        return shown
    score, rounding = (t.view(-1, per_group) for t in importance(case, output, grad))
    order = score.argsort(1, descending=True)
    ranked = score.gather(1, order)
    blur = rounding.gather(1, order)
    clear = (ranked[:, keep - 1] - ranked[:, keep] > blur[:, keep - 1] + blur[:, keep]).all()
    mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order[:, :keep], True)
    if not clear:  # any set that is the top k up to rounding is right: take the one that was taken
        assume(shown is not None)
        mask = shown.view(-1, per_group)
        assert mask.sum(1).tolist() == [keep] * len(mask)
        low = torch.where(mask, score + rounding, torch.inf).min(1).values
        high = torch.where(mask, -torch.inf, score - rounding).max(1).values
        assert (low >= high).all(), "a less important channel was kept"
    return mask.flatten()


def _rows(case: Case, got: Sequence[Tensor | None], dense: Sequence[Tensor | None]) -> Tensor | None:
    """(K,) where a parameter's gradient is not zero; None if that does not tell the kept channels."""
    if got[2] is not None:
        return got[2] != 0
    if got[1] is None or not _nonzero(case, dense[1]).all():  # an output that sees nothing but padding
        return None
    return _nonzero(case, got[1])


def _nonzero(case: Case, weight: Tensor) -> Tensor:
    if case.spec.transposed:
        c, k, *kernel = weight.shape
        weight = weight.reshape(case.groups, c // case.groups, k, *kernel).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1).ne(0).any(1)
