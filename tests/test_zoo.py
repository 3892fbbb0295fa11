"""C1, C2, C4 and C5 on the models that people have: the development suite, and (slow) forty more of six libraries."""

import copy
import pickle
from collections import Counter

import pytest
import torch
import zoo
from zoo import evaluate, in_double, pickles, policy, run_step

import ssprop_fx

pytestmark = pytest.mark.filterwarnings("ignore")

# Each compiles for ten seconds or more.
_HEAVY = {"retinanet_resnet50_fpn", "UNet2DConditionModel", "tf_efficientnet_cc_b0_4e", "spiking_resnet18"}


class Case:
    """A model before and after, and what its dense step gave."""

    def __init__(self, model):
        pytest.importorskip(model.library, exc_type=ImportError)
        self.model, self.arguments = model, model.arguments()
        self.original = model.build()
        self.evaluated = evaluate(self.original, self.arguments)
        self.dense = run_step(self.original, self.arguments)

    def transformed(self, rate=0.8, **options):
        """The original under a policy that keeps its factor."""
        return ssprop_fx.transform(self.original, policy(rate, **options))


@pytest.fixture(
    scope="module",
    params=[pytest.param(m, id=m.name) for m in zoo.DEVELOPMENT]
    + [pytest.param(m, id=m.name, marks=pytest.mark.slow) for m in zoo.FURTHER],
)
def case(request):
    return Case(request.param)


@pytest.fixture(
    scope="module",
    params=[pytest.param(m, id=m.name, marks=[pytest.mark.slow] if m.name in _HEAVY else []) for m in zoo.DEVELOPMENT],
)
def development(request):
    return Case(request.param)


@pytest.fixture
def fresh_compiler():
    yield
    torch._dynamo.reset()


def test_at_most_three_models_share_a_family_and_forty_are_beyond_the_suite():
    assert max(Counter(m.family for m in zoo.MODELS).values()) <= 3
    assert len(zoo.DEVELOPMENT) == 8
    assert len(zoo.FURTHER) >= 40
    assert len({m.name for m in zoo.MODELS}) == len(zoo.MODELS)


def test_the_step_itself_can_be_repeated(case):
    assert run_step(case.original, case.arguments).equals(case.dense), "the comparisons below would mean nothing"


def test_dense_phase_is_bit_equal(case):
    step = run_step(case.transformed(end=0.0), case.arguments)
    assert step.outputs_equal(case.dense)
    assert step.differing(case.dense) == []
    assert step.grads.keys() == case.dense.grads.keys()


def test_forward_is_bit_equal_in_train_and_eval_mode(case):
    model = case.transformed()
    step = run_step(model, case.arguments)
    assert step.outputs_equal(case.dense)
    assert step.grads.keys() == case.dense.grads.keys()
    assert step.differing(case.dense), "no gradient is sparse"
    after = evaluate(model, case.arguments)
    assert len(after) == len(case.evaluated) > 0
    assert all(torch.equal(a, b) for a, b in zip(after, case.evaluated, strict=True))


def test_every_convolution_backward_is_rewritten(case):
    report = ssprop_fx.inspect(case.transformed(), case.arguments)
    assert report.measurement.dense > 0
    assert report.coverage == 1.0
    assert [row.layer for row in report.rows if not row.rewritten] == []
    known = {row.layer for row in report.rows}
    assert set(report.measurement.calls) <= known
    assert len(known) == len(report.rows)


def test_it_is_the_same_model(case):
    model = case.transformed()
    assert type(model) is type(case.original)
    assert list(model.state_dict()) == list(case.original.state_dict())
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in case.original.named_modules()]
    for mine, theirs in (
        (model.named_parameters(), case.original.named_parameters()),
        (model.named_buffers(), case.original.named_buffers()),
    ):
        assert all(a == b and p is q for (a, p), (b, q) in zip(mine, theirs, strict=True))
    assert run_step(case.original, case.arguments).equals(case.dense), "the original no longer runs dense"


def test_copies_are_sparse_and_independent(case):
    model = case.transformed()
    step = run_step(model, case.arguments)
    evaluate(model, case.arguments)  # states that a step leaves on the model then carry no graph, which nobody could copy
    evaluate(case.original, case.arguments)
    copies = [copy.deepcopy(model)]
    if pickles(case.original):
        copies.append(pickle.loads(pickle.dumps(model)))
    for copied in copies:
        assert run_step(copied, case.arguments).equals(step)
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_transform_covers_everything_with_eager_gradients(development):
    # in double precision: batch norms over few values turn the last bits of single precision into per cents of a gradient
    arguments = in_double(development.arguments)
    model = ssprop_fx.transform(development.model.build().double(), policy(0.8, round_to=1))
    eager = run_step(model, arguments)
    compiled = torch.compile(model, backend="ssprop", options={"inner": "aot_eager"}, dynamic=False)
    step = run_step(compiled, arguments)
    assert step.grads.keys() == {f"_orig_mod.{name}" for name in eager.grads}
    for name, grad in eager.grads.items():
        error = (step.grads[f"_orig_mod.{name}"] - grad).norm()
        assert error <= 1e-7 * grad.norm() + 1e-12, f"{name} is off by {error / grad.norm():.2g}"
    report = ssprop_fx.inspect(compiled, arguments)
    assert report.coverage == 1.0
    assert all(row.rewritten for row in report.rows)


@pytest.mark.usefixtures("fresh_compiler")
def test_backend_alone_says_what_it_missed(development):
    rule = policy(round_to=1)
    evaluate(development.original, development.arguments)  # nobody could copy states that carry a graph
    compiled = torch.compile(
        copy.deepcopy(development.original), backend="ssprop", options={"policy": rule, "inner": "aot_eager"}, dynamic=False
    )
    step = run_step(compiled, development.arguments)
    report = ssprop_fx.inspect(compiled, development.arguments)
    missed = report.measurement.dense - report.measurement.sparse
    rows = {row.layer: row for row in report.rows}
    for name, _ in development.original.named_modules():
        row = rows.get(name)
        grad = step.grads.get(f"_orig_mod.{name}.weight")
        if row is None or grad is None or grad.shape[0] < 5 or row.kind.startswith("conv_transpose"):
            continue
        dense_zeros, zeros = zero_rows(development.dense.grads[f"{name}.weight"]), zero_rows(grad)
        if row.rung == "-":
            assert row.reason
            assert zeros == dense_zeros, f"{name} is sparse, but the report says it was missed"
        elif report.measurement.calls.get(name, 1) == 1:
            assert zeros > dense_zeros, f"{name} is dense, but the report says it was rewritten"
    assert sum(calls for calls, *_ in report.measurement.missed.values()) == missed
    assert {row.layer for row in report.rows if row.rung == "-"} >= set(report.measurement.missed) - {
        row.layer for row in report.rows if row.rewritten
    }


def zero_rows(grad):
    """Output channels whose gradient is zero."""
    return int((grad.flatten(1).abs().sum(1) == 0).sum())
