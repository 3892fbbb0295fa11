"""The six convolution functions as one table, and the arguments that they share. A linear layer is a seventh row.

A linear layer is a convolution without spatial dimensions: its weight is (K, C), every leading dimension of its input is
batch. It shares the machinery, and is rewritten only where a policy asks for it.

Everything that has to recognise a convolution (graph matching, modules, function modes, docs and tests) reads
:data:`CONVOLUTIONS`; nothing else in the package knows where an argument of ``conv_transpose2d`` sits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvArgs(NamedTuple):
    """Geometry of one convolution, in the order in which ``aten.convolution`` takes it.

    Each list has one entry per spatial dimension, in elements.
    """

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int


class ConvCall(NamedTuple):
    """A convolution call brought to the form ``aten.convolution`` takes.

    ``input`` is batched and already padded where padding is asymmetric; ``unbatched`` says that the result has to lose its
    first dimension again.
    """

    input: Tensor
    args: ConvArgs
    unbatched: bool


@dataclass(frozen=True)
class ConvSpec:
    """One row per convolution function of ``torch.nn.functional``.

    Attributes:
        parameters: names and defaults of the arguments after ``input`` and ``weight``, in calling order.
        forwards: the module class's ``forward`` and ``_conv_forward`` as torch has them, when this package is imported.
    """

    name: str
    dim: int
    transposed: bool
    function: Callable[..., Tensor]
    module: type[nn.Module]
    parameters: tuple[tuple[str, Any], ...] = field(init=False)
    forwards: tuple[Any, Any] = field(init=False)

    def __post_init__(self) -> None:
        # no cached_property: some Pythons take a lock for it, at which Dynamo breaks the graph
        object.__setattr__(self, "parameters", self._parameters())
        object.__setattr__(self, "forwards", (self.module.forward, getattr(self.module, "_conv_forward", None)))

    def __reduce__(self) -> tuple[Callable[[str], ConvSpec], tuple[str]]:
        return _row, (self.name,)  # a copied or unpickled model refers to the table's own rows: they are compared by identity

    def is_plain(self, cls: Any, conv_forward: bool = False) -> bool:
        """Whether a module class has torch's own ``forward`` or ``_conv_forward``: nobody's in a subclass, nor patched in."""
        return getattr(cls, "_conv_forward" if conv_forward else "forward", None) is self.forwards[conv_forward]

    def _parameters(self) -> tuple[tuple[str, Any], ...]:
        if self.dim == 0:
            return (("bias", None),)
        if self.transposed:
            return (
                ("bias", None),
                ("stride", 1),
                ("padding", 0),
                ("output_padding", 0),
                ("groups", 1),
                ("dilation", 1),
            )
        return (("bias", None), ("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name, defaults filled in.

        Raises:
            TypeError: an unknown or doubled argument, or neither input nor weight.
        """
        names = ("input", "weight", *(name for name, _ in self.parameters))
        bound = {"bias": None, **dict(self.parameters)}
        if len(args) > len(names):
            raise TypeError(f"{self.name} takes at most {len(names)} arguments, got {len(args)}")
        bound.update(zip(names, args, strict=False))
        for key, value in kwargs.items():
            if key not in names or key in names[: len(args)]:
                raise TypeError(f"{self.name} got an unexpected argument {key!r}")
            bound[key] = value
        if "input" not in bound or "weight" not in bound:
            raise TypeError(f"{self.name} needs an input and a weight")
        return bound

    def call(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        output_padding: Any,
    ) -> Tensor:
        """The function itself, with the arguments in one order for all rows."""
        if self.dim == 0:
            return self.function(input, weight, bias)
        if self.transposed:
            return self.function(input, weight, bias, stride, padding, output_padding, groups, dilation)
        return self.function(input, weight, bias, stride, padding, dilation, groups)

    def prepare(
        self,
        input: Tensor,
        weight: Tensor,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        output_padding: Any = 0,
    ) -> ConvCall:
        """Bring a call to ``aten.convolution``'s form: batched, lists of whole numbers, no ``'same'``.

        ``input`` is (N, C, *spatial) or (C, *spatial); ``weight`` as the function takes it.
        """
        n = self.dim
        if n == 0:
            return ConvCall(input, NO_SPACE, False)
        stride, dilation = _per_dim(stride, n), _per_dim(dilation, n)
        unbatched = input.dim() == n + 1
        if unbatched:
            input = input.unsqueeze(0)
        elif input.dim() != n + 2:
            self.function(input, weight)  # raises what it always raised
        if isinstance(padding, str):
            if padding == "valid":
                padding = (0,) * n
            elif padding == "same" and all(s == 1 for s in stride):
                input, padding = _pad_same(input, weight, dilation)
            else:
                self.call(input, weight, None, stride, padding, dilation, groups, output_padding)  # raises what it always did
        padding, output_padding, groups = _per_dim(padding, n), _per_dim(output_padding, n), _whole(groups)
        args = ConvArgs(stride, padding, dilation, self.transposed, output_padding, groups)
        return ConvCall(input, args, unbatched)


