"""A policy is checked once, at load; it decides settings layer by layer; only its clock moves."""

import copy
import io
import json
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml

from ssprop_fx.errors import PolicyError, Problem, SSPropError, nearest
from ssprop_fx.policy import CRITERIA, KINDS, Policy, Rule, Settings
from ssprop_fx.schedule import Schedule

REFERENCE = Path(__file__).parent.parent / "docs" / "policy.md"

FULL = """\
version: 1
drop_rate: 0.8
criterion: l1
round_to: auto
gradients: all
schedule:
  kind: bar
  start: 0.0
  end: 1.0
  period: 2
  repeat: true
  warmup: 0
  cooldown: 0
  total: null
  interleave: false
  clock: manual
  levels: 4
rules:
  - layers: "conv1"
    drop_rate: 0
  - layers: "layer4.*"
    drop_rate: 0.9
    criterion: l2
  - kind: [depthwise, conv_transpose2d]
    drop_rate: 0.5
  - layers: "aux.*"
    drop_rate: 0
    optional: true
"""

LAYERS = {
    "conv1": {"conv2d"},
    "layer3.0.conv1": {"conv2d", "pointwise"},
    "layer4.0.conv1": {"conv2d", "grouped"},
    "layer4.0.down": {"conv2d", "grouped", "depthwise"},
    "decoder#conv_transpose2d.0": {"conv_transpose2d", "functional"},
    "fc": {"linear"},
}


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "policy.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# --- what a file says


def test_a_file_is_read_as_the_format_says(write):
    policy = Policy.load(write(FULL))
    assert (policy.drop_rate, policy.criterion, policy.round_to, policy.gradients) == (
        0.8,
        "l1",
        "auto",
        "all",
    )
    assert policy.schedule == Schedule(clock="manual")
    assert policy.rules[2].kind == ("depthwise", "conv_transpose2d")
    assert policy.rules[3].optional
    assert [rule.origin for rule in policy.rules] == [f"policy.yaml:{n}" for n in (19, 21, 24, 26)]


def test_without_a_schedule_it_is_the_papers_on_the_optimizers_clock(write):
    for policy in (Policy(), Policy(drop_rate=0.8), Policy(schedule=None), Policy.load(write("version: 1"))):
        assert policy.schedule == Schedule(kind="bar", period=2, clock="optimizer")
        assert policy.digest == Policy.from_dict({}).digest
    assert Policy(schedule={"period": 4}).schedule.clock == "manual"
    assert Policy.load(write("schedule: {period: 4}")).schedule.clock == "manual"


def test_a_whole_number_is_a_rate_and_yaml_aliases_work(write):
    policy = Policy.load(write("drop_rate: 0\nrules:\n- &a {layers: x, drop_rate: 1.0e-1}\n- {<<: *a, layers: y}"))
    assert policy.drop_rate == 0.0
    assert [(rule.layers, rule.drop_rate) for rule in policy.rules] == [(("x",), 0.1), (("y",), 0.1)]


def test_three_ways_to_the_same_contents(write):
    loaded = Policy.load(write(FULL))
    again = Policy.from_dict(loaded.to_dict())
    built = Policy(
        schedule=Schedule(),
        rules=[
            Rule(layers="conv1", drop_rate=0),
            {"layers": ["layer4.*"], "drop_rate": 0.9, "criterion": "l2"},
            Rule(kind=["depthwise", "conv_transpose2d"], drop_rate=0.5),
            Rule(layers="aux.*", drop_rate=0, optional=True),
        ],
    )
    assert loaded.digest == again.digest == built.digest
    assert loaded.rules == again.rules == built.rules
    assert json.loads(json.dumps(loaded.to_dict())) == loaded.to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"drop_rate": 0.7},
        {"criterion": "l2"},
        {"round_to": 8},
        {"gradients": "weight"},
        {"profitable": "auto"},
        {"schedule": {}},
        {"schedule": {"period": 3}},
        {"rules": [{"layers": "a", "drop_rate": 0.1}]},
    ],
)
def test_other_contents_have_another_digest(change):
    assert Policy(**change).digest != Policy().digest


def test_the_examples_of_the_reference_are_policies_and_name_every_key(write):
    examples = re.findall(r"```yaml\n(.*?)```", REFERENCE.read_text(encoding="utf-8"), re.DOTALL)
    for example in examples:
        Policy.load(write(example))
    assert set(re.findall(r"^[ -]*(\w+):", "".join(examples), re.MULTILINE)) == {
        *Policy().to_dict(),
        *Schedule.model_fields,
        *Rule.model_fields,
    }


