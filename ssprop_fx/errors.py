"""The package's errors, and the one place where a validation error becomes a :class:`PolicyError`."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ._compat import failed_operation


class SSPropError(Exception):
    """Base of every error that ssprop-fx raises on purpose."""


class TransformError(SSPropError):
    """A model cannot be rewritten as the policy asks."""


def cause_of(problem: BaseException) -> BaseException:
    """What a compiler was told, by a backend or an operation, where an exception is its own around that; else the exception."""
    seen: set[int] = set()
    while isinstance(inner := getattr(problem, "inner_exception", None), BaseException) and id(inner) not in seen:
        seen.add(id(inner))
        problem = inner
    return failed_operation(problem) or problem


@dataclass(frozen=True)
class Problem:
    """One fault: what is wrong, where, what was expected, the nearest valid thing and the next step.

    Args:
        where: place to look at: ``policy.yaml:12``, or the call, ``Policy(...)``.
        key: dotted path of the key, ``rules[1].drop_rate``; empty for a document as a whole.
        what: what is wrong.
        expected: what is valid there.
        next_step: what to do about it.
        nearest: the valid name or value nearest to the one written, or None.
    """

    where: str
    key: str
    what: str
    expected: str
    next_step: str
    nearest: str | None = None

    def __str__(self) -> str:
        place = f"{self.where}: {self.key}" if self.key else self.where
        nearest = f" Nearest: {self.nearest}." if self.nearest is not None else ""
        return f"{place}: {self.what}. Expected {self.expected}.{nearest} Next step: {self.next_step}."


class PolicyError(SSPropError, ValueError):
    """A policy is wrong; its text lists every problem that was found, not the first alone.

    It is a ``ValueError`` too: by that, pydantic lets a nested model hand its problems to the outer one.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        return "\n  ".join([f"{len(self.problems)} problems", *map(str, self.problems)])


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like ``word``, whatever its case, or None if none resembles it."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[found[0]] if found else None


def join_key(outer: str, inner: str | int) -> str:
    """Path of a key inside another: ``rules`` and 1 give ``rules[1]``; with ``kind``, ``rules[1].kind``."""
    if isinstance(inner, int):
        return f"{outer}[{inner}]"
    return f"{outer}.{inner}" if outer and inner and not inner.startswith("[") else outer + inner


