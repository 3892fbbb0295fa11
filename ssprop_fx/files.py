"""Files that several processes read and write."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


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