def test_the_reference_states_every_default():
    rows = re.findall(r"^\| `(\w+)` \| `(\S+)` \|", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE)
    stated = {key: yaml.safe_load(value) for key, value in rows}
    defaults = Policy().to_dict() | Schedule().model_dump() | {"optional": False}
    assert stated == {key: value for key, value in defaults.items() if key not in ("schedule", "rules")}


# --- what is wrong with a file

# Each row: the file, the line and the key of its only problem, what is expected, and the nearest valid thing.
MALFORMED = [
    ("version: 1\ndrop_rat: 0.5", 2, "drop_rat", "one of version, drop_rate", "drop_rate"),
    ("xyzzy: 1", 1, "xyzzy", "one of version, drop_rate", None),
    ("version: 1\n\ndrop_rate: 1.2", 3, "drop_rate", "0 <= drop_rate < 1", None),
    ("drop_rate: 1", 1, "drop_rate", "0 <= drop_rate < 1", None),
    ("drop_rate: 80", 1, "drop_rate", "0 <= drop_rate < 1", "0.8"),
    ("drop_rate: -0.5", 1, "drop_rate", "0 <= drop_rate < 1", "0"),
    ("drop_rate: .nan", 1, "drop_rate", "0 <= drop_rate < 1", None),
    ("drop_rate: .inf", 1, "drop_rate", "0 <= drop_rate < 1", None),
    ("drop_rate: true", 1, "drop_rate", "a number", None),
    ("drop_rate: off", 1, "drop_rate", "a number", None),
    ('drop_rate: "0.8"', 1, "drop_rate", "a number", "0.8"),
    ("drop_rate:\n", 1, "drop_rate", "a number", None),
    ("drop_rate: [0.5]", 1, "drop_rate", "a number", None),
    ("criterion: L2", 1, "criterion", "one of l1, l2, taylor, random", "l2"),
    ("criterion: tailor", 1, "criterion", "one of l1, l2, taylor, random", "taylor"),
    ("criterion: on", 1, "criterion", "one of l1, l2, taylor, random", None),
    ("round_to: 0", 1, "round_to", "a whole number >= 1 or auto", "1"),
    ("round_to: 8.0", 1, "round_to", "a whole number >= 1 or auto", "8"),
    ("round_to: atuo", 1, "round_to", "a whole number >= 1 or auto", "auto"),
    ("round_to: 010", 1, "round_to", "a decimal number", "8"),
    ("gradients: weights", 1, "gradients", "one of all, weight", "weight"),
    ("version: 2", 1, "version", "Expected 1.", "1"),
    ("version: true", 1, "version", "Expected 1.", "1"),
    ("schedule: bar", 1, "schedule", "a mapping with the keys kind, start", None),
    ("schedule:\n", 1, "schedule", "a mapping with the keys kind, start", None),
    ("schedule:\n  kind: cosin", 2, "schedule.kind", "one of constant, linear, cosine, bar", "cosine"),
    ("schedule:\n  period: 0", 2, "schedule.period", "a whole number >= 1", "1"),
    ("schedule:\n  period: 1:30", 2, "schedule.period", "a decimal number", "90"),
    ("schedule:\n  warmup: -1", 2, "schedule.warmup", "a whole number >= 0", "0"),
    ("schedule:\n  warmup: 2.5", 2, "schedule.warmup", "a whole number >= 0", None),
    ("schedule:\n  levels: 0", 2, "schedule.levels", "a whole number >= 1", "1"),
    ("schedule:\n  end: 1.5", 2, "schedule.end", "0 <= end <= 1", "1"),
    ("schedule:\n  repeat: 1", 2, "schedule.repeat", "true or false", None),
    ("schedule:\n  clock: optimiser", 2, "schedule.clock", "one of manual, optimizer", "optimizer"),
    ("schedule:\n  preiod: 3", 2, "schedule.preiod", "one of kind, start", "period"),
    ("schedule:\n  kind: bar\n  cooldown: 3", 3, "schedule.cooldown", "steps in all, as `total`", None),
    ("schedule:\n  warmup: 9\n  total: 5", 3, "schedule.total", "warmup + cooldown <= total", "9"),
    ("rules:\n", 1, "rules", "a list, each item a mapping", None),
    ("rules: {layers: a}", 1, "rules", "a list, each item a mapping", None),
    ("rules:\n- conv1", 2, "rules[0]", "a mapping with the keys layers, kind", None),
    ("rules:\n- drop_rate: 0.5", 2, "rules[0]", "at least one of layers, kind", None),
    ("rules:\n- layers: a", 2, "rules[0]", "at least one of drop_rate, criterion", None),
    ("rules:\n- layers: a\n  drop_rate: 1.2", 3, "rules[0].drop_rate", "0 <= drop_rate < 1", None),
    ("rules:\n- layers: a\n  drop_rate:", 3, "rules[0].drop_rate", "a value", None),
    ("rules:\n- layer: a\n  drop_rate: 0.1", 2, "rules[0].layer", "one of layers, kind", "layers"),
    ("rules:\n- kind: conv2\n  drop_rate: 0.1", 2, "rules[0].kind", "one of conv1d, conv2d", "conv2d"),
    (
        "rules:\n- kind:\n  - conv2d\n  - depth\n  drop_rate: 0.1",
        4,
        "rules[0].kind[1]",
        "one of conv1d",
        "depthwise",
    ),
    ("rules:\n- layers: []\n  drop_rate: 0.1", 2, "rules[0].layers", "text or a list of them", None),
    ("rules:\n- layers: 3\n  drop_rate: 0.1", 2, "rules[0].layers", "text or a list of them", None),
    (
        'rules:\n- layers: "re:conv("\n  drop_rate: 0.1',
        2,
        "rules[0].layers",
        "a Python regular expression",
        None,
    ),
    ("rules:\n- layers: a\n  off: 3\n  drop_rate: 0", 3, "rules[0].False", "text", None),
    ("rules:\n- layers: a\n  drop_rate: 0\n  optional: maybe", 4, "rules[0].optional", "true or false", None),
    ("drop_rate: 0.5\ncriterion: l1\ndrop_rate: 0.6", 3, "drop_rate", "each key once", None),
    ("{drop_rate: 0.5, drop_rate: 0.6}", 1, "drop_rate", "each key once", None),
    ("schedule:\n  period: 2\n  period: 4", 3, "schedule.period", "each key once", None),
    (
        "rules:\n- layers: a\n  drop_rate: 0.5\n  drop_rate: 0.6",
        4,
        "rules[0].drop_rate",
        "each key once",
        None,
    ),
    ("drop_rate: 2024-13-45", 1, "drop_rate", "a YAML value", None),
    ("drop_rate: !half 1", 1, "drop_rate", "a YAML value", None),
    ("version: 1\n? [drop_rate]\n: 0.5", 2, "", "text as key", None),
    ("schedule:\n\tkind: bar", 2, "", "one YAML document", None),
    ("rules: [", 1, "", "one YAML document", None),
    ("version: 1\n---\nversion: 1", 2, "", "one YAML document", None),
    (b"version: 1 # \xff", 1, "", "text in UTF-8", None),
    ("version: 1\n\n# caf\u00e9\ndrop_rate: 0.5".encode("latin-1"), 3, "", "text in UTF-8", None),
    ("version: 1\n\n\n# \u00e9\nrules: []  # \x07", 5, "", "text in UTF-8", None),
    ("rules: " + "[" * 5000, 1, "", "a policy", None),
    ("schedule:\n  warmup: 10%", 2, "schedule.warmup", "a whole number", None),
    ("drop_rate: 99.9", 1, "drop_rate", "0 <= drop_rate < 1", "0.999"),
    ("", 1, "", "a mapping with the keys version, drop_rate", None),
    ("# only a comment\n", 1, "", "a mapping with the keys version, drop_rate", None),
    ("- drop_rate: 0.5", 1, "", "a mapping with the keys version, drop_rate", None),
]


