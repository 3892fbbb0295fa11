"""The command ``ssprop-fx``: its entry point, where errors become text and exit codes.

0 is success, 1 an error of a policy or a model, 2 a wrong command line. The commands are in
:mod:`ssprop_fx.commands` and :mod:`ssprop_fx.timing_commands`.
"""

from __future__ import annotations

import sys

from .errors import SSPropError, cause_of

_EXTRA_OF = {"typer": "cli", "rich": "cli", "sklearn": "demo"}
_PACKAGES = {"cli": "typer rich", "demo": "typer rich scikit-learn"}  # of an extra


def main() -> None:
    """Run the command line of the process."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without × gets a question mark
    try:
        from . import timing_commands  # noqa: F401 (adds its commands)
        from .commands import app

        app(prog_name="ssprop-fx")
    except SSPropError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in _EXTRA_OF:
            raise
        extra = _EXTRA_OF[package]
        sys.exit(f"error: {package} is not installed; pip install {_PACKAGES[extra]}, or in a clone pip install '.[{extra}]'")
    except Exception as raised:
        if not isinstance(cause := cause_of(raised), SSPropError):
            raise
        sys.exit(f"error: {cause}")
