"""Functions of another module, for models whose convolutions are not to be seen in their own source."""

import torch.nn.functional as F


def blur(x, weight):
    """A depthwise convolution."""
    return F.conv2d(x, weight, padding=1, groups=x.shape[1])


def convolve(x, weight):
    """A convolution under a name that says nothing to whoever looks for PyTorch's."""
    return F.conv2d(x, weight)


class Projector:
    """A plain object, no module, that convolves."""

    def __init__(self, padding=0):
        self.padding = padding

    def __call__(self, x, weight):
        return F.conv2d(x, weight, padding=self.padding)

    def run(self, x, weight):
        """The same under a name."""
        return F.conv2d(x, weight, padding=self.padding)
