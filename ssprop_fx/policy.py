"""The policy: what its rules decide for each layer, when its schedule puts that in force, and its state."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import policy_file
from .allocation import allocations_of, settled, take_along
from .errors import PolicyError, Problem
from .rules import CRITERIA, KINDS, OVERRIDABLE, Contents, Layers, Rule, Settings, unmatched
from .schedule import Clock, Schedule

if TYPE_CHECKING:
    from torch import nn

    from .report import Report

__all__ = ["CRITERIA", "KINDS", "Explanation", "Policy", "Rule", "Settings"]

# as it stands: Dynamo, which may trace a policy, cannot read pydantic's property in every release (2.14)
_KEYS = frozenset(Contents.model_fields)


class Policy:
    """Which gradients are dropped, where and when. Its contents never change; only its clock moves.

    Args:
        contents: the keys of a policy file, each an attribute of the policy, too. ``drop_rate`` (0.8),
            ``criterion`` (``l1``), ``round_to`` (``auto``), ``gradients`` (``all``) and ``drop_over``
            (``channels``) of every layer that no rule changes; ``profitable`` (``always``); ``schedule``,
            a :class:`Schedule` or a mapping; ``rules``, a sequence of :class:`Rule` or of mappings.
            Without a schedule it is the paper's (arXiv 2408.12561): dense and sparse steps by turns, with
            ``clock: optimizer``.
        unnamed: nothing; a value without its key is refused with what to write.

    Raises:
        PolicyError: with every problem of the contents.
        TypeError: a value has no key.

    Each policy has its own clock and is equal to itself alone; for equal contents compare :attr:`digest`.

    Examples:
        >>> policy = Policy(drop_rate=0.5, schedule={"period": 4}, rules=[{"layers": "stem.*", "drop_rate": 0}])
        >>> [policy.factor, policy.step(), policy.step(), policy.factor]
        [0.0, None, None, 1.0]
    """

    __slots__ = ("__weakref__", "_bound", "_clock", "_contents", "_digest", "compiled", "remembered")

    def __init__(self, *unnamed: Any, **contents: Any) -> None:
        if unnamed:
            raise TypeError(f"Policy takes its keys by name, got {unnamed[0]!r}; {_meant(unnamed[0])}")
        if contents.get("schedule", ...) is None:
            del contents["schedule"]
        self._start(policy_file.checked(contents, lambda key: "Policy(...)"))

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read the policy file at ``path`` (YAML, UTF-8).

        Raises:
            PolicyError: the file cannot be read, is not YAML or has problems; each is given with its line.
        """
        return cls._of(policy_file.read_file(path))

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Policy:
        """The policy of a ``mapping`` as in a policy file, or as :meth:`to_dict` returns it.

        Raises:
            PolicyError: with every problem of the contents.
        """
        return cls._of(policy_file.checked(mapping, lambda key: "Policy.from_dict(...)"))

    @classmethod
    def _of(cls, contents: Contents) -> Policy:
        policy = cls.__new__(cls)
        policy._start(contents)
        return policy

    def _start(self, contents: Contents) -> None:
        self._contents = contents
        self._clock = Clock(contents.schedule)
        self._bound: dict[str, Settings] = {}
        self.compiled: Any = None  # what the backend knows of the policy; see records.CompiledState
        self.remembered: dict[str, dict] = {"flops": {}, "kept": {}, "losses": {}}  # of a loaded state; see allocation.settled
        text = json.dumps(self.to_dict(), sort_keys=True)
        self._digest = hashlib.sha256(text.encode()).hexdigest()[:12]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _KEYS or isinstance(getattr(type(self), name, None), property):
            raise AttributeError(f"a policy's {name} does not change; make another policy: {type(self).__name__}({name}=...)")
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _KEYS:
            return getattr(self._contents, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        words = [f"{key}={getattr(self, key)!r}" for key in OVERRIDABLE]
        rules = len(self.rules)
        words += [f"schedule={self.schedule.kind}, {rules} {'rule' if rules == 1 else 'rules'}"]
        return f"<Policy {', '.join(words)}; step {self.steps}, factor {self.factor:g}>"

    def rescheduled(self, **schedule: Any) -> Policy:
        """A policy of the same rates and rules, which name the same lines of a file, at the start of another schedule.

        Args:
            schedule: as the ``schedule`` of a policy file.

        Raises:
            PolicyError: with every problem of the schedule.
        """
        return self._of(self._contents.model_copy(update={"schedule": Schedule(**schedule)}))

    @property
    def digest(self) -> str:
        """12 hexadecimal digits of the SHA-256 of the contents: equal for equal contents."""
        return self._digest

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

    def warn_if_idle(self, held: bool) -> None:
        """Tell if optimizers step and nobody calls :meth:`step`: sooner for a policy that is not ``held`` by a user."""
        self._clock.warn_if_idle(held)

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
        if "linear" in kinds and values["drop_rate"] > 0 and values["drop_over"] in ("space", "channels_space"):
            what = f"linear layers such as {name} have no space, and {decided} drops over {values['drop_over']}"
            step = "write `drop_over` in the rule for linear layers"
            deciding = [rule.origin for rule in self.rules if rule.selects(name, kinds)]
            where = (deciding and deciding[-1]) or "Policy(...)"
            raise PolicyError([Problem(where, "drop_over", what, "channels or channels_per_sample", step, "channels")])
        return Settings(**values, rule=decided)

    def unmatched_rules(self, layers: Layers, aliases: Mapping[str, str] | None = None) -> list[Problem]:
        """A problem for each rule, other than the optional ones, that is of no effect on ``layers``.

        Args:
            aliases: further name -> layer name, of modules that have several; a rule goes by layer names only.
        """
        meant = {
            name: kinds
            for name, kinds in layers.items()
            if "linear" not in kinds or any(rule.asks_for_linear() and rule.selects(name, kinds) for rule in self.rules)
        }
        problems = []
        for index, rule in enumerate(self.rules):
            among = layers if rule.drop_rate == 0 else meant  # linear layers are dense: asking for that is no fault
            if not rule.optional and not any(rule.selects(name, kinds) for name, kinds in among.items()):
                problems.append(unmatched(rule, f"rules[{index}]", layers, aliases or {}))
        return problems

    @property
    def wants_linear(self) -> bool:
        """Whether a rule asks for linear layers, which are left alone otherwise."""
        return any(rule.asks_for_linear() for rule in self.rules)

    def bind(self, assigned: Mapping[str, Settings]) -> None:
        """Remember the layers that were rewritten, and the settings that they were ``assigned``, for :meth:`drop_rates`."""
        self._bound.update(assigned)

    def drop_rates(self) -> dict[str, float]:
        """Layer name -> drop rate times :attr:`factor`, now, of the layers that were bound; compiled, rounded to ``levels``."""
        return {name: settings.drop_rate * self.factor for name, settings in self._bound.items()}

    def explain(self, model: nn.Module) -> Explanation:
        """The settings of each layer of a model and the rule that decided; print it to see a table.

        Raises:
            PolicyError: with every rule that can match nothing in the model, as :func:`ssprop_fx.transform` does.
            TransformError: the model has no convolution, or is none.
        """
        from .naming import unwrap
        from .survey import assign_checked, functional_callers, layer_kinds, require_module

        require_module(model, "explain")
        model = unwrap(model)
        layers = layer_kinds(model)
        assigned = assign_checked(model, self, layers, functional_callers(model))
        return Explanation({k: v for k, v in layers.items() if k in assigned}, assigned, self, model)

    def to_dict(self) -> dict[str, Any]:
        """The contents as plain values, from which :meth:`from_dict` makes an equal policy."""
        return self._contents.model_dump(mode="json", exclude_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The clock, ``steps`` and ``clock``, and the ``schedule`` that it belongs to, as plain values.

        Once a model has trained under the policy, ``counts`` holds the kept counts that ``round_to: auto`` and
        ``profitable: auto`` have settled.
        """
        found = settled(self)
        kept, losses = ([[factor, values] for factor, values in found[key].items()] for key in ("kept", "losses"))
        counts = {"digest": self.digest, "flops": found["flops"], "kept": kept, **({"losses": losses} if losses else {})}
        return {
            "steps": self.steps,
            "clock": self._clock.mode,
            "schedule": self.schedule.model_dump(mode="json"),
            **({"counts": counts} if found["flops"] else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the clock to a state; a state that is refused changes nothing.

        Raises:
            PolicyError: ``state`` is not what :meth:`state_dict` returns, or the schedule is another one.
        """
        counts, loaded = state.get("counts") if isinstance(state, Mapping) else None, None
        if counts is not None:
            state = {key: value for key, value in state.items() if key != "counts"}
            try:
                mine = counts["digest"] == self.digest
                by_factor = {"kept": counts["kept"], "losses": counts.get("losses", [])}
                loaded = {key: {factor: dict(values) for factor, values in found} for key, found in by_factor.items()}
                loaded["flops"] = dict(counts["flops"])
                for numbers in (loaded["flops"], *loaded["kept"].values()):
                    if not all(type(number) is int for number in numbers.values()):
                        raise TypeError
                for figures in (f for losses in loaded["losses"].values() for f in losses.values()):
                    if [type(figure) for figure in figures] != [int, float, float, int]:
                        raise TypeError
            except (KeyError, TypeError, ValueError):
                what = "the counts are not what state_dict() returned"
                where, step = "policy.load_state_dict(...)", "load what policy.state_dict() returned"
                expected = "a mapping with the keys digest, flops, kept"
                raise PolicyError([Problem(where, "counts", what, expected, step)]) from None
        self._clock.load_state_dict(state)
        if loaded is not None and mine and loaded != settled(self):
            self.remembered = loaded
            for live in allocations_of(self):
                live.forget()

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """JSON Schema (draft 2020-12) of a policy file, made from the models that validate it."""
        return policy_file.json_schema()

    def __getstate__(self) -> tuple[Any, ...]:
        return self._contents, (self.steps, self._clock.mode, self._clock.ticked), self._bound, settled(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Policy:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        take_along(self, memo)
        return copied

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        contents, clock, bound, remembered = state
        self._start(contents)
        self.remembered = remembered
        self._clock.set(*clock)
        self.bind(bound)


def _meant(value: Any) -> str:
    """How to write what somebody may have meant who gave a policy a value without a key."""
    if isinstance(value, (str, Path)):
        return f"to read a file, Policy.load({str(value)!r})"
    if isinstance(value, Mapping):
        return "of a mapping, Policy.from_dict(...)"
    return f"for a drop rate, Policy(drop_rate={value!r})"


class Explanation(Mapping[str, Settings]):
    """Layer name -> :class:`Settings`; its text is a table with a line for each layer."""

    def __init__(self, layers: Layers, settings: Mapping[str, Settings], policy: Policy, model: nn.Module) -> None:
        self._layers = layers
        self._settings = settings
        self._policy, self._model = policy, model

    def report(self, example_inputs: Any = None) -> Report:
        """What :func:`ssprop_fx.inspect` would say of the model once it is transformed; nothing is changed.

        Args:
            example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments. With them, two
                training steps on a copy give coverage, shapes and FLOPs.

        Raises:
            SSPropError: no output of the model carries a gradient.
        """
        from .inspection import foresee

        return foresee(self._model, self._policy, example_inputs)

    def __getitem__(self, name: str) -> Settings:
        return self._settings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def __str__(self) -> str:
        columns = [field.name for field in fields(Settings) if field.name != "drop_over"]  # in the criterion's
        rows = [["layer", "kinds", *columns]]
        for name, settings in self.items():
            kinds = " ".join(kind for kind in KINDS if kind in self._layers[name])
            values = vars(settings) | {"criterion": settings.ranking}
            rows.append([name, kinds, *(str(values[column]) for column in columns)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)

    __repr__ = __str__
