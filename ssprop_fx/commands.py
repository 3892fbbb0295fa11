"""The commands of ``ssprop-fx``; each reads its arguments, calls the library and prints."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import ssprop_fx

from . import demo as demonstration
from .errors import PolicyError, SSPropError, cause_of
from .files import check_writable
from .models import FORMS, MADE, NameProblem, load_model, make_input, told
from .policy import Policy
from .tables import comparison, report_table

STARTER = """\
# A policy of ssprop-fx: which gradients are dropped, where, and when.
# Check it with `ssprop-fx policy check FILE`; `ssprop-fx policy schema` prints a JSON Schema for editors.
version: 1

# For every layer that no rule changes.
drop_rate: 0.8            # share of output channels whose gradient is dropped; 0 <= drop_rate < 1, 0 is dense
criterion: l1             # how channels are ranked: l1 | l2 | taylor | random
round_to: auto            # kept channels are a multiple of this: auto suits the hardware, 1 is exact
gradients: all            # all | weight (leaves the gradient of the input dense)

# When. A step is one call of policy.step(), or one optimizer step with `clock: optimizer`.
schedule:
  kind: bar               # bar | constant | linear | cosine
  period: 2               # bar: dense in the first half of a period, sparse in the second
  warmup: 0               # dense steps first
  # total: 10000          # if you know how many steps the run has: ending them densely, a quarter, say,
  # cooldown: 2500        # gives back accuracy where training is short (docs/results.md)
  clock: optimizer        # optimizer | manual (you call policy.step() after every optimizer step)

