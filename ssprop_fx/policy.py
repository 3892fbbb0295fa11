"""The policy: defaults, rules and a schedule, read from a file and checked once, and what they decide."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args
from weakref import WeakValueDictionary

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr
from pydantic.json_schema import SkipJsonSchema

from .errors import Checked, PolicyError, Problem, SSPropError, join_key, nearest
from .schedule import Clock, Schedule

if TYPE_CHECKING:
    from torch import nn
    from yaml import Node

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

KINDS: tuple[str, ...] = get_args(_Kind)
CRITERIA: tuple[str, ...] = get_args(_Criterion)

Layers = Mapping[str, Collection[str]]  # layer name -> its kinds, some of KINDS


# --- the keys -----------------------------------------------------------------------------------------------
# A key that a rule may override is a line in Settings, one in Rule and one in _Contents; any other key is one
# in _Contents. Validation, error texts, the JSON Schema, digests and `explain` are made from these.


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):  # True == 1, which is all that Literal[1] asks
        raise ValueError
    return value


def _not_empty(value: Any) -> Any:
    if value is None:
        expected = "a value, or no such key"
        raise PolicyError(
            [Problem("", "", "an empty value is not allowed", expected, "write a value, or delete the key")]
        )
    return value


def _compiles(pattern: str) -> str:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            what = f"{pattern!r} is no regular expression: {error}"
            step = "correct the expression, or drop `re:` to write a glob"
            raise PolicyError(
                [Problem("", "", what, "a Python regular expression after `re:`", step)]
            ) from None
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
    Field(
        description="What the number of kept channels is rounded to a multiple of; auto suits the hardware."
    ),
]
_Gradients = Annotated[
    Literal["all", "weight"],
    Field(
        description="all: every gradient is restricted to the kept channels; weight: the input's stays dense."
    ),
]
_Pattern = Annotated[str, AfterValidator(_compiles)]


@dataclass(frozen=True)
class Settings:
    """What a policy decided for one layer.

    ``rule`` is the last rule that matched, ``rules[1] (policy.yaml:14)``, or ``default``.
    """

    drop_rate: float
    criterion: str
    round_to: int | Literal["auto"]
    gradients: str
    rule: str


class Rule(Checked):
    """Overrides the keys that it names for the layers that it selects, by name, by kind or by both.

    ``layers`` and ``kind`` take one string or several, of which one has to match; a rule with both selects
    what both match. Rules are frozen and hashable.

    Raises:
        PolicyError: a key is unknown or its value out of range, or the rule selects or overrides nothing.

    >>> Rule(layers="layer4.*", drop_rate=0.9).selects("layer4.0.conv1", {"conv2d"})
    True
    """

    layers: _Optional[_OneOrMore[_Pattern]] = Field(
        default=None,
        description="Layer names: a glob, or after `re:` a regular expression, matched in full; or a list.",
    )
    kind: _Optional[_OneOrMore[_Kind]] = Field(
        default=None, description="Kinds of layer: one, or a list of which one fits."
    )
    drop_rate: _Optional[_DropRate] = None
    criterion: _Optional[_CriterionKey] = None
    round_to: _Optional[_RoundTo] = None
    gradients: _Optional[_Gradients] = None
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
            re.fullmatch(pattern[3:], name)
            if pattern.startswith("re:")
            else fnmatch.fnmatchcase(name, pattern)
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
        return (
            every_name or (earlier.layers is not None and set(earlier.layers) <= set(self.layers or ()))
        ) and (self.kind is None or (earlier.kind is not None and set(earlier.kind) <= set(self.kind)))

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
OVERRIDABLE: tuple[str, ...] = tuple(
    field.name for field in fields(Settings) if field.name in Rule.model_fields
)


class _Contents(Checked):
    """A policy file of ssprop-fx: a default for every layer, a schedule, and rules for some layers."""

    version: Annotated[Literal[1], BeforeValidator(_no_boolean)] = Field(
        default=1, description="Version of this format."
    )
    drop_rate: _DropRate = 0.8
    criterion: _CriterionKey = "l1"
    round_to: _RoundTo = "auto"
    gradients: _Gradients = "all"
    schedule: Schedule = Field(
        default=Schedule(clock="optimizer"),
        description="When the drop rates are in force. Without it, every other optimizer step is dense.",
    )
    rules: Annotated[tuple[Rule, ...], BeforeValidator(_as_tuple)] = Field(
        default=(),
        description="The last rule that matches a layer decides; a rule overrides only keys it names.",
    )


# --- from a file or a mapping to contents -------------------------------------------------------------------

Where = Callable[[str], str]  # dotted key -> the place to look at


def _checked(raw: Any, where: Where, problems: Sequence[Problem] = ()) -> _Contents:
    """Contents, or one error with ``problems`` and all that are found here, each placed by ``where``."""
    found: list[Problem] = []
    if isinstance(raw, Mapping):
        raw = _text_keyed(raw, "", found)
        try:
            contents = _Contents(**raw)
        except PolicyError as error:
            found += error.problems
        found += _hidden_rules(raw.get("rules"), where)
    else:
        what = "the document is empty" if raw is None else "the document is no mapping"
        expected = f"a mapping with the keys {', '.join(_Contents.model_fields)}"
        found.append(
            Problem("", "", what, expected, "write `key: value` lines; `version: 1` alone is a policy")
        )
    if problems or found:
        found = [*problems, *(replace(problem, where=where(problem.key)) for problem in found)]
        raise PolicyError(sorted(found, key=_line))
    return contents


def _line(problem: Problem) -> int:
    line = problem.where.rpartition(":")[2]
    return int(line) if line.isdecimal() else 0


def _text_keyed(raw: Any, key: str, problems: list[Problem]) -> Any:
    """``raw`` as plain dicts and lists, without the keys that are not text: each of those is a problem."""
    if isinstance(raw, Mapping):
        for name in raw:
            if not isinstance(name, str):
                what = f"the key {json.dumps(name, default=str)} is not text"
                step = "quote the key; YAML reads on, off, yes and no as true and false"
                problems.append(Problem("", join_key(key, str(name)), what, "text", step))
        return {k: _text_keyed(v, join_key(key, k), problems) for k, v in raw.items() if isinstance(k, str)}
    if isinstance(raw, list | tuple):
        return [_text_keyed(item, join_key(key, index), problems) for index, item in enumerate(raw)]
    return raw


def _hidden_rules(raw: Any, where: Where) -> Iterator[Problem]:
    rules = []
    for index, item in enumerate(raw if isinstance(raw, list) else ()):
        try:
            rules.append((f"rules[{index}]", item if isinstance(item, Rule) else Rule(**item)))
        except (PolicyError, TypeError):
            continue  # reported where it is validated
    for position, (key, rule) in enumerate(rules):
        hiding = next((later for later, other in rules[position + 1 :] if other.hides(rule)), None)
        if hiding is not None:
            what = f"the rule never decides: {hiding} ({where(hiding)}) overrides all that it says"
            step = f"delete it, or move it behind {hiding}"
            yield Problem("", key, what, "a rule that some layer is left to", step, hiding)


class _YamlReader:
    """Builds plain values from YAML nodes, noting the line of every key and the problems on the way."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lines: dict[str, int] = {}
        self.problems: list[Problem] = []

    def read(self, text: bytes) -> Any:
        import yaml

        self._yaml = yaml
        self._built: dict[int, Any] = {}
        try:
            self._loader = yaml.SafeLoader(text)
            node = self._loader.get_single_node()
            return None if node is None else self._build(node, "")
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
            what = f"not YAML: {getattr(error, 'problem', None) or error}".replace("\n", " ")
            step = "indent with spaces, not with tabs" if "\\t" in what else "correct the syntax at this line"
            place = f"{self.path}:{mark.line + 1 if mark else 1}"
            raise PolicyError([*self.problems, Problem(place, "", what, "one YAML document", step)]) from None

    def line(self, key: str) -> int:
        """Line of the key or, if it was not written, of what should hold it."""
        while key and key not in self.lines:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return self.lines.get(key, 1)

    def where(self, key: str) -> str:
        """``policy.yaml:12``"""
        return f"{self.path}:{self.line(key)}"

    def _build(self, node: Node, key: str) -> Any:
        self.lines.setdefault(key, node.start_mark.line + 1)
        if id(node) in self._built:  # an alias
            return self._built[id(node)]
        self._built[id(node)] = None  # for an alias inside its own anchor
        value: Any
        if isinstance(node, self._yaml.ScalarNode):
            value = self._scalar(node, key)
        elif node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            self._note(node, key, f"unknown tag {node.tag}", "a plain mapping or list", "delete the tag")
            value = None
        elif isinstance(node, self._yaml.SequenceNode):
            value = [self._build(item, join_key(key, index)) for index, item in enumerate(node.value)]
        else:
            value = self._mapping(node, key)
        self._built[id(node)] = value
        return value

    def _scalar(self, node: Node, key: str) -> Any:
        try:
            value = self._loader.construct_object(node)
        except (ValueError, self._yaml.YAMLError) as error:  # a date that does not exist, an unknown tag
            reason = getattr(error, "problem", None) or error
            self._note(
                node, key, f"{node.value!r} cannot be read: {reason}", "a YAML value", "quote or correct it"
            )
            return node.value
        if type(value) in (int, float) and re.search(r"^[-+]?0[0-9_]|:", node.value):
            what = f"{node.value} is {value} in YAML 1.1, which reads base 8 and base 60"
            self._note(
                node, key, what, "a decimal number", "write it without leading zeros and colons", str(value)
            )
        return value

    def _mapping(self, node: Any, key: str) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for name_node, _ in node.value:
            name = name_node.value
            if name_node.id == "scalar" and name in lines:
                what = f"written twice, first in line {lines[name]}"
                self._note(name_node, join_key(key, name), what, "each key once", "delete one of the two")
            elif name_node.id == "scalar":
                lines[name] = name_node.start_mark.line + 1
        self._loader.flatten_mapping(node)
        value = {}
        for name_node, value_node in node.value:
            if name_node.id != "scalar":
                self._note(name_node, key, "a key is a list or a mapping", "text as key", "write a plain key")
                continue
            name = self._scalar(name_node, key)
            inner = join_key(key, str(name))
            self.lines[inner] = name_node.start_mark.line + 1
            value[name] = self._build(value_node, inner)
        return value

    def _note(
        self, node: Node, key: str, what: str, expected: str, step: str, near: str | None = None
    ) -> None:
        place = f"{self.path}:{node.start_mark.line + 1}"
        self.problems.append(Problem(place, key, what, expected, step, near))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        siblings = (
            sorted({p.name for p in path.parent.iterdir()} - {path.name}) if path.parent.is_dir() else []
        )
        step = (
            "correct the path" if siblings else f"correct the path: {path.parent} is no directory with files"
        )
        near = nearest(path.name, siblings)
        what = f"the file cannot be read: {error.strerror or error}"
        raise PolicyError([Problem(str(path), "", what, "a policy file", step, near)]) from None


