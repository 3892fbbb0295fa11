"""The command ``ssprop-fx``: what it prints, its exit codes, and that nobody meets a traceback."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import jsonschema
import pytest
import yaml

from ssprop_fx import Policy
from ssprop_fx.cli import main

ROOT = Path(__file__).parent.parent

compiler = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["ssprop-fx", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            main()
        captured = capsys.readouterr()
        code = exit.value.code
        if isinstance(code, str):  # as the interpreter does with a text
            return 1, captured.out, captured.err + code
        return code or 0, captured.out, captured.err

    return call


def every_command():
    from typer.main import get_command

    import ssprop_fx.timing_commands  # noqa: F401 (adds its commands)
    from ssprop_fx.commands import app

    groups = [([], get_command(app))]
    for path, group in groups:
        yield path, hasattr(group, "commands")
        groups += [([*path, name], command) for name, command in getattr(group, "commands", {}).items()]


@pytest.mark.parametrize(
    ("command", "is_group"), every_command(), ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_help_of_every_command_has_examples_and_every_command_json(run, command, is_group):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Usage: " in out
    assert "Example" in out or command == ["policy"]
    assert is_group or "--json" in out


def test_shell_completion_finishes_commands(run, monkeypatch, capsys):
    monkeypatch.setenv("_SSPROP_FX_COMPLETE", "source_bash")  # --show-completion asks which shell is its parent
    code, out, _ = run()
    assert code == 0
    assert "_SSPROP_FX_COMPLETE" in out
    monkeypatch.setenv("_SSPROP_FX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "ssprop-fx policy ch")
    monkeypatch.setenv("COMP_CWORD", "2")
    code, out, _ = run()
    assert (code, out.split()) == (0, ["check"])


def test_version_names_both_packages(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("ssprop-fx ")
    assert "PyTorch" in out


@pytest.mark.parametrize(
    "args", [["nosuch"], ["policy", "check"], ["inspect"], ["demo", "--epochs", "0"], ["demo", "--nosuch"]]
)
def test_a_wrong_command_line_is_exit_code_2(run, args):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert "Usage: " in err


# --- policy -------------------------------------------------------------------------------------------------


def test_the_starter_policy_is_the_default_policy_and_passes_check(run, tmp_path):
    path = tmp_path / "policy.yaml"
    assert run("policy", "init", "-o", path)[0] == 0
    assert Policy.load(path).digest == Policy().digest
    code, out, _ = run("policy", "check", path)
    assert code == 0
    assert "valid" in out
    assert run("policy", "init")[1] == path.read_text()


def test_the_rules_in_the_starter_policy_are_valid_once_uncommented(tmp_path, run):
    head, _, rules = run("policy", "init")[1].partition("rules: []")
    path = tmp_path / "policy.yaml"
    path.write_text(head + "rules:" + rules.replace("\n#", "\n"))
    assert len(Policy.load(path).rules) == 3


def test_init_overwrites_nothing(run, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("mine")
    code, _, err = run("policy", "init", "-o", path)
    assert code == 1
    assert "exists" in err
    assert path.read_text() == "mine"


def test_check_prints_every_problem_and_no_traceback(run, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("drop_rat: 0.5\nschedule:\n  kind: barr\n")
    code, out, err = run("policy", "check", path)
    assert (code, out) == (1, "")
    assert "policy.yaml:1: drop_rat" in err
    assert "policy.yaml:3: schedule.kind" in err
    assert "Traceback" not in err


def test_check_of_a_file_that_is_not_there(run, tmp_path):
    code, _, err = run("policy", "check", tmp_path / "policy.yml")
    assert code == 1
    assert "cannot be read" in err


def test_check_as_json_gives_the_whole_policy(run):
    code, out, _ = run("policy", "check", ROOT / "examples" / "policy.yaml", "--json")
    assert code == 0
    assert Policy.from_dict(json.loads(out)["policy"]).digest == json.loads(out)["digest"]


def test_check_as_json_gives_every_problem(run, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("drop_rat: 0.5\nschedule:\n  kind: barr\n")
    code, out, _ = run("policy", "check", path, "--json")
    assert code == 1
    found = json.loads(out)
    assert not found["valid"]
    assert [p["key"] for p in found["problems"]] == ["drop_rat", "schedule.kind"]
    assert found["problems"][1]["nearest"] == "bar"


def test_init_as_json_is_a_policy_file(run, tmp_path):
    path = tmp_path / "policy.json"
    code, out, err = run("policy", "init", "--json", "-o", path)
    assert (code, out, err) == (0, "", f"wrote {path}\n")
    assert Policy.load(path).digest == Policy().digest
    assert json.loads(run("policy", "init", "--json")[1]) == Policy().to_dict()
    assert run("policy", "schema", "--json") == run("policy", "schema")


def test_schema_accepts_the_starter_policy(run):
    schema = json.loads(run("policy", "schema")[1])
    jsonschema.validate(yaml.safe_load(run("policy", "init")[1]), schema)


# --- inspect ------------------------------------------------------------------------------------------------

NET = """\
from torch import nn
from sibling import WIDTH

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, WIDTH, 3), nn.ReLU(), nn.Conv2d(WIDTH, 16, 3))

