"""Train convolutional networks cheaper: sparse back-propagation (ssProp, arXiv 2408.12561) as a compiler pass.

``transform(model, policy)`` rewrites a model for eager mode, ``torch.compile(model, backend="ssprop")`` in the compiler, and
``inspect(model)`` shows what was done.
"""

from importlib.metadata import version as _version

from .errors import PolicyError, SSPropError, TransformError
from .inspection import Report, Row, inspect
from .meter import Meter
from .policy import Policy, Rule, Settings
from .schedule import Schedule
from .transform import transform

__version__ = _version("ssprop-fx")

__all__ = [
    "Meter",
    "Policy",
    "PolicyError",
    "Report",
    "Row",
    "Rule",
    "SSPropError",
    "Schedule",
    "Settings",
    "TransformError",
    "inspect",
    "transform",
]
