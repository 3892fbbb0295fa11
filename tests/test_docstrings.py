"""Docstrings: every public name has one, and the examples in them run."""

import doctest
import importlib
import inspect
import pkgutil

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