# Where. The last rule that matches a layer decides; it changes only the keys that it names.
# Layer names are those of model.named_modules(); a rule that matches no layer is an error.
rules: []
#  - layers: "conv1"                    # a glob, or "re:..." for a regular expression, or a list of them
#    drop_rate: 0                       # the stem stays dense
#  - layers: ["layer4.*", "head.*"]
#    drop_rate: 0.9
#  - kind: depthwise                    # conv1d ... conv_transpose3d, grouped, depthwise, pointwise, linear
#    drop_rate: 0.5
#    optional: true                     # may match nothing
"""

app = typer.Typer(
    help="Train convolutional networks with a sparse backward pass.",
    epilog="Examples:\n\n  ssprop-fx demo\n\n  ssprop-fx policy init -o policy.yaml\n\n"
    "  ssprop-fx inspect torchvision:resnet50 -p policy.yaml -i 1x3x224x224 --html report.html\n\n"
    "  ssprop-fx --install-completion\n\n"
    "Exit codes: 0 success, 1 an error of a policy or a model, 2 a wrong command line.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
policy_app = typer.Typer(help="Check, describe and start policy files.", no_args_is_help=True)
app.add_typer(policy_app, name="policy")

PolicyOption = Annotated[
    Path | None, typer.Option("--policy", "-p", metavar="FILE", help="Policy file; the default policy without it.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"ssprop-fx {ssprop_fx.__version__}, PyTorch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Examples:\n\n  ssprop-fx demo\n\n  ssprop-fx demo --compile --seed 1\n\n"
    "  ssprop-fx demo --policy policy.yaml --json > result.json"
)
def demo(
    policy: PolicyOption = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Through torch.compile: Inductor against the backend ssprop.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the split and the order of the images.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = demonstration.EPOCHS,
    as_json: JsonOption = False,
) -> None:
    """Train a small ResNet on images of digits, dense and under a policy, and compare."""
    chosen = read_policy(policy)
    console = Console(stderr=True)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("compiling" if compiled else "", total=None)

        def progress(done: int, total: int, line: str) -> None:
            bar.update(task, completed=done, total=total, description=line)

        result = demonstration.train(chosen, seed, epochs, compiled, progress)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    Console().print(comparison(result))
    print(f"\n{result.report}")


@policy_app.command(
    "check",
    epilog="Examples:\n\n  ssprop-fx policy check policy.yaml && python train.py\n\n"
    "  ssprop-fx policy check policy.yaml --json | jq -r '.problems[].next_step'",
)
def policy_check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A policy file.")], as_json: JsonOption = False
) -> None:
    """Check a policy file; every problem is printed with its line and what to write instead."""
    try:
        policy = Policy.load(file)
    except PolicyError as error:
        if not as_json:
            raise
        print(json.dumps({"file": str(file), "valid": False, "problems": [vars(p) for p in error.problems]}, indent=2))
        raise typer.Exit(1) from None
    if as_json:
        valid = {"file": str(file), "valid": True, "problems": [], "digest": policy.digest, "policy": policy.to_dict()}
        print(json.dumps(valid, indent=2))
        return
    schedule, rules = policy.schedule, len(policy.rules)
    print(
        f"{file}: valid. Drop rate {policy.drop_rate:g}, {policy.criterion}, schedule {schedule.kind} "
        f"({schedule.clock} clock), {rules} {'rule' if rules == 1 else 'rules'}."
    )


@policy_app.command("schema", epilog="Example:\n\n  ssprop-fx policy schema > policy.schema.json")
def policy_schema(
    as_json: Annotated[bool, typer.Option("--json", help="As without: a schema is JSON.")] = False,
) -> None:
    """Print the JSON Schema of policy files, with which editors complete and check them."""
    print(json.dumps(Policy.json_schema(), indent=2))


@policy_app.command(
    "init",
    epilog="Examples:\n\n  ssprop-fx policy init\n\n  ssprop-fx policy init -o policy.yaml\n\n"
    "  ssprop-fx policy init --json | jq .drop_rate",
)
def policy_init(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write there, not to the screen.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, which is YAML, too, but has no comments.")] = False,
) -> None:
    """Print a policy file to start from: the default policy, with comments."""
    text = json.dumps(Policy().to_dict(), indent=2) + "\n" if as_json else STARTER
    if output is None:
        print(text, end="")
        return
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise SSPropError(f"{output} exists and is left as it is; choose another name, or delete it first") from None
    except OSError as problem:
        raise SSPropError(f"{output} cannot be written: {problem.strerror}") from None
    print(f"wrote {output}", file=sys.stderr if as_json else sys.stdout)


@app.command(
    epilog="Examples:\n\n  ssprop-fx inspect torchvision:resnet18 --input 2x3x64x64\n\n"
    "  ssprop-fx inspect net.py:build -p policy.yaml -i 4x1x28x28 --step 1\n\n"
    "  ssprop-fx inspect timm:resnet50 -i 2x3x224x224 --html report.html\n\n"
    "  ssprop-fx inspect torchvision:resnet18 -i 2x3x64x64 --compile --html report.html\n\n"
    "  ssprop-fx inspect torchvision:resnet18 --json | jq -r '.rows[].layer'"
)
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=FORMS + ".")],
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            metavar="SHAPE",
            help="Shape of an input, as 2x3x224x224, which is " + MADE + "; repeat it for more. "
            "Without it shapes and FLOPs stay unknown. For other inputs: ssprop_fx.inspect(model, inputs) in Python.",
        ),
    ] = None,
    policy: PolicyOption = None,
    step: Annotated[int, typer.Option(min=0, help="Step of the schedule that the table shows.")] = 0,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Through torch.compile (inner: aot_eager): the graphs that Dynamo captures."),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the page there, too: dataflow, code and schedule in one file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what the policy does to each convolution of a model, and measure that none is missed.

    The model gets random weights; with inputs, a dense and a sparse training step are run, on the CPU in float32, and their
    convolutions counted.
    """
    chosen = read_policy(policy)
    if html is not None:
        check_writable(html)
    try:
        inputs = tuple(make_input(shape) for shape in shapes or ())
        original = load_model(model)
    except NameProblem as problem:
        raise typer.BadParameter(str(problem)) from None
    if compiled and not inputs:
        raise typer.BadParameter("--compile needs --input: a graph is captured when the model runs")
    chosen.load_state_dict({**chosen.state_dict(), "steps": step})
    report = running(model, shapes or (), lambda: _report(ssprop_fx.transform(original, chosen), inputs, compiled))
    if html is not None:
        try:
            report.to_html(html)
        except OSError as problem:
            raise SSPropError(f"{html} cannot be written: {problem.strerror}") from None
    console = Console()
    if as_json or not console.is_terminal:
        print(report.to_json() if as_json else report)
    else:
        console.print(report_table(report))


def _report(model: Any, inputs: tuple, compiled: bool) -> ssprop_fx.Report:
    if not compiled:
        return ssprop_fx.inspect(model, inputs or None)
    graphs: Any = torch.compile(model, backend="ssprop", options={"inner": "aot_eager"})
    return ssprop_fx.inspect(graphs, inputs)


def running(name: str, shapes: Sequence[str], work: Callable[[], Any]) -> Any:
    """The result of ``work``, which runs the model; what that prints goes to the standard error.

    Raises:
        SSPropError: the model's code fails.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return work()
    except Exception as raised:  # the model's own code may raise anything
        problem = cause_of(raised)
        if isinstance(problem, SSPropError):
            raise problem from None
        what = f"does not run on {', '.join(shapes)}" if shapes else "fails"
        raise SSPropError(f"{name} {what}: {told(problem)}") from problem


def read_policy(file: Path | None) -> Policy:
    return Policy() if file is None else Policy.load(file)