# --- the policy --------------------------------------------------------------------------------------------


class Policy:
    """Which gradients are dropped, where and when. Its contents never change; only its clock moves.

    Args:
        contents: the keys of a policy file, each an attribute of the policy, too. ``drop_rate`` (0.8),
            ``criterion`` (``l1``), ``round_to`` (``auto``) and ``gradients`` (``all``) of every layer that
            no rule changes; ``schedule``, a :class:`Schedule` or a mapping; ``rules``, a sequence of
            :class:`Rule` or of mappings. Without a schedule it is the paper's (arXiv 2408.12561): dense and
            sparse steps by turns, with ``clock: optimizer``.

    Raises:
        PolicyError: with every problem of the contents.

    Each policy has its own clock and is equal to itself alone; for equal contents compare :attr:`digest`.

    >>> policy = Policy(drop_rate=0.5, schedule={"period": 4}, rules=[{"layers": "stem.*", "drop_rate": 0}])
    >>> [policy.factor, policy.step(), policy.step(), policy.factor]
    [0.0, None, None, 1.0]
    """

    __slots__ = ("__weakref__", "_bound", "_clock", "_contents", "_digest", "_handle")

    def __init__(self, **contents: Any) -> None:
        if contents.get("schedule", ...) is None:
            del contents["schedule"]
        self._start(_checked(contents, lambda key: "Policy(...)"))

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy file (YAML, UTF-8).

        Raises:
            PolicyError: the file cannot be read, is not YAML or has problems; each is given with its line.
        """
        reader = _YamlReader(str(path))
        contents = _checked(reader.read(_read(Path(path))), reader.where, reader.problems)
        for index, rule in enumerate(contents.rules):
            rule._origin = f"{Path(path).name}:{reader.line(f'rules[{index}]')}"
        return cls._of(contents)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Policy:
        """The policy of what a policy file contains, as :meth:`to_dict` returns it.

        Raises:
            PolicyError: with every problem of the contents.
        """
        return cls._of(_checked(mapping, lambda key: "Policy.from_dict(...)"))

    @classmethod
    def _of(cls, contents: _Contents) -> Policy:
        policy = cls.__new__(cls)
        policy._start(contents)
        return policy

    def _start(self, contents: _Contents) -> None:
        self._contents = contents
        self._clock = Clock(contents.schedule)
        self._bound: dict[str, Settings] = {}
        text = json.dumps(self.to_dict(), sort_keys=True)
        self._digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        _made[self._digest] += 1
        self._handle = f"{self._digest}#{_made[self._digest]}"
        _live[self._handle] = self

    def __getattr__(self, name: str) -> Any:
        if name in _Contents.model_fields:
            return getattr(self._contents, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        words = [f"{key}={getattr(self, key)!r}" for key in OVERRIDABLE]
        words += [f"schedule={self.schedule.kind}, {len(self.rules)} rules"]
        return f"<Policy {', '.join(words)}; step {self.steps}, factor {self.factor:g}>"

    @property
    def digest(self) -> str:
        """12 hexadecimal digits of the SHA-256 of the contents: equal for equal contents."""
        return self._digest

    @property
    def handle(self) -> str:
        """Name of this object in this process, ``digest#number``, for :func:`policy_for`; a copy differs."""
        return self._handle

    @property
    def steps(self) -> int:
        """Advances of the clock so far."""
        return self._clock.steps

    @property
    def factor(self) -> float:
        """What every drop rate is multiplied by now."""
        return self._clock.factor

    @property
    def quantized_factor(self) -> float:
        """:attr:`factor` rounded to one of the schedule's ``levels``, as compiled code uses it."""
        return self._clock.quantized_factor

    def step(self) -> None:
        """Advance the clock by one step, like a learning-rate scheduler's ``step``.

        On a policy with ``clock: optimizer`` the call takes over: from then on optimizer steps do not count.
        """
        self._clock.step()

    def assign(self, layers: Layers, require_match: bool = True) -> dict[str, Settings]:
        """Decide the settings of each layer: the last rule that matches decides, key by key.

        Linear layers have drop rate 0 unless a rule that names ``linear`` in its ``kind`` matches them.

        Args:
            layers: layer name -> its kinds, some of :data:`KINDS`.
            require_match: every rule that is not ``optional`` has to match a layer.

        Raises:
            PolicyError: with every rule that matches nothing.
        """
        if require_match and (problems := self.unmatched_rules(layers)):
            raise PolicyError(problems)
        return {name: self._settings(name, kinds) for name, kinds in layers.items()}

    def _settings(self, name: str, kinds: Collection[str]) -> Settings:
        values = {key: getattr(self, key) for key in OVERRIDABLE}
        decided, asked = "default", "linear" not in kinds
        for index, rule in enumerate(self.rules):
            if rule.selects(name, kinds):
                values |= rule.overrides
                decided = f"rules[{index}] ({rule.origin})" if rule.origin else f"rules[{index}]"
                asked = asked or rule.asks_for_linear()
        if not asked:
            values["drop_rate"] = 0.0
        return Settings(**values, rule=decided)

    def unmatched_rules(self, layers: Layers) -> list[Problem]:
        """A problem for each rule, other than the optional ones, that is of no effect on ``layers``."""
        meant = {
            name: kinds
            for name, kinds in layers.items()
            if "linear" not in kinds
            or any(rule.asks_for_linear() and rule.selects(name, kinds) for rule in self.rules)
        }
        problems = []
        for index, rule in enumerate(self.rules):
            among = (
                layers if rule.drop_rate == 0 else meant
            )  # linear layers are dense: asking for that is no fault
            if not rule.optional and not any(rule.selects(name, kinds) for name, kinds in among.items()):
                problems.append(_unmatched(rule, f"rules[{index}]", layers))
        return problems

    def bind(self, assigned: Mapping[str, Settings]) -> None:
        """Remember layers and their settings, beside those already bound, for :meth:`drop_rates`."""
        self._bound.update(assigned)

    def drop_rates(self) -> dict[str, float]:
        """Layer name -> drop rate times factor, now, of the layers that were bound."""
        return {name: settings.drop_rate * self.factor for name, settings in self._bound.items()}

    def explain(self, model: nn.Module) -> Explanation:
        """The settings of each layer of a model and the rule that decided; print it to see a table.

        Raises:
            PolicyError: with every rule that matches no layer, as :meth:`assign` does.
        """
        from .transform import layer_kinds

        layers = layer_kinds(model)
        return Explanation(layers, self.assign(layers))

    def to_dict(self) -> dict[str, Any]:
        """The contents as plain values, from which :meth:`from_dict` makes an equal policy."""
        return self._contents.model_dump(mode="json", exclude_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The clock, ``steps`` and ``clock``, and the ``schedule`` that it belongs to, as plain values."""
        return {
            "steps": self.steps,
            "clock": self._clock.mode,
            "schedule": self.schedule.model_dump(mode="json"),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the clock to a state; a state that is refused changes nothing.

        Raises:
            PolicyError: ``state`` is not what :meth:`state_dict` returns, or the schedule is another one.
        """
        self._clock.load_state_dict(state)

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """JSON Schema (draft 2020-12) of a policy file, made from the models that validate it."""
        schema = _tidied(_Contents.model_json_schema())
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "ssprop-fx policy",
            **schema,
        }

    def __getstate__(self) -> tuple[Any, ...]:
        return self._contents, (self.steps, self._clock.mode, self._clock.ticked), self._bound

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        contents, clock, bound = state
        self._start(contents)
        self._clock.set(*clock)
        self.bind(bound)