@pytest.mark.parametrize("name", ["1.0", "1.10", "007", "1e5"])
def test_a_name_that_yaml_takes_for_a_number_is_to_be_quoted_as_it_was_written(write, name):
    with pytest.raises(PolicyError, match=rf'Next step: quote it: "{name}"\.'):
        Policy.load(write(f"rules:\n- layers: {name}\n  drop_rate: 0.1"))
    assert Policy.load(write(f'rules:\n- layers: "{name}"\n  drop_rate: 0.1')).rules[0].layers == (name,)


def test_a_regular_expression_in_double_quotes_is_to_be_in_single_ones(write):
    with pytest.raises(PolicyError, match="write single quotes"):
        Policy.load(write('rules:\n- layers: "re:layer\\d"\n  drop_rate: 0.1'))


@pytest.mark.parametrize(("text", "rate"), [("1e-05", 1e-5), ("8e-1", 0.8), ("+5E-1", 0.5), ("0.5", 0.5)])
def test_numbers_as_json_writes_them_are_numbers(write, text, rate):
    assert Policy.load(write(f"drop_rate: {text}")).drop_rate == rate
    assert Policy.load(write(json.dumps(Policy(drop_rate=rate).to_dict()))).drop_rate == rate


def test_a_path_that_cannot_be_looked_at_is_an_error_of_the_policy(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    for path in (tmp_path / "policy.yaml", "a\0b"):
        with pytest.raises(PolicyError, match=r"the file cannot be read.*Next step: correct the path"):
            Policy.load(path)


@pytest.mark.parametrize(("text", "line", "key", "expected", "near"), MALFORMED)
def test_a_malformed_file_is_one_error_with_place_expectation_and_nearest(write, text, line, key, expected, near):
    path = write(text)
    with pytest.raises(PolicyError) as error:
        Policy.load(path)
    own = [problem for problem in error.value.problems if problem.where == f"{path}:{line}" and problem.key == key]
    assert own, f"no problem at line {line}, key {key!r}: {error.value}"
    message = str(own[0])
    assert message.startswith(f"{path}:{line}: {key}")
    assert expected in message
    assert own[0].nearest == near
    assert (f"Nearest: {near}" in message) == (near is not None)
    assert "Next step: " in message
    assert message in str(error.value)
    assert len({(problem.where, problem.key) for problem in error.value.problems}) == 1


def test_all_problems_of_a_file_come_together_in_the_order_of_its_lines(write):
    path = write(
        "drop_rate: 80\ncriterion: l3\nschedule:\n  perod: 2\n  cooldown: 3\n  kind: bra\n  repeat: true\n"
        "  repeat: true\nrules:\n  - layers: a\n    drop_rate: 2.5\n  - kind: conv\n"
        '  - layers: x\n    drop_rate: 0\n  - layers: "*"\n    drop_rate: 0.1\n'
    )
    with pytest.raises(PolicyError) as error:
        Policy.load(path)
    assert [(problem.where.rpartition(":")[2], problem.key) for problem in error.value.problems] == [
        ("1", "drop_rate"),
        ("2", "criterion"),
        ("4", "schedule.perod"),
        ("5", "schedule.cooldown"),
        ("6", "schedule.kind"),
        ("8", "schedule.repeat"),
        ("11", "rules[0].drop_rate"),
        ("12", "rules[1].kind"),
        ("12", "rules[1]"),
        ("13", "rules[2]"),
    ]
    assert str(error.value).startswith("10 problems\n")
    assert all(problem.next_step and problem.expected and problem.what for problem in error.value.problems)


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("layers: a, drop_rate: 0.1", "layers: a, drop_rate: 0.2"),
        ("layers: [a, b], drop_rate: 0.1", "layers: [b, a], drop_rate: 0.2, criterion: l2"),
        ("layers: a, drop_rate: 0.1", 'layers: "*", drop_rate: 0.2'),
        ("layers: a, kind: conv2d, drop_rate: 0.1", 'layers: "re:.*", drop_rate: 0.2'),
        ("layers: a, kind: conv2d, drop_rate: 0.1", "layers: a, drop_rate: 0.2"),
        ("kind: conv2d, drop_rate: 0.1", "kind: [conv1d, conv2d], drop_rate: 0.2"),
        ("kind: linear, drop_rate: 0.1", "kind: linear, drop_rate: 0.2"),
    ],
)
def test_a_rule_that_a_later_one_hides_is_an_error_that_names_both_lines(write, earlier, later):
    path = write(f"rules:\n- {{{earlier}}}\n- {{layers: other, gradients: all}}\n- {{{later}}}")
    with pytest.raises(PolicyError) as error:
        Policy.load(path)
    (problem,) = error.value.problems
    assert (problem.where, problem.key, problem.nearest) == (f"{path}:2", "rules[0]", "rules[2]")
    assert f"{path}:4" in problem.what


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("layers: a, drop_rate: 0.1, criterion: l2", 'layers: "*", drop_rate: 0.2'),
        ('layers: "*", drop_rate: 0.1', "layers: a, drop_rate: 0.2"),
        ("layers: a, drop_rate: 0.1", "layers: a, kind: conv2d, drop_rate: 0.2"),
        ("kind: linear, drop_rate: 0.1", 'layers: "*", drop_rate: 0.2'),
        ("layers: [a, b], drop_rate: 0.1", "layers: a, drop_rate: 0.2"),
    ],
)
def test_a_rule_with_something_left_to_decide_is_no_error(write, earlier, later):
    assert len(Policy.load(write(f"rules:\n- {{{earlier}}}\n- {{{later}}}")).rules) == 2


