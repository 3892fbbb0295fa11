"""Models and inputs from what is typed on a command line: ``torchvision:resnet18``, ``net.py:build``, ``2x3x224x224``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SSPropError, nearest

_INSTALLED = tuple({sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")})  # where the user's own code is not
FORMS = "torchvision:NAME, timm:NAME, package.module:CALLABLE or path/to/file.py:CALLABLE"
MADE = "filled with random normal numbers in float32"  # an input


class NameProblem(SSPropError):
    """A model or an input cannot be made from the text that names it."""


def load_model(name: str) -> nn.Module:
    """The model that ``name`` stands for, with random weights, in training mode; nothing is downloaded.

    Args:
        name: ``torchvision:NAME`` or ``timm:NAME`` from their registries; else, after a module or the path of a Python
            file, a callable without arguments that returns a module, or a module itself.

    What that prints goes to the standard error, so that it does not get into a command's JSON.

    Raises:
        NameProblem: no such library, module, file, model or callable, or what it gives is no ``nn.Module``.
        SSPropError: the code that makes the model fails.
    """
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise NameProblem(f"{name!r} names no model; expected {FORMS}")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            model = _LIBRARIES.get(source, _from_python)(source, attribute)
    except NameProblem:
        raise
    except (Exception, SystemExit) as problem:  # the user's own code may raise anything
        raise SSPropError(f"{name} fails: {told(problem)}") from problem
    if not isinstance(model, nn.Module):
        raise NameProblem(f"{name} gave {type(model).__name__}, not a torch.nn.Module")
    return model.train()


def first_line(problem: BaseException) -> str:
    """What an exception says, in a line."""
    return (str(problem) or type(problem).__name__).partition("\n")[0]


def told(problem: BaseException) -> str:
    """What an exception is, what it says, and where in the user's own code it was raised: ``ValueError: odd (net.py:12)``."""
    place = ""
    for frame, line in traceback.walk_tb(problem.__traceback__):
        file, package = frame.f_code.co_filename, frame.f_globals.get("__name__", "").partition(".")[0]
        if package != __package__ and not file.startswith((*_INSTALLED, "<")):
            place = f" ({Path(file).name}:{line})"
    return f"{type(problem).__name__}: {first_line(problem)}{place}"


def make_input(shape: str) -> Tensor:
    """A tensor of random normal numbers, float32, from its shape, ``2x3x224x224``.

    Raises:
        NameProblem: the text is no shape.
    """
    sizes = shape.lower().replace("×", "x").split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise NameProblem(f"{shape!r} is no shape; expected whole numbers joined by x, such as 1x3x224x224")
    try:
        return torch.randn([int(size) for size in sizes])
    except (RuntimeError, TypeError, ValueError, OverflowError, MemoryError) as problem:
        raise NameProblem(f"an input of {shape} cannot be made: {first_line(problem)}") from None


def _from_torchvision(library: str, name: str) -> Any:
    models = _imported(library, f"pip install {library}").models
    if name not in models.list_models():
        raise _unknown(library, name, models.list_models())
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    return models.get_model(name, **{k: None for k in ("weights", "weights_backbone") if k in parameters})


def _from_timm(library: str, name: str) -> Any:
    timm = _imported(library, f"pip install {library}")
    if not timm.is_model(name):
        raise _unknown(library, name, timm.list_models())
    return timm.create_model(name, pretrained=False)


_LIBRARIES: dict[str, Callable[[str, str], Any]] = {"torchvision": _from_torchvision, "timm": _from_timm}


def _from_python(source: str, attribute: str) -> Any:
    module = _from_file(Path(source)) if source.endswith(".py") else _from_here(source)
    names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    if not hasattr(module, attribute):
        raise _unknown(source, attribute, names)
    found = getattr(module, attribute)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    return found()


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise NameProblem(f"there is no file {path}{_hint(path.name, siblings)}")
    sys.path.insert(0, str(path.parent.resolve()))  # as `python path` does
    name = f"_ssprop_model_{path.stem}"  # a file named as a module that is in use must not replace it
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _from_here(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))  # as `python -m name` does
    return _imported(name, f"expected {FORMS}")


def _imported(name: str, next_step: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name is None or not f"{name}.".startswith(f"{problem.name}."):
            raise  # the module is there; something that it imports is not
        near = "" if name in _LIBRARIES else _hint(name, list(_LIBRARIES))
        raise NameProblem(f"there is no module {problem.name!r}{near}; {next_step}") from None


def _unknown(source: str, name: str, names: list[str]) -> NameProblem:
    return NameProblem(f"{source} has no {name!r}{_hint(name, names)}")


def _hint(name: str, names: list[str]) -> str:
    near = nearest(name, names)
    return f"; nearest: {near}" if near else ""
