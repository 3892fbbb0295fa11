"""The keys of a policy and the rules that override them: what is valid, and which layers a rule selects."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr
from pydantic.json_schema import SkipJsonSchema

from .errors import Checked, PolicyError, Problem, nearest
from .masking import ranking
from .schedule import Schedule
from .selection import AUTO

_Kind = Literal[
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "grouped",
    "depthwise",
    "pointwise",
    "functional",
    "linear",
]
_Criterion = Literal["l1", "l2", "taylor", "random"]
_DropOver = Literal["channels", "space", "channels_space", "channels_per_sample"]

KINDS: tuple[str, ...] = get_args(_Kind)
CRITERIA: tuple[str, ...] = get_args(_Criterion)

Layers = Mapping[str, Collection[str]]  # layer name -> its kinds, some of KINDS


# --- the keys -----------------------------------------------------------------------------------------------
# A key that a rule may override is a line in Settings, one in Rule and one in Contents; any other key is one
# in Contents. Validation, error texts, the JSON Schema, digests and `explain` are made from these.


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):  # True == 1, which is all that Literal[1] asks
        raise ValueError
    return value


def _not_empty(value: Any) -> Any:
    if value is None:
        expected = "a value, or no such key"
        raise PolicyError([Problem("", "", "an empty value is not allowed", expected, "write a value, or delete the key")])
    return value


def _compiles(pattern: str) -> str:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            what = f"{pattern!r} is no regular expression: {error}"
            step = "correct the expression, or drop `re:` to write a glob"
            raise PolicyError([Problem("", "", what, "a Python regular expression after `re:`", step)]) from None
    return pattern


class _MayBeOne:
    """Lets ``x`` stand for ``[x]``."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(self._wrap, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        many = handler(schema)
        return {"anyOf": [many["items"], many]}

    @staticmethod
    def _wrap(value: Any) -> Any:
        return _as_tuple(value if isinstance(value, list | tuple) or value is None else [value])


_T = TypeVar("_T")
_Optional = Annotated[_T | SkipJsonSchema[None], BeforeValidator(_not_empty)]
_OneOrMore = Annotated[tuple[_T, ...], Field(min_length=1), _MayBeOne()]

_DropRate = Annotated[
    float,
    Field(ge=0, lt=1, description="Share of output channels whose gradient is dropped, 0 <= drop_rate < 1."),
]
_CriterionKey = Annotated[_Criterion, Field(description="Rule that computes the importance of a channel.")]
_RoundTo = Annotated[
    Annotated[int, Field(ge=1)] | Literal["auto"],
    Field(description="What the number of kept channels is rounded to a multiple of; auto suits the hardware."),
]
_Gradients = Annotated[
    Literal["all", "weight"],
    Field(description="all: every gradient is restricted to the kept channels; weight: the input's stays dense."),
]
_DropOverKey = Annotated[
    _DropOver,
    Field(description="What is dropped: whole channels; the other choices are masks for analysis, and save nothing."),
]
_Pattern = Annotated[str, AfterValidator(_compiles)]


@dataclass(frozen=True)
class Settings:
    """What a policy decided for one layer.

    Attributes:
        drop_rate: share of the output channels whose gradient is dropped where the schedule's factor is one, between 0 and 1.
        criterion: how channels are ranked: ``l1``, ``l2``, ``taylor`` or ``random``.
        round_to: kept counts are multiples of it, or ``auto``.
        gradients: ``all``, or ``weight`` if the input's gradient stays dense.
        rule: the last rule that matched, ``rules[1] (policy.yaml:14)``, or ``default``.
        drop_over: ``channels``, ``space``, ``channels_space`` or ``channels_per_sample``.
    """

    drop_rate: float
    criterion: str
    round_to: int | Literal["auto"]
    gradients: str
    rule: str
    drop_over: str = "channels"

    @property
    def ranking(self) -> str:
        """Criterion and units in one, as the operators take it: ``l1``, or ``l1 over space``."""
        return ranking(self.criterion, self.drop_over)

    @property
    def multiple(self) -> int:
        """``round_to`` as the operators take it: 0 for ``auto``."""
        # no layer has as many channels, and an operator's argument no more bits
        return AUTO if self.round_to == "auto" else min(self.round_to, 1 << 62)

    def as_arguments(self, layer: str, allocation: str) -> tuple[str, float, str, int, str, str]:
        """What the operators are told of a layer, in their order; ``allocation`` is the handle of its model's counts."""
        return layer, self.drop_rate, self.ranking, self.multiple, self.gradients, allocation