def test_a_missing_file_names_the_nearest(write, tmp_path):
    write(FULL)
    for path, words in [
        (tmp_path / "polcy.yaml", "Nearest: policy.yaml"),
        (tmp_path / "nowhere" / "policy.yaml", "is no directory with files"),
        (tmp_path, "a policy file"),
    ]:
        with pytest.raises(PolicyError, match=re.escape(str(path))) as error:
            Policy.load(path)
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: Policy(drop_rat=0.5), "Policy(...)"),
        (lambda: Policy.from_dict({"drop_rat": 0.5}), "Policy.from_dict(...)"),
        (lambda: Rule(layers="a", drop_rat=0.5), "Rule(...)"),
    ],
)
def test_a_wrong_argument_is_the_same_error_as_in_a_file(make, where):
    with pytest.raises(PolicyError) as error:
        make()
    assert str(error.value).startswith(f"{where}: drop_rat: unknown key")
    assert "Nearest: drop_rate" in str(error.value)


@pytest.mark.parametrize("mapping", [None, [], "drop_rate: 1", {1: 2}, {"rules": [{2: 3, "layers": "a", "drop_rate": 0}]}])
def test_from_dict_takes_mappings_with_text_keys_alone(mapping):
    with pytest.raises(PolicyError):
        Policy.from_dict(mapping)


