"""The compiler passes, in the order in which they run: find → assign → sparsify → verify, and lower for the backward.

Each takes a graph (or the list that an earlier one made) and gives one back; each can be called alone.
"""

from .assign_policy import Decision, assign_policy
from .batch_norm_sums import BatchNormSums
from .channels_last_scatter import ChannelsLastScatter
from .channels_last_sums import ChannelsLastSums
from .find_convolutions import Convolution, find_convolutions
from .lower_backward import LowerBackward, lowering_demands
from .sparsify import Sparsify
from .verify import verify

__all__ = [
    "BatchNormSums",
    "ChannelsLastScatter",
    "ChannelsLastSums",
    "Convolution",
    "Decision",
    "LowerBackward",
    "Sparsify",
    "assign_policy",
    "find_convolutions",
    "lowering_demands",
    "verify",
]