class Rule(Checked):
    """Overrides the keys that it names for the layers that it selects, by name, by kind or by both.

    ``layers`` and ``kind`` take one string or several, of which one has to match; a rule with both selects
    what both match. Rules are frozen and hashable.

    Raises:
        PolicyError: a key is unknown or its value out of range, or the rule selects or overrides nothing.

    Examples:
        >>> Rule(layers="layer4.*", drop_rate=0.9).selects("layer4.0.conv1", {"conv2d"})
        True
    """

    layers: _Optional[_OneOrMore[_Pattern]] = Field(
        default=None,
        description="Layer names: a glob, or after `re:` a regular expression, matched in full; or a list.",
    )
    kind: _Optional[_OneOrMore[_Kind]] = Field(default=None, description="Kinds of layer: one, or a list of which one fits.")
    drop_rate: _Optional[_DropRate] = None
    criterion: _Optional[_CriterionKey] = None
    round_to: _Optional[_RoundTo] = None
    gradients: _Optional[_Gradients] = None
    drop_over: _Optional[_DropOverKey] = None
    optional: bool = Field(default=False, description="The rule may match nothing.")

    _origin: str = PrivateAttr("")

    @property
    def origin(self) -> str:
        """Where the rule was read, ``policy.yaml:14``, or empty; no part of equality and hash."""
        return self._origin

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings that the rule names, with their values."""
        return {key: value for key in OVERRIDABLE if (value := getattr(self, key)) is not None}

    def selects_name(self, name: str) -> bool:
        """Whether ``layers`` matches the layer name; a rule without ``layers`` matches every name."""
        return self.layers is None or any(
            re.fullmatch(pattern[3:], name) if pattern.startswith("re:") else fnmatch.fnmatchcase(name, pattern)
            for pattern in self.layers
        )

    def selects(self, name: str, kinds: Collection[str]) -> bool:
        """Whether the rule applies to a layer of this name and of these kinds."""
        return (self.kind is None or any(kind in kinds for kind in self.kind)) and self.selects_name(name)

    def asks_for_linear(self) -> bool:
        """Whether the rule says that linear layers are meant too; without such a rule they stay dense."""
        return self.kind is not None and "linear" in self.kind

    def hides(self, earlier: Rule) -> bool:
        """Whether ``earlier``, a rule before this one, can never decide anything."""
        if not earlier.overrides.keys() <= self.overrides.keys():
            return False
        if earlier.asks_for_linear() and not self.asks_for_linear():
            return False
        every_name = self.layers is None or any(
            set(pattern) == {"*"} or pattern in ("re:.*", "re:^.*$") for pattern in self.layers
        )
        return (every_name or (earlier.layers is not None and set(earlier.layers) <= set(self.layers or ()))) and (
            self.kind is None or (earlier.kind is not None and set(earlier.kind) <= set(self.kind))
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rule) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        schema = handler(core_schema)
        either = [{"anyOf": [{"required": [key]} for key in keys]} for keys in (_SELECTORS, OVERRIDABLE)]
        handler.resolve_ref_schema(schema)["allOf"] = either
        return schema

    @classmethod
    def _relations(cls, data: Mapping[str, Any], broken: Collection[str]) -> list[Problem]:
        if not set(broken) <= cls.model_fields.keys():  # a misspelt key may be the one that is missing
            return []
        problems = []
        for what, keys in (
            ("the rule selects no layers", _SELECTORS),
            ("the rule has no effect", OVERRIDABLE),
        ):
            if not any(key in data for key in keys):
                expected = f"at least one of {', '.join(keys)}"
                problems.append(Problem("Rule(...)", "", what, expected, "add one, or delete the rule"))
        return problems


_SELECTORS = ("layers", "kind")
OVERRIDABLE: tuple[str, ...] = tuple(field.name for field in fields(Settings) if field.name in Rule.model_fields)


class Contents(Checked):
    """A policy file of ssprop-fx: a default for every layer, a schedule, and rules for some layers."""

    version: Annotated[Literal[1], BeforeValidator(_no_boolean)] = Field(default=1, description="Version of this format.")
    drop_rate: _DropRate = 0.8
    criterion: _CriterionKey = "l1"
    round_to: _RoundTo = "auto"
    gradients: _Gradients = "all"
    drop_over: _DropOverKey = "channels"
    profitable: Annotated[
        Literal["always", "auto"],
        Field(
            description="auto: a layer whose sparse backward pass is slower than its dense one, as timed on the machine, "
            "stays dense; always: no such exception."
        ),
    ] = "always"
    schedule: Schedule = Field(
        default=Schedule(clock="optimizer"),
        description="When the drop rates are in force. Without it, every other optimizer step is dense.",
    )
    rules: Annotated[tuple[Rule, ...], BeforeValidator(_as_tuple)] = Field(
        default=(),
        description="The last rule that matches a layer decides; a rule overrides only keys it names.",
    )


def unmatched(rule: Rule, key: str, layers: Layers, aliases: Mapping[str, str]) -> Problem:
    """Why the rule, which stands at ``key``, is of no effect on ``layers``, and the nearest that would be."""
    where = rule.origin or "Policy(...)"
    selected = {kind for name, kinds in layers.items() if rule.selects_name(name) for kind in kinds}
    if any(rule.selects(name, kinds) for name, kinds in layers.items()):
        what = "the rule matches linear layers only, which stay dense"
        return Problem(where, key, what, "a rule that asks for linear layers", "add `kind: linear` to the rule")
    if rule.kind is not None and selected:
        present = [kind for kind in KINDS if kind in selected]
        what = f"no layer{' that `layers` matches' if rule.layers else ''} is of kind {' or '.join(rule.kind)}"
        near = next((near for kind in rule.kind if (near := nearest(kind, present))), None)
        return Problem(where, f"{key}.kind", what, f"one of {', '.join(present)}", _NO_MATCH, near)
    if not layers or rule.layers is None:
        what = f"no layer of {len(layers)} matches"
        return Problem(where, key, what, "a model with layers that the rule selects", _NO_MATCH)
    if alias := next(filter(rule.selects_name, aliases), None):
        what = f"{alias!r} is another name of the layer {aliases[alias]!r}"
        return Problem(where, f"{key}.layers", what, "the first name that a module has", _NO_MATCH, aliases[alias])
    what = f"no layer of {len(layers)} is named {' or '.join(map(repr, rule.layers))}"
    parts = [name.split(".") for name in layers]
    globs = {".".join(part[:end]) + ".*" for part in parts for end in range(1, len(part))}
    written = (re.sub(r"^re:\^?|\\|\$$", "", pattern) for pattern in rule.layers)
    near = next((near for name in written if (near := nearest(name, [*layers, *sorted(globs)]))), None)
    expected = f"a pattern for a layer name, such as {next(iter(layers))!r}"
    return Problem(where, f"{key}.layers", what, expected, _NO_MATCH, near)


_NO_MATCH = "correct the rule, or write `optional: true` if it may match nothing"