def test_policy_errors_are_ssprop_errors_and_travel_between_processes():
    with pytest.raises(SSPropError) as error:
        Policy(drop_rate=2, criterion="x")
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value)
    assert again.problems == error.value.problems
    assert isinstance(again.problems[0], Problem)


def test_nearest_ignores_case_and_gives_nothing_for_nothing_alike():
    assert nearest("Conv2D", KINDS) == "conv2d"
    assert nearest("zzz", CRITERIA) is None


# --- rules and settings


def test_the_last_rule_that_matches_decides_key_by_key(write):
    policy = Policy.load(write(FULL))
    default = Settings(0.8, "l1", "auto", "all", "default")
    assert policy.assign(LAYERS) == {
        "conv1": Settings(0.0, "l1", "auto", "all", "rules[0] (policy.yaml:19)"),
        "layer3.0.conv1": default,
        "layer4.0.conv1": Settings(0.9, "l2", "auto", "all", "rules[1] (policy.yaml:21)"),
        "layer4.0.down": Settings(0.5, "l2", "auto", "all", "rules[2] (policy.yaml:24)"),
        "decoder#conv_transpose2d.0": Settings(0.5, "l1", "auto", "all", "rules[2] (policy.yaml:24)"),
        "fc": Settings(0.0, "l1", "auto", "all", "default"),
    }


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ({"layers": "layer4.0.conv1"}, ["layer4.0.conv1"]),
        ({"layers": "layer*.conv1"}, ["layer3.0.conv1", "layer4.0.conv1"]),
        ({"layers": "layer[3]*"}, ["layer3.0.conv1"]),
        ({"layers": "LAYER*"}, []),
        ({"layers": r"re:layer[34]\..*"}, ["layer3.0.conv1", "layer4.0.conv1", "layer4.0.down"]),
        ({"layers": "re:layer"}, []),
        ({"layers": ["conv1", "*#*"]}, ["conv1", "decoder#conv_transpose2d.0"]),
        ({"kind": "grouped"}, ["layer4.0.conv1", "layer4.0.down"]),
        ({"kind": ["depthwise", "functional"]}, ["layer4.0.down", "decoder#conv_transpose2d.0"]),
        ({"layers": "layer4.*", "kind": "depthwise"}, ["layer4.0.down"]),
    ],
)
def test_a_rule_selects_by_name_and_kind(selector, names):
    rule = Rule(**selector, drop_rate=0.1)
    assert [name for name, kinds in LAYERS.items() if rule.selects(name, kinds)] == names


def test_linear_layers_are_dense_unless_a_rule_of_kind_linear_asks():
    def rate(*rules):
        return Policy(rules=rules).assign(LAYERS)["fc"].drop_rate

    assert rate() == 0
    assert rate(Rule(layers="*", drop_rate=0.5)) == 0
    assert rate(Rule(kind="linear", drop_rate=0.5)) == 0.5
    assert rate(Rule(kind="linear", criterion="l2")) == 0.8
    assert rate(Rule(kind="linear", drop_rate=0.5), Rule(layers="*", drop_rate=0.3)) == 0.3