class Checked(BaseModel):
    """Frozen, strict model whose constructor raises one :class:`PolicyError` with all its problems."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, /, **data: Any) -> None:
        problems: list[Problem] = []
        try:
            super().__init__(**data)
        except ValidationError as error:
            problems = list(_translate(error, type(self), data))
        problems += self._relations(data, {problem.key.partition("[")[0] for problem in problems})
        if problems:
            raise PolicyError(problems)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).model_fields:
            raise AttributeError(f"{type(self).__name__}.{name} does not change; make another {type(self).__name__}")
        super().__setattr__(name, value)

    @classmethod
    def _relations(cls, data: Mapping[str, Any], broken: Collection[str]) -> list[Problem]:
        """Problems between keys, found even while the keys named in ``broken`` have problems of their own."""
        return []


def _translate(error: ValidationError, model: type[Checked], data: Mapping[str, Any]) -> Iterator[Problem]:
    problems = list(_problems(error, model, data))
    for problem in problems:  # of a list, its items say it better
        if not any(other.key.startswith(f"{problem.key}[") for other in problems):
            yield problem


def _problems(error: ValidationError, model: type[Checked], data: Mapping[str, Any]) -> Iterator[Problem]:
    schema = model.model_json_schema()
    where = f"{model.__name__}(...)"
    seen = set()
    for fault in error.errors(include_url=False):
        if fault["type"] == "none_required":  # said of every key that may be absent, beside the fault itself
            continue
        # Some parts of a location lead nowhere in what was written: branches of a union, and the one item of
        # an `x` that stands for `[x]`.
        key, value, rule = "", data, schema
        for part in fault["loc"]:
            if isinstance(value, Mapping) and part in value:
                rule = rule.get("properties", {}).get(part, {})
            elif isinstance(part, int) and isinstance(value, list | tuple):
                rule = next((branch["items"] for branch in _branches(rule) if "items" in branch), {})
            else:
                continue
            key, value = join_key(key, part), value[part]  # type: ignore[index]
        if key in seen:
            continue
        seen.add(key)
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, PolicyError):
            for problem in cause.problems:
                yield replace(problem, where=where, key=join_key(key, problem.key))
        elif fault["type"] == "extra_forbidden":
            valid = list(model.model_fields)
            near = nearest(key, valid)
            step = f"rename it to {near}, or delete it" if near else "delete it"
            yield Problem(where, key, "unknown key", f"one of {', '.join(valid)}", step, near)
        else:
            outside = fault["type"].startswith(("greater_than", "less_than"))
            what = f"{_shown(value)} is {'out of range' if outside else 'not allowed'}"
            expected = _expectation(key.rpartition(".")[2], rule, schema)
            near = _suggestion(value, rule)
            step = _next_step(value, near)
            if near is None and expected.startswith("text") and isinstance(value, (int, float)):
                step = f'quote it: "{_text(value)}"'
            if outside and near is None and "exclusiveMaximum" in rule:
                step = "write the share, such as 0.8 for 80 %"
            yield Problem(where, key, what, expected, step, near)


def _branches(rule: dict[str, Any]) -> list[dict[str, Any]]:
    return rule.get("anyOf", [rule])


def _next_step(value: Any, near: str | None) -> str:
    if value is None:
        return "write a value, or delete the key"
    if isinstance(value, bool):
        return "write the value meant; YAML reads on, off, yes and no as true and false unless they are quoted"
    if near is None:
        return "write a value of that form"
    if isinstance(value, str):
        return f"write {near} without quotes" if _is_number(near) and _is_number(value) else f"write {near}"
    percentage = isinstance(value, (int, float)) and _is_number(near) and float(near) * 100 == value
    return f"write {near} for {_text(value)} %" if percentage else f"write {near}"


def _expectation(name: str, rule: dict[str, Any], schema: dict[str, Any]) -> str:
    """A JSON Schema in words: ``a number, 0 <= drop_rate < 1``."""
    if "$ref" in rule:
        rule = schema["$defs"][rule["$ref"].rpartition("/")[2]]
    if "anyOf" in rule:
        return " or ".join(
            "a list of them" if branch.get("items") in rule["anyOf"] else _expectation(name, branch, schema)
            for branch in rule["anyOf"]
        )
    if "enum" in rule:
        return f"one of {', '.join(map(_text, rule['enum']))}"
    if "const" in rule:
        return _text(rule["const"])
    kind = rule.get("type")
    if kind == "object":
        return f"a mapping with the keys {', '.join(rule['properties'])}"
    if kind == "array":
        return f"a list, each item {_expectation(name, rule['items'], schema)}"
    noun = {"number": "a number", "integer": "a whole number", "boolean": "true or false", "null": "null"}
    words = noun.get(str(kind), "text")
    if "minimum" not in rule:
        return words
    if "maximum" in rule:
        return f"{words}, {_text(rule['minimum'])} <= {name} <= {_text(rule['maximum'])}"
    if "exclusiveMaximum" in rule:
        return f"{words}, {_text(rule['minimum'])} <= {name} < {_text(rule['exclusiveMaximum'])}"
    return f"{words} >= {_text(rule['minimum'])}"


def _suggestion(value: Any, rule: dict[str, Any]) -> str | None:
    """The valid value nearest to ``value``, written as in YAML."""
    if "const" in rule:
        return _text(rule["const"])
    branches = _branches(rule)
    names = [_text(name) for branch in branches for name in branch.get("enum", [branch.get("const", "")])]
    numeric = next((branch for branch in branches if branch.get("type") in ("integer", "number")), None)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if numeric is not None and isinstance(value, str) and value.strip().endswith("%"):
        if numeric["type"] == "integer":
            return None
        value = value.strip()[:-1]
    if numeric is None or not _is_number(value):
        return nearest(str(value), filter(None, names))
    number = float(value)
    if numeric["type"] == "integer" and not number.is_integer():
        return None
    top = numeric.get("maximum", numeric.get("exclusiveMaximum", math.inf))
    if top == 1 and 2 <= number < 100:  # a percentage
        return f"{number / 100:.12g}"
    if number >= top:
        return _text(top) if "maximum" in numeric else None
    return _text(max(number, numeric.get("minimum", number)))


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value)) and "_" not in str(value)
    except (TypeError, ValueError, OverflowError):
        return False


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


def _shown(value: Any) -> str:
    if value is None:
        return "an empty value"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, str):
        return f"the text {json.dumps(value, ensure_ascii=False)}"
    noun = "mapping" if isinstance(value, Mapping) else "list" if isinstance(value, list | tuple) else None
    if noun is None:
        return f"a value of type {type(value).__name__}"
    return f"a {noun}" if value else f"an empty {noun}"