NO_SPACE = ConvArgs((), (), (), False, (), 1)  # the geometry of a linear layer

CONVOLUTIONS: dict[str, ConvSpec] = {
    spec.name: spec
    for spec in (
        ConvSpec("conv1d", 1, False, F.conv1d, nn.Conv1d),
        ConvSpec("conv2d", 2, False, F.conv2d, nn.Conv2d),
        ConvSpec("conv3d", 3, False, F.conv3d, nn.Conv3d),
        ConvSpec("conv_transpose1d", 1, True, F.conv_transpose1d, nn.ConvTranspose1d),
        ConvSpec("conv_transpose2d", 2, True, F.conv_transpose2d, nn.ConvTranspose2d),
        ConvSpec("conv_transpose3d", 3, True, F.conv_transpose3d, nn.ConvTranspose3d),
    )
}

# The one function that computes all of them, and its arguments in order.
GENERAL = frozenset({torch.convolution, torch.ops.aten.convolution, torch.ops.aten.convolution.default})
_GENERAL_ARGUMENTS = (
    "input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups"
)  # fmt: skip

LINEAR = ConvSpec("linear", 0, False, F.linear, nn.Linear)


def _row(name: str) -> ConvSpec:
    return LINEAR if name == LINEAR.name else CONVOLUTIONS[name]


SPEC_OF_FUNCTION: dict[Any, ConvSpec] = {spec.function: spec for spec in CONVOLUTIONS.values()}


# The operators behind them, as graphs of aten operations and code that calls ``torch.ops.aten`` have them.
SPEC_OF_OPERATOR: dict[Any, ConvSpec] = {
    getattr(getattr(torch.ops.aten, name), overload): spec
    for name, spec in CONVOLUTIONS.items()
    for overload in ("default", "input", "padding")
    if hasattr(getattr(torch.ops.aten, name), overload)
} | {getattr(torch.ops.aten, name): spec for name, spec in CONVOLUTIONS.items()}


def spec_of_module(module: nn.Module, linear: bool = False) -> ConvSpec | None:
    """The row of a convolution module (subclasses included) and, if asked for, of a linear one; or None."""
    if linear and isinstance(module, nn.Linear):
        return LINEAR
    for spec in CONVOLUTIONS.values():
        if isinstance(module, spec.module):
            return spec
    return None


def weight_shape(module: Any, spec: ConvSpec) -> tuple[int, ...]:
    """The shape of a convolution module's weight, which may be computed; empty for a linear one."""
    if spec.dim == 0:
        return ()
    outs, ins = module.out_channels // module.groups, module.in_channels // module.groups
    return (*((module.in_channels, outs) if spec.transposed else (module.out_channels, ins)), *module.kernel_size)


