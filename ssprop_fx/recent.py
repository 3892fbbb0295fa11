"""Values that can be made again at any time: those that were wanted last are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

MOST = 64

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(dict[Key, Value]):
    """Values by key, of the keys that were used last, in that order; others are forgotten.

    A dictionary by the factors of a schedule would grow with every step where the schedule goes through no few of them.

    Args:
        most: how many keys there are at most. As long as no more than these come again and again, none is forgotten.
    """

    def __init__(self, most: int = MOST) -> None:
        super().__init__()
        self.most = most

    def use(self, key: Key, make: Callable[[Key], Value]) -> Value:
        """The value of a key, which now is the last one; made, if there is none."""
        value = self.pop(key, None)  # at once, since backward passes may run in several threads
        if value is None:
            value = make(key)
        self[key] = value
        for old in list(self)[: -self.most]:
            self.pop(old, None)
        return value


__all__ = ["MOST", "Recent"]