def test_every_rule_that_matches_nothing_is_named_in_one_error(write):
    policy = Policy.load(
        write(
            'rules:\n- {layers: "layer5.*", drop_rate: 0.1}\n- {kind: conv3d, drop_rate: 0.2}\n'
            '- {layers: "layer4.*", kind: pointwise, drop_rate: 0.3}\n- {layers: fc, drop_rate: 0.4}\n'
            '- {layers: "re:^layr3.*", drop_rate: 0.1}\n'
            "- {layers: gone, drop_rate: 0.5, optional: true}\n- {layers: conv1, drop_rate: 0.6}\n"
        )
    )
    with pytest.raises(PolicyError) as error:
        policy.assign(LAYERS)
    assert [(problem.where, problem.key, problem.nearest) for problem in error.value.problems] == [
        ("policy.yaml:2", "rules[0].layers", "layer4.*"),
        ("policy.yaml:3", "rules[1].kind", "conv2d"),
        ("policy.yaml:4", "rules[2].kind", "depthwise"),
        ("policy.yaml:5", "rules[3]", None),
        ("policy.yaml:6", "rules[4].layers", "layer3.*"),
    ]
    assert "optional: true" in str(error.value)
    assert "kind: linear" in error.value.problems[3].next_step
    assert tuple(policy.unmatched_rules(LAYERS)) == error.value.problems
    assert policy.assign(LAYERS, require_match=False)["conv1"].drop_rate == 0.6


def test_a_rule_that_keeps_a_linear_layer_dense_has_matched():
    assert Policy(rules=[Rule(layers="fc", drop_rate=0)]).assign(LAYERS)["fc"].drop_rate == 0


def test_a_rule_matches_nothing_in_a_model_without_layers():
    with pytest.raises(PolicyError, match="no layer of 0 matches"):
        Policy(rules=[Rule(layers="*", drop_rate=0)]).assign({})


def test_rules_are_frozen_hashable_and_equal_by_contents(write):
    rule = Rule(layers="a", drop_rate=0.5)
    with pytest.raises(AttributeError, match="does not change"):
        rule.drop_rate = 0.6
    assert len({rule, Rule(layers=["a"], drop_rate=0.5), Rule(layers="a", drop_rate=0.6)}) == 2
    read = Policy.load(write("rules:\n- {layers: a, drop_rate: 0.5}")).rules[0]
    assert read.origin
    assert not rule.origin
    assert read == rule
    assert hash(read) == hash(rule)


def test_explain_is_a_table_of_what_was_decided():
    layers = OrderedDict(conv1=torch.nn.Conv2d(3, 16, 3), conv2=torch.nn.Conv2d(16, 16, 3, groups=2), fc=torch.nn.Linear(16, 4))
    model = torch.nn.Sequential(layers)
    explanation = Policy(rules=[Rule(layers="conv1", drop_rate=0.25, round_to=8)]).explain(model)
    assert explanation["conv1"] == Settings(0.25, "l1", 8, "all", "rules[0]")
    assert list(explanation) == ["conv1", "conv2"]  # a linear layer only where a rule asks for it
    header, first, second = str(explanation).splitlines()
    assert header.split() == ["layer", "kinds", "drop_rate", "criterion", "round_to", "gradients", "rule"]
    assert first.split() == ["conv1", "conv2d", "0.25", "l1", "8", "all", "rules[0]"]
    assert second.split()[0] == "conv2"
    assert second.split()[-1] == "default"
    with_linear = Policy(rules=[Rule(kind="linear", drop_rate=0.5)]).explain(model)
    assert with_linear["fc"].drop_rate == 0.5
    with pytest.raises(PolicyError, match="is named 'conv9'"):
        Policy(rules=[Rule(layers="conv9", drop_rate=0.25)]).explain(model)


def test_drop_rates_follow_the_clock():
    policy = Policy(drop_rate=0.5, schedule={"kind": "linear", "period": 3}, rules=[Rule(layers="conv1", drop_rate=0.2)])
    assert policy.drop_rates() == {}
    policy.bind(policy.assign({"conv1": {"conv2d"}}))
    policy.bind(policy.assign({"conv2": {"conv2d"}}, require_match=False))
    rates = []
    for _ in range(3):
        rates.append(policy.drop_rates())
        policy.step()
    assert rates == [{"conv1": 0, "conv2": 0}, {"conv1": 0.1, "conv2": 0.25}, {"conv1": 0.2, "conv2": 0.5}]