_made: Counter[str] = Counter()
_live: WeakValueDictionary[str, Policy] = WeakValueDictionary()


def policy_for(handle: str) -> Policy:
    """The policy with this :attr:`Policy.handle`.

    Raises:
        SSPropError: this process has no such policy, or has it no more.
    """
    policy = _live.get(handle)
    if policy is None:
        raise SSPropError(
            f"no policy {handle!r} is alive in this process: keep a reference to the policy while the model "
            "made with it is in use, and in another process make the model again"
        )
    return policy


class Explanation(Mapping[str, Settings]):
    """Layer name -> :class:`Settings`; its text is a table with a line for each layer."""

    def __init__(self, layers: Layers, settings: Mapping[str, Settings]) -> None:
        self._layers = layers
        self._settings = settings

    def __getitem__(self, name: str) -> Settings:
        return self._settings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def __str__(self) -> str:
        rows = [["layer", "kinds", *(field.name for field in fields(Settings))]]
        for name, settings in self.items():
            kinds = " ".join(kind for kind in KINDS if kind in self._layers[name])
            rows.append([name, kinds, *map(str, astuple(settings))])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    __repr__ = __str__


def _unmatched(rule: Rule, key: str, layers: Layers) -> Problem:
    where = rule.origin or "Policy(...)"
    selected = {kind for name, kinds in layers.items() if rule.selects_name(name) for kind in kinds}
    if any(rule.selects(name, kinds) for name, kinds in layers.items()):
        what = "the rule matches linear layers only, which stay dense"
        return Problem(
            where, key, what, "a rule that asks for linear layers", "add `kind: linear` to the rule"
        )
    if rule.kind is not None and selected:
        present = [kind for kind in KINDS if kind in selected]
        what = (
            f"no layer{' that `layers` matches' if rule.layers else ''} is of kind {' or '.join(rule.kind)}"
        )
        near = next((near for kind in rule.kind if (near := nearest(kind, present))), None)
        return Problem(where, f"{key}.kind", what, f"one of {', '.join(present)}", _NO_MATCH, near)
    if not layers or rule.layers is None:
        what = f"no layer of {len(layers)} matches"
        return Problem(where, key, what, "a model with layers that the rule selects", _NO_MATCH)
    what = f"no layer of {len(layers)} is named {' or '.join(map(repr, rule.layers))}"
    parts = [name.split(".") for name in layers]
    globs = {".".join(part[:end]) + ".*" for part in parts for end in range(1, len(part))}
    written = (re.sub(r"^re:\^?|\\|\$$", "", pattern) for pattern in rule.layers)
    near = next((near for name in written if (near := nearest(name, [*layers, *sorted(globs)]))), None)
    expected = f"a pattern for a layer name, such as {next(iter(layers))!r}"
    return Problem(where, f"{key}.layers", what, expected, _NO_MATCH, near)


_NO_MATCH = "correct the rule, or write `optional: true` if it may match nothing"


def _tidied(schema: Any) -> Any:
    """A generated JSON Schema without titles and null defaults; of a description, the first paragraph."""
    if isinstance(schema, list):
        return [_tidied(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: _tidied(value)
        for key, value in schema.items()
        if key != "title" and (key, value) != ("default", None)
    }
    if isinstance(kept.get("description"), str):
        kept["description"] = " ".join(kept["description"].partition("\n\n")[0].split())
    return kept