def autocast_passes_over(function: Any, device_type: str) -> bool:
    """Whether autocast leaves a convolution function alone: on the CPU it does not know the general one."""
    return device_type == "cpu" and function in GENERAL


def bind_general(
    args: Sequence[Any], kwargs: Mapping[str, Any], dim_of: Callable[[Any], int]
) -> tuple[ConvSpec, dict[str, Any]]:
    """Row and arguments by name of a call of ``torch.convolution``; ``dim_of`` tells the dimensions of its weight."""
    bound = dict(zip(_GENERAL_ARGUMENTS, args, strict=False)) | dict(kwargs)
    transposed = bool(bound.pop("transposed"))
    spec = CONVOLUTIONS[f"conv{'_transpose' if transposed else ''}{dim_of(bound['weight']) - 2}d"]
    if not transposed:
        del bound["output_padding"]
    return spec, bound


def run(input: Tensor, weight: Tensor, bias: Tensor | None, args: ConvArgs) -> Tensor:
    """``aten.convolution``, or ``aten.linear`` for a weight without spatial dimensions."""
    if weight.dim() == 2:
        return F.linear(input, weight, bias)
    return torch.convolution(input, weight, bias, *args)


def output_channels(weight_shape: Sequence[int], args: ConvArgs) -> int:
    """K of a weight (K, C/g, *kernel), or (C, K/g, *kernel) when transposed."""
    return weight_shape[1] * args.groups if args.transposed else weight_shape[0]


def conv_kinds(spec: ConvSpec, weight_shape: Sequence[int], groups: int, functional: bool = False) -> frozenset[str]:
    """The kinds that a policy rule can name. A depthwise convolution is a grouped one, too."""
    if spec.dim == 0:
        return frozenset({spec.name})
    kinds = {spec.name}
    out_channels = weight_shape[1] * groups if spec.transposed else weight_shape[0]
    if groups > 1:
        kinds.add("grouped")
        if out_channels == groups or weight_shape[1] == 1:
            kinds.add("depthwise")
    if all(int(size) == 1 for size in weight_shape[2:]):
        kinds.add("pointwise")
    if functional:
        kinds.add("functional")
    return frozenset(kinds)


def conv_backward_flops(positions: Sequence[int], weight_shape: Sequence[int], outputs: int = 2) -> int:
    """FLOPs of a convolution's backward pass: 2 · N · positions · K · C/g · kernel, for each of ``outputs`` gradients.

    ``positions`` is the shape of the output's gradient, (N, K, *spatial); ``outputs`` counts the input and weight gradients
    that are computed. A transposed convolution multiplies once per *input* position, so ``positions`` must then be the
    input's shape, (N, C, *spatial). A multiply and an add count as two, as in ``torch.utils.flop_counter``.
    """
    flops = 2 * positions[0] * outputs
    if len(weight_shape) == 2:  # linear: (*batch, K)
        positions = (*positions[:1], 1, *positions[1:-1])
    for size in (*positions[2:], *weight_shape):
        flops *= size
    return flops


def _per_dim(value: Any, n: int) -> tuple[int, ...]:
    if isinstance(value, (tuple, list)):
        values = tuple(_whole(number) for number in value)
        return values * n if len(values) == 1 else values
    return (_whole(value),) * n


def _whole(number: Any) -> Any:
    """A NumPy integer, say, as the number that it is: not every function of PyTorch's takes it. Symbols stay what they are."""
    if isinstance(number, (int, torch.SymInt)) or not hasattr(number, "__index__"):
        return number
    return operator.index(number)


def _pad_same(input: Tensor, weight: Tensor, dilation: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    # ATen pads on one side first where the total is odd, and lets the convolution pad the even rest.
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    extra = [t % 2 for t in total]
    if any(extra):
        pad: list[int] = []
        for e in reversed(extra):
            pad += [0, e]
        input = torch.constant_pad_nd(input, pad, 0.0)
    return input, tuple(t // 2 for t in total)