# --- one object, its copies and its state


def test_nothing_but_the_clock_can_be_changed():
    policy = Policy()
    for name in ("drop_rate", "rules", "digest", "factor", "steps", "drop_rat"):
        with pytest.raises(AttributeError):
            setattr(policy, name, 0.5)
    with pytest.raises(AttributeError, match="drop_rat"):
        _ = policy.drop_rat


def test_a_policy_equals_itself_alone():
    policy, twin = Policy(drop_rate=0.123), Policy(drop_rate=0.123)
    assert policy.digest == twin.digest
    assert policy != twin


def torch_saved(policy):
    buffer = io.BytesIO()
    torch.save(policy, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda p: pickle.loads(pickle.dumps(p)), torch_saved])
def test_a_copy_is_independent(write, duplicate):
    policy = Policy.load(write(FULL))
    policy.step()
    policy.bind(policy.assign(LAYERS))
    twin = duplicate(policy)
    assert (twin.digest, twin.steps, twin.factor) == (policy.digest, 1, 1)
    assert twin.rules[0].origin == policy.rules[0].origin
    assert twin.drop_rates() == policy.drop_rates() != {}
    policy.step()
    twin.bind({"more": Settings(0.1, "l1", 1, "all", "default")})
    assert (policy.steps, twin.steps) == (2, 1)
    assert "more" not in policy.drop_rates()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_an_optimizer_clock_is_live_in_a_copy(duplicate):
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    policy = Policy()
    optimizer.step()
    twin = duplicate(policy)
    optimizer.step()
    assert (policy.steps, twin.steps, twin.factor) == (2, 2, 0)
    policy.step()  # taken over: the twin goes on with the optimizer
    optimizer.step()
    assert (policy.steps, twin.steps) == (2, 3)
    assert duplicate(policy).state_dict()["clock"] == "manual"


def test_a_state_resumes_the_clock():
    policy, resumed = Policy(schedule={"period": 4}), Policy(drop_rate=0.3, schedule={"period": 4})
    for _ in range(7):
        policy.step()
    state = json.loads(json.dumps(policy.state_dict()))
    resumed.load_state_dict(state)
    assert (resumed.steps, resumed.factor, resumed.quantized_factor) == (7, 1, 1)
    resumed.step()
    assert (policy.steps, resumed.factor) == (7, 0)


def test_a_state_of_another_schedule_is_refused_by_the_keys_that_differ():
    policy = Policy(schedule={"period": 4})
    policy.step()
    state = Policy(schedule={"period": 6, "warmup": 2}).state_dict()
    with pytest.raises(PolicyError) as error:
        policy.load_state_dict(state)
    assert [problem.key for problem in error.value.problems] == ["schedule.period", "schedule.warmup"]
    assert "saved with 6, this policy has 4" in str(error.value)
    assert policy.steps == 1


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"steps": -1}, "steps"),
        ({"steps": 1.0}, "steps"),
        ({"steps": True}, "steps"),
        ({"steps": None}, "steps"),
        ({"clock": "optimizer"}, "clock"),
        ({"clock": ["manual"]}, "clock"),
        ({"schedule": "bar"}, "schedule"),
        ({"epoch": 3}, "epoch"),
    ],
)
def test_a_malformed_state_is_refused_and_changes_nothing(change, key):
    policy = Policy(schedule={})
    policy.step()
    with pytest.raises(PolicyError) as error:
        policy.load_state_dict(policy.state_dict() | {"steps": 5} | change)
    assert [problem.key for problem in error.value.problems] == [key]
    assert policy.steps == 1


@pytest.mark.parametrize("state", [None, 3, [], {}, {"steps": 3}])
def test_what_is_no_state_is_refused(state):
    policy = Policy()
    with pytest.raises(PolicyError, match=r"policy.load_state_dict\(...\)"):
        policy.load_state_dict(state)
    assert policy.steps == 0


def test_repr_is_short_and_says_what_counts():
    policy = Policy(drop_rate=0.5, schedule={"kind": "cosine"}, rules=[Rule(layers="a", drop_rate=0)])
    text = repr(policy)
    assert len(text) < 150
    assert all(word in text for word in ("drop_rate=0.5", "cosine", "1 rule;", "step 0", "factor 0"))


# --- the schema


