"""Files that several processes read and write."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .errors import SSPropError


def check_writable(path: Path) -> None:
    """Refuse, before there is anything to write, what cannot be a file.

    Raises:
        SSPropError: ``path`` is a folder, or lies in none that can be written to.
    """
    folder = path.parent
    if path.is_dir():
        problem = "it is a folder"
    elif not folder.is_dir():
        problem = f"there is no folder {folder}"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        problem = "permission denied"
    else:
        return
    raise SSPropError(f"{path} cannot be written: {problem}")


def write_json(path: Path, value: Any) -> None:
    """Write a file at once: whoever reads meanwhile sees the old one or the new one.

    Raises:
        OSError: it cannot be written; what was there stays.
        TypeError: ``value`` is not plain data.
    """
    text = json.dumps(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        try:
            file.write(text)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
