"""The steps that optimizers make, whichever they are: each is heard of once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from ._compat import never_traced


def after_each_step(tell: Callable[[], None]) -> None:
    """Call ``tell`` after each step of any ``torch.optim`` optimizer in the process, from now on.

    PyTorch calls its hooks once for each ``step`` method on the way: those of a subclass and of the class that it derives
    from (which of them depends on what optimizers the process has made), of a wrapper and of the optimizer inside. The
    outermost is the step that a user makes, and the one that counts.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    local = threading.local()  # .steps: as steps_under_way returned them

    @never_traced
    def steps_under_way(caller: FrameType) -> list[FrameType]:
        """The calls, outermost first, that hold a step which this thread is in the midst of.

        No hook is called after a step that raises: what is no longer among the callers of ``caller`` is over.
        """
        running, frame = {caller}, caller
        while frame.f_back is not None:
            frame = frame.f_back
            running.add(frame)
        local.steps = [step for step in getattr(local, "steps", ()) if step in running]
        return local.steps

    @never_traced
    def before(*_: Any) -> None:
        caller = sys._getframe(1)
        steps_under_way(caller).append(caller)

    @never_traced
    def after(*_: Any) -> None:
        steps = steps_under_way(sys._getframe(1))
        del steps[-1:]  # none, if it was under way already when this began to listen
        if not steps:
            tell()

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


__all__ = ["after_each_step"]
