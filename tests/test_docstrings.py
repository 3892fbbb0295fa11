"""Docstrings: every public name has one, and the examples in them run."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap

import pytest
import torch

import ssprop_fx

MODULES = [m.name for m in pkgutil.walk_packages(ssprop_fx.__path__, "ssprop_fx.") if ".integrations" not in m.name]


def members(cls):
    for name, member in vars(cls).items():
        function = getattr(member, "__func__", member)
        if not name.startswith("_") and (inspect.isfunction(function) or isinstance(member, property)):
            yield name, function


@pytest.mark.parametrize("name", ssprop_fx.__all__)
def test_public_names_and_their_members_are_documented(name):
    public = getattr(ssprop_fx, name)
    assert inspect.getdoc(public)
    if inspect.isclass(public):
        assert public.__doc__, name
        assert [member for member, function in members(public) if not function.__doc__] == []


def own_raises(function):
    """Names of the errors that a function raises itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = [n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise) and n.exc is not None]
    return {e.func.id for e in raised if isinstance(e, ast.Call) and isinstance(e.func, ast.Name)}


@pytest.mark.parametrize("name", ssprop_fx.__all__)
def test_docstrings_name_every_argument_and_error(name):
    public = getattr(ssprop_fx, name)
    functions = {name: public}
    if inspect.isclass(public):
        functions = {f"{name}.{m}": f.fget if isinstance(f, property) else f for m, f in members(public)}
        if "__init__" in vars(public) and not dataclasses.is_dataclass(public):
            functions[name] = public.__init__
    for where, function in functions.items():
        function = inspect.unwrap(function)
        if not inspect.isfunction(function):
            continue
        doc = f"{function.__doc__}\n{public.__doc__}"
        arguments = [a for a in inspect.signature(function).parameters if a not in ("self", "cls")]
        assert [a for a in arguments if not re.search(rf"\b{a}\b", doc)] == [], f"{where}: arguments without a word"
        assert [e for e in own_raises(function) if e not in doc] == [], f"{where}: errors without a word"


def test_docstrings_tell_units_shapes_and_source():
    """What holds a number says of what, what holds a shape says of which dimensions; the method is cited."""
    for name, words in {
        "Row": ("(N, C, *spatial)", "(N, K, *spatial)", "multiply-add counted as two", "whole groups", "memory"),
        "Report": ("Attributes:", "factor"),
        "Settings": ("between 0 and 1", "Attributes:"),
        "Meter": ("FLOPs", "joules", "Seconds", "Raises:"),
        "Schedule": ("arXiv 2408.12561", "Step t counts from 0", "between 0 and 1"),
        "Policy": ("arXiv 2408.12561", "Raises:"),
        "transform": ("arXiv 2408.12561", "Raises:"),
        "inspect": ("Raises:", "FLOPs"),
    }.items():
        text = inspect.getdoc(getattr(ssprop_fx, name))
        assert [w for w in words if w not in text] == [], name


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    assert module.__doc__, name
    torch.manual_seed(0)
    failed, _ = doctest.testmod(module, extraglobs={"ssprop_fx": ssprop_fx, "torch": torch})
    assert failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    documented = {
        test.name.split(".")[0] for name in ("transform", "inspect", "Policy", "Rule", "Schedule", "Meter", "Report")
        for test in finder.find(getattr(ssprop_fx, name), name) if test.examples
    }  # fmt: skip
    assert documented == {"transform", "inspect", "Policy", "Rule", "Schedule", "Meter", "Report"}