def described(schema):
    yield from schema.get("properties", {}).items()
    for definition in schema.get("$defs", {}).values():
        yield from described(definition)


def test_the_schema_describes_every_key_and_allows_no_other():
    schema = Policy.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"].endswith("2020-12/schema")
    assert all(value.get("description") for _, value in described(schema))
    assert {key for key, _ in described(schema)} >= {
        "version",
        "drop_rate",
        "rules",
        "layers",
        "optional",
        "levels",
    }
    assert all(part["additionalProperties"] is False for part in (schema, *schema["$defs"].values()))


GOOD = [
    {},
    {"version": 1, "drop_rate": 0},
    {"round_to": 16},
    {"schedule": {"kind": "linear", "total": None}},
    {"schedule": {"cooldown": 2, "total": 10}},
    {"rules": [{"layers": ["a", "re:b.*"], "drop_rate": 0.5}, {"kind": "linear", "criterion": "l2"}]},
    Policy().to_dict(),
]
BAD = [
    [],
    {"drop_rat": 0.5},
    {"drop_rate": 1},
    {"drop_rate": -0.1},
    {"drop_rate": "0.5"},
    {"drop_rate": True},
    {"drop_rate": None},
    {"version": 2},
    {"criterion": "l3"},
    {"round_to": 0},
    {"round_to": "none"},
    {"gradients": "input"},
    {"schedule": None},
    {"schedule": {"period": 0}},
    {"schedule": {"cooldown": 2}},
    {"schedule": {"cooldown": 2, "total": None}},
    {"schedule": {"clocks": "manual"}},
    {"rules": None},
    {"rules": [{"drop_rate": 0.5}]},
    {"rules": [{"layers": "a"}]},
    {"rules": [{"layers": [], "drop_rate": 0.5}]},
    {"rules": [{"layers": "a", "drop_rate": None}]},
    {"rules": [{"kind": "conv", "drop_rate": 0.5}]},
    {"rules": [{"kind": ["conv2d", 3], "drop_rate": 0.5}]},
]


@pytest.mark.parametrize("document", GOOD)
def test_the_schema_and_the_policy_accept_the_same(document):
    jsonschema.validate(document, Policy.json_schema())
    policy = Policy.from_dict(document)
    jsonschema.validate(policy.to_dict(), Policy.json_schema())


@pytest.mark.parametrize("document", BAD)
def test_the_schema_and_the_policy_refuse_the_same(document):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, Policy.json_schema())
    with pytest.raises(PolicyError):
        Policy.from_dict(document)


def test_yaml_is_imported_only_to_load_a_file():
    code = "import sys, ssprop_fx.policy as p; p.Policy(schedule={}); assert 'yaml' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_policy_does_not_change():
    policy = Policy(drop_rate=0.5)
    with pytest.raises(AttributeError, match=r"drop_rate does not change.*Policy\(drop_rate="):
        policy.drop_rate = 0.3
    with pytest.raises(AttributeError, match="does not change"):
        policy.schedule.period = 3
    with pytest.raises(AttributeError, match="steps"):
        policy.steps = 3


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("rules:\n- layers: *conv1\n  drop_rate: 0\n", "quote the pattern"),
        ("rules:\n- layers: *\n  drop_rate: 0\n", "quote the pattern"),
        ("rules:\n- layers: [0, 1]\n  drop_rate: 0\n", 'quote it: "0"'),
        ("drop_rate: 80%\n", "write 0.8"),
        ("version: 2026-01-01\n", "write 1"),
        ("version: [1]\n", "write 1"),
        ("version: 1" + "0" * 400 + "\n", "write 1"),
    ],
)
def test_common_slips_of_yaml_say_what_to_write(write, text, step):
    with pytest.raises(PolicyError) as error:
        Policy.load(write(text))
    assert step in str(error.value)
    assert not any("list" in problem.what for problem in error.value.problems if problem.key == "rules[0].layers")


@pytest.mark.parametrize(
    ("value", "step"),
    [
        (0.5, r"Policy\(drop_rate=0\.5\)"),
        ("policy.yaml", r"Policy\.load\('policy\.yaml'\)"),
        (Path("policy.yaml"), r"Policy\.load\('policy\.yaml'\)"),
        ({"drop_rate": 0.5}, r"Policy\.from_dict"),
    ],
    ids=str,
)
def test_a_value_without_its_key_is_told_where_it_belongs(value, step):
    with pytest.raises(TypeError, match=f"by name.*{step}"):
        Policy(value)
