"""From a policy file or a mapping to checked contents, each problem with its place; and the JSON Schema."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PolicyError, Problem, join_key, nearest
from .rules import Contents, Rule

if TYPE_CHECKING:
    from yaml import Node

Where = Callable[[str], str]  # dotted key -> the place to look at


def read_file(path: str | Path) -> Contents:
    """Contents of a policy file (YAML, UTF-8), each rule with the line that it was read from.

    Raises:
        PolicyError: the file cannot be read, is not YAML or has problems; each is given with its line.
    """
    reader = _YamlReader(str(path))
    try:
        contents = checked(reader.read(_read(Path(path))), reader.where, reader.problems)
    except PolicyError as error:
        raise PolicyError(map(reader.quoted, error.problems)) from None
    for index, rule in enumerate(contents.rules):
        rule._origin = f"{Path(path).name}:{reader.line(f'rules[{index}]')}"
    return contents


def checked(raw: Any, where: Where, problems: Sequence[Problem] = ()) -> Contents:
    """Contents, or one error with ``problems`` and all that are found here, each placed by ``where``."""
    found: list[Problem] = []
    if isinstance(raw, Mapping):
        raw = _text_keyed(raw, "", found)
        try:
            contents = Contents(**raw)
        except PolicyError as error:
            found += error.problems
        found += _hidden_rules(raw.get("rules"), where)
    else:
        what = "the document is empty" if raw is None else "the document is no mapping"
        expected = f"a mapping with the keys {', '.join(Contents.model_fields)}"
        found.append(Problem("", "", what, expected, "write `key: value` lines; `version: 1` alone is a policy"))
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
        self.numbers: dict[str, str] = {}  # as they are written
        self.problems: list[Problem] = []

    def read(self, text: bytes) -> Any:
        import yaml

        self._yaml = yaml
        self._built: dict[int, Any] = {}
        try:
            self._loader = _loader()(text)
            node = self._loader.get_single_node()
            return None if node is None else self._build(node, "")
        except RecursionError:
            what = "lists and mappings lie too deep in one another"
            raise PolicyError([Problem(f"{self.path}:1", "", what, "a policy", "write it flat")]) from None
        except yaml.reader.ReaderError as error:
            raise PolicyError([self._unreadable(text, error)]) from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
            what = f"not YAML: {getattr(error, 'problem', None) or error}".replace("\n", " ")
            step = "indent with spaces, not with tabs" if "\\t" in what else "correct the syntax at this line"
            if "unknown escape character" in what:
                step = "write single quotes, 're:...', between which a backslash is a backslash"
            if "alias" in what or "alphabetic or numeric" in what:
                step = 'quote the pattern, "*.conv1": YAML reads * and & at the start of a word as its own'
            place = f"{self.path}:{mark.line + 1 if mark else 1}"
            raise PolicyError([*self.problems, Problem(place, "", what, "one YAML document", step)]) from None

    def _unreadable(self, text: bytes, error: Any) -> Problem:
        """The problem of a file with a byte or a character that YAML does not read."""
        if error.encoding == "unicode":
            lines = text.decode("utf-8", "replace")[: error.position].count("\n")
            what, step = f"the character U+{error.character:04X} is not allowed in YAML", "delete it"
        else:
            lines = text[: error.position].count(b"\n")
            what, step = "the file is not UTF-8", "save it as UTF-8"
        return Problem(f"{self.path}:{lines + 1}", "", what, "text in UTF-8", step)

    def quoted(self, problem: Problem) -> Problem:
        """A problem whose next step is to quote a number, which is to be as it was written: 1.10 is another name than 1.1."""
        written = self.numbers.get(problem.key)
        if written is None or not problem.next_step.startswith("quote it: "):
            return problem
        return replace(problem, next_step=f'quote it: "{written}"')

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
            self._note(node, key, f"{node.value!r} cannot be read: {reason}", "a YAML value", "quote or correct it")
            return node.value
        if type(value) in (int, float):
            self.numbers[key] = node.value
        if type(value) in (int, float) and re.search(r"^[-+]?0[0-9_]|:", node.value):
            what = f"{node.value} is {value} in YAML 1.1, which reads base 8 and base 60"
            self._note(node, key, what, "a decimal number", "write it without leading zeros and colons", str(value))
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

    def _note(self, node: Node, key: str, what: str, expected: str, step: str, near: str | None = None) -> None:
        place = f"{self.path}:{node.start_mark.line + 1}"
        self.problems.append(Problem(place, key, what, expected, step, near))


@functools.cache
def _loader() -> type:
    """YAML's loader, to which 1e-05 is a number as well, as JSON writes it."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))
    return Loader


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        try:
            siblings = sorted({p.name for p in path.parent.iterdir()} - {path.name})
        except (OSError, ValueError):
            siblings = []
        step = "correct the path" if siblings else f"correct the path: {path.parent} is no directory with files"
        near = nearest(path.name, siblings)
        what = f"the file cannot be read: {getattr(error, 'strerror', None) or error}"
        raise PolicyError([Problem(str(path), "", what, "a policy file", step, near)]) from None


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a policy file, made from the models that validate it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ssprop-fx policy",
        **_tidied(Contents.model_json_schema()),
    }


def _tidied(schema: Any) -> Any:
    """A generated JSON Schema without titles and null defaults; of a description, the first paragraph."""
    if isinstance(schema, list):
        return [_tidied(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _tidied(value) for key, value in schema.items() if key != "title" and (key, value) != ("default", None)}
    if isinstance(kept.get("description"), str):
        kept["description"] = " ".join(kept["description"].partition("\n\n")[0].split())
    return kept