ready = Net()
number = 3
def fails():
    raise ImportError("the model's own problem")
def needs(width):
    return Net()
def leaves():
    raise SystemExit(5)
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "sibling.py").write_text("WIDTH = 32\n")
    (tmp_path / "broken.py").write_text("class Net(\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path / "net.py"


def test_inspect_of_a_torchvision_model_measures_full_coverage(run):
    pytest.importorskip("torchvision")
    code, out, _ = run("inspect", "torchvision:resnet18", "--input", "2x3x32x32", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["coverage"] == 1
    assert report["measurement"]["dense"] == 20
    assert len(report["rows"]) == 20
    assert all(row["kept"] == row["total"] for row in report["rows"])


def test_inspect_needs_no_download(run, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", None)
    code, out, _ = run("inspect", "torchvision:fcn_resnet50", "--input", "2x3x32x32")  # its backbone's default is trained
    assert code == 0
    assert "0 missed" in out


@pytest.mark.parametrize("name", ["{net}:Net", "{net}:ready", "net:Net"])
def test_inspect_of_ones_own_model(run, net, name):
    code, out, _ = run("inspect", name.format(net=net), "-i", "2x3x8x8", "--step", "1")
    assert code == 0
    assert "2 of 2 convolutions rewritten; step 1, factor 1" in out
    assert "0 missed" in out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("net:fails", "net:fails fails: ImportError: the model's own problem (net.py:11)"),
        ("net:needs", "net:needs fails: TypeError"),
        ("net:leaves", "net:leaves fails: SystemExit: 5 (net.py:15)"),
        ("broken:Net", "broken:Net fails: SyntaxError"),
    ],
)
def test_a_model_whose_code_fails_is_exit_code_1_and_says_where(run, net, name, message):
    code, out, err = run("inspect", name)
    assert (code, out) == (1, "")
    assert message in " ".join(err.split())


def test_what_a_model_prints_is_no_part_of_the_json(run, net):
    with net.open("a") as file:
        file.write("print('loading')\nclass Loud(Net):\n    def forward(self, x):\n        print('running')\n")
        file.write("        return super().forward(x)\n")
    code, out, err = run("inspect", "net.py:Loud", "-i", "2x3x8x8", "--json")
    assert code == 0
    assert len(json.loads(out)["rows"]) == 2
    assert {"loading", "running"} <= set(err.split())


@pytest.mark.parametrize(
    "command", [("inspect", "--html"), ("tune", "-o"), ("bench", "--plot")], ids=lambda command: command[0]
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(run, net, monkeypatch, tmp_path, command):
    name, option = command
    monkeypatch.setattr("ssprop_fx.commands.load_model", lambda name: pytest.fail("the model was loaded"))
    monkeypatch.setattr("ssprop_fx.timing_commands.load_model", lambda name: pytest.fail("the model was loaded"))
    for path, why in ((tmp_path / "no" / "file", "there is no folder"), (tmp_path, "it is a folder")):
        code, out, err = run(name, "net:Net", "-i", "2x3x8x8", option, str(path), *(["--force"] if name == "tune" else []))
        assert (code, out) == (1, "")
        assert f"cannot be written: {why}" in err


def test_the_module_is_the_command_and_a_terminal_of_few_characters_serves(net):
    arguments = [sys.executable, "-m", "ssprop_fx", "inspect", "net:Net", "-i", "2x3x8x8"]
    done = subprocess.run(arguments, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == 0, done.stderr
    assert b"2?32?6?6" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resnet18", "-i", "1x3x8x8"], "torchvision:NAME"),
        (["torchvision:resnet19", "-i", "1x3x8x8"], "nearest: resnet18"),
        (["nosuchmodule:Net", "-i", "1x3x8x8"], "nosuchmodule"),
        (["net:Nett", "-i", "1x3x8x8"], "nearest: Net"),
        (["net:number", "-i", "1x3x8x8"], "not a torch.nn.Module"),
        (["nett.py:Net", "-i", "1x3x8x8"], "nearest: net.py"),
        (["net:Net", "-i", "1,3,8,8"], "no shape"),
        (["net:Net", "--compile"], "--input"),
        (["torchvison:resnet18"], "nearest: torchvision"),
        (["net:Net", "-i", "99999999999999999999x3x8x8"], "cannot be made"),
    ],
)
def test_a_model_or_input_that_cannot_be_named_is_exit_code_2(run, net, args, message):
    code, out, err = run("inspect", *args)
    assert (code, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_library_that_is_not_there_is_to_be_installed(run, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    code, out, err = run("inspect", f"{library}:resnet18")
    assert (code, out) == (2, "")
    said = " ".join(err.replace("│", " ").split())
    assert f"there is no module '{library}'; pip install {library}" in said
    assert "nearest" not in said


def test_code_that_fails_before_any_input_is_told_without_inputs(run, net):
    with net.open("a") as file:
        file.write("class Odd(Net):\n    def named_modules(self, *_, **__):\n        raise ValueError('not to be looked at')\n")
    code, out, err = run("inspect", "net.py:Odd")
    assert (code, out) == (1, "")
    assert err.startswith("error: net.py:Odd fails: ValueError: not to be looked at")


def test_the_help_says_what_an_input_is_filled_with(run):
    for command in ("inspect", "tune", "bench"):
        assert "random normal numbers in float32" in " ".join(run(command, "--help")[1].replace("│", " ").split())


def test_without_inputs_shapes_are_unknown(run, net):
    code, out, _ = run("inspect", "net:Net", "--json")
    report = json.loads(out)
    assert code == 0
    assert [row["output_shape"] for row in report["rows"]] == [None, None]
    assert report["measurement"] is None


def test_compile_shows_the_captured_graphs(run, net):
    code, out, _ = run("inspect", "net:Net", "-i", "2x3x8x8", "--compile", "--step", "1", "--html", "report.html")
    assert code == 0
    assert "2 of 2 convolutions rewritten; step 1, factor 1" in out
    assert "0 missed" in out
    assert "backward, factor 1" in Path("report.html").read_text()


def test_a_terminal_gets_a_table(run, net, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run("inspect", "net:Net", "-i", "2x3x8x8")
    assert code == 0
    assert "\x1b[" in out
    assert "2×32×6×6" in out


def test_an_input_that_the_model_refuses_is_exit_code_1(run, net):
    code, out, err = run("inspect", "net:Net", "-i", "2x4x8x8")
    assert (code, out) == (1, "")
    assert err.startswith("error: net:Net does not run on 2x4x8x8: ")
    assert len(err.splitlines()) == 1


def test_a_rule_that_matches_nothing_is_exit_code_1(run, net):
    Path("policy.yaml").write_text('rules:\n  - layers: "layer9.*"\n    drop_rate: 0\n')
    code, out, err = run("inspect", "net:Net", "-i", "2x3x8x8", "--policy", "policy.yaml")
    assert (code, out) == (1, "")
    assert err.startswith("error: policy.yaml:2: rules[0].layers")


# --- demo ---------------------------------------------------------------------------------------------------


def check_saving(result):
    steps, report = result["setting"]["steps"], result["report"]
    assert result["saved"]["conv_flops"] == pytest.approx(0.4, abs=0.005)
    # the report's rows say the same as the counter; they include the input gradient of the first layer
    rows = steps / 2 * (report["flops_dense"] + report["flops_now"])
    assert result["policy"]["conv_flops"] == pytest.approx(rows, rel=0.005)
    assert report["factor"] == 1
    assert all(row["rung"] != "-" for row in report["rows"])


def test_demo_saves_40_percent(run):
    code, out, _ = run("demo", "--epochs", "1", "--json")
    assert code == 0
    check_saving(json.loads(out))


def test_demo_prints_a_table_and_the_report(run, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("drop_rate: 0.5\nschedule: {kind: constant, clock: manual}\nrules: [{layers: stem.0, drop_rate: 0}]\n")
    code, out, err = run("demo", "--epochs", "1", "--policy", path)
    assert code == 0
    for words in (
        "test accuracy",
        "backward convolution FLOPs",
        "mean step time",
        "8 of 9 convolutions rewritten, 1 dense by rule",
        "drop rate 0",
    ):
        assert words in out
    assert "%" in out
    assert "steps" not in err  # no progress bar where there is no terminal


@pytest.mark.slow
def test_demo_ends_within_a_point_of_dense(run):
    code, out, _ = run("demo", "--json")
    result = json.loads(out)
    assert code == 0
    check_saving(result)
    assert result["dense"]["accuracy"] > 0.97
    assert result["policy"]["accuracy"] >= result["dense"]["accuracy"] - 0.01


@pytest.mark.slow
@compiler
def test_demo_through_the_compiler_saves_the_same(run):
    code, out, _ = run("demo", "--epochs", "1", "--compile", "--json")
    assert code == 0
    check_saving(json.loads(out))


MISSING = [
    ("typer", "typer rich", "cli"), ("rich.console", "typer rich", "cli"), ("sklearn.datasets", "typer rich scikit-learn", "demo"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "packages", "extra"), MISSING)
def test_a_missing_extra_is_one_line_with_the_pip_command(run, monkeypatch, module, packages, extra):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "ssprop_fx.commands", raising=False)
    code, out, err = run("demo", "--epochs", "1")
    assert (code, out) == (1, "")
    missing = module.partition(".")[0]
    assert err == f"error: {missing} is not installed; pip install {packages}, or in a clone pip install '.[{extra}]'"


def test_the_packages_that_are_named_are_those_of_the_extra():
    from ssprop_fx.cli import _PACKAGES

    declared = metadata("ssprop-fx").get_all("Requires-Dist")
    for extra, packages in _PACKAGES.items():
        own = {re.split(r"[>=<\[; ]", line)[0] for line in declared if f'extra == "{extra}"' in line} - {"ssprop-fx"}
        assert own <= set(packages.split())


# --- what is installed --------------------------------------------------------------------------------------


def test_quickstart_runs_from_any_directory(tmp_path):
    pytest.importorskip("torchvision")
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "19 of 20 convolutions rewritten, 1 dense by rule" in done.stdout


def test_torch_lists_the_backend_without_our_being_imported():
    code = "import sys, torch; print(torch._dynamo.list_backends(), 'ssprop_fx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "'ssprop'" in done.stdout
    assert done.stdout.strip().endswith("False")


def test_the_command_is_installed():
    done = subprocess.run([Path(sys.executable).with_name("ssprop-fx"), "policy", "schema"], capture_output=True, timeout=600)
    assert done.returncode == 0
    assert json.loads(done.stdout)["title"] == "ssprop-fx policy"
