"""How many channels are kept, and which."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import CRITERIA, generated
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import ssprop_fx
from ssprop_fx import native, selection
from ssprop_fx.selection import (
    Demand,
    choices,
    compiled_importance,
    fast_granule,
    importance,
    keep_count,
    kept_channels,
    norms,
    plan_counts,
)

# --- how many -----------------------------------------------------------------------------------------------


@generated(300)
@given(st.integers(0, 999), st.integers(1, 4096))
def test_round_to_one_is_the_papers_floor_for_every_decimal_rate(thousandths, channels):
    exact = (1 - Fraction(thousandths, 1000)) * channels
    assert keep_count(thousandths / 1000, channels, 1) == max(1, math.floor(exact))


@pytest.mark.parametrize(("rate", "channels", "kept"), [(0.8, 10, 2), (0.9, 10, 1), (0.7, 10, 3), (0.8, 5, 1), (0.95, 10, 1)])
def test_floating_point_does_not_lose_a_channel(rate, channels, kept):
    assert keep_count(rate, channels) == kept


@generated(300)
@given(st.integers(1, 999), st.integers(1, 1024), st.sampled_from((2, 4, 8, 16, 32)))
def test_larger_units_give_the_nearest_multiple_within_one_and_all(thousandths, channels, unit):
    count = keep_count(thousandths / 1000, channels, unit)
    wanted = (1 - Fraction(thousandths, 1000)) * channels
    assert 1 <= count <= channels
    if count % unit:  # only at the ends
        assert (count == 1 and wanted < Fraction(unit, 2)) or (count == channels and wanted > count - unit)
    else:
        assert abs(count - wanted) <= Fraction(unit, 2)


@pytest.mark.parametrize("unit", [0, 1, 4, 16])
def test_rate_zero_keeps_everything(unit):
    assert keep_count(0.0, 37, unit) == 37


def test_a_group_of_one_channel_has_no_choice_so_the_groups_compete():
    assert choices(32, 32) == 32
    assert choices(32, 4) == 8
    assert choices(32, 1) == 32
    assert choices(1, 1) == 1


def test_fast_granule_depends_on_type_and_device():
    assert fast_granule(torch.float32) == 16
    assert fast_granule(torch.bfloat16) == 32
    assert fast_granule(torch.bfloat16, torch.device("cuda")) == 16


# --- auto ---------------------------------------------------------------------------------------------------

# (channels, backward FLOPs relative to each other) as in torchvision's networks
NETWORKS = {
    "resnet18": [(64, 9.4)] + [(64, 9.2)] * 4 + [(128, 4.6), (128, 9.2), (128, 0.5), (128, 9.2), (128, 9.2)]
    + [(256, 4.6), (256, 9.2), (256, 0.5), (256, 9.2), (256, 9.2)]
    + [(512, 4.6), (512, 9.2), (512, 0.5), (512, 9.2), (512, 9.2)],
    "vgg11": [(64, 6), (128, 64), (256, 64), (256, 128), (512, 64), (512, 128), (512, 32), (512, 32)],
    "mobilenet": [(32, 6), (32, 2), (16, 4), (96, 12), (96, 2), (24, 5), (144, 7), (144, 2), (24, 7)]
    + [(192, 4), (192, 1), (32, 4), (384, 5), (384, 1), (64, 5), (960, 6), (960, 1), (320, 12), (1280, 16)],
    "densenet": [(64, 30)] + [(128, 10), (32, 9)] * 20,
}  # fmt: skip


def share(demands, counts):
    """FLOPs at these counts over the FLOPs asked."""
    asked = sum(d.flops * (1 - d.drop_rate) for d in demands)
    return sum(d.flops * counts[d.layer] / d.channels for d in demands) / asked


@pytest.mark.parametrize("network", NETWORKS)
@generated(60)
@given(rate=st.integers(1, 95), granule=st.sampled_from((8, 16, 32)))
def test_auto_spends_what_was_asked_within_two_percent(network, rate, granule):
    demands = [
        Demand(str(i), channels, int(flops * 1e6), rate / 100, granule) for i, (channels, flops) in enumerate(NETWORKS[network])
    ]
    counts = plan_counts(demands)
    assert all(1 <= counts[d.layer] <= d.channels for d in demands)
    assert abs(share(demands, counts) - 1) <= 0.02 + 1e-9


demand_lists = st.lists(
    st.tuples(
        st.sampled_from((16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)),
        st.integers(1, 1000),
        st.integers(0, 95),
    ),
    min_size=8,
    max_size=40,
)


@generated(300)
@given(demand_lists)
def test_auto_holds_its_budget_for_any_mixture_of_layers_and_rates(layers):
    demands = [Demand(str(i), c, f * 100_000, r / 100, 16) for i, (c, f, r) in enumerate(layers)]
    counts = plan_counts(demands)
    assert all(counts[d.layer] == d.channels for d in demands if d.drop_rate == 0)
    # a whole channel of the costliest layer is the finest step that there is when all counts are exact
    asked = sum(d.flops * (1 - d.drop_rate) for d in demands)
    exact = {d.layer: min(max(round((1 - d.drop_rate) * d.channels), 1), d.channels) for d in demands}
    floor = abs(share(demands, exact) - 1)
    assert asked > 0
    assert abs(share(demands, counts) - 1) <= max(0.02, floor) + 1e-9


@generated(300)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 200), st.integers(0, 19)), min_size=1, max_size=6))
def test_auto_holds_its_budget_wherever_exact_counts_can(layers):
    demands = [Demand(str(i), c, f * 1000, r / 20, 16) for i, (c, f, r) in enumerate(layers)]
    asked = sum(d.flops * (1 - d.drop_rate) for d in demands)

    def nearest(d):
        wanted = (1 - d.drop_rate) * d.channels
        return {min(max(c, 1), d.channels) for c in (math.floor(wanted + 1e-6), math.ceil(wanted - 1e-6))}

    offs = (
        abs(sum(d.flops * c / d.channels for d, c in zip(demands, counts, strict=True)) / asked - 1)
        for counts in itertools.product(*map(nearest, demands))
    )
    assert abs(share(demands, plan_counts(demands)) - 1) <= max(0.02, min(offs)) + 1e-9


def test_two_layers_move_where_none_alone_would_help():
    demands = [Demand("0", 9, 31104, 0.8), Demand("2", 5, 51840, 0.5), Demand("4", 20, 115200, 0.9)]
    assert abs(share(demands, plan_counts(demands)) - 1) <= 0.02


def test_auto_gives_multiples_where_the_budget_allows_it():
    demands = [Demand(str(i), 256, 100, 0.8, 16) for i in range(20)]
    counts = plan_counts(demands)
    assert {count % 16 for count in counts.values()} == {0}
    assert abs(share(demands, counts) - 1) <= 0.02


def test_auto_does_not_depend_on_the_order_of_the_layers():
    demands = [Demand(str(i), 64 + 16 * i, 1000 + 37 * i, 0.7, 16) for i in range(12)]
    assert plan_counts(demands) == plan_counts(demands[::-1])


def test_auto_of_nothing_is_nothing():
    assert plan_counts([]) == {}


# --- which --------------------------------------------------------------------------------------------------


def test_kept_channels_are_the_most_important_ones_in_ascending_order():
    score = torch.tensor([3.0, 9.0, 1.0, 7.0, 8.0])
    assert kept_channels(score, 1, 3).tolist() == [1, 3, 4]


def test_each_group_chooses_its_own():
    score = torch.tensor([9.0, 8.0, 7.0, 1.0, 3.0, 2.0])
    assert kept_channels(score, 2, 1).tolist() == [0, 4]
    assert kept_channels(score, 2, 2).tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_importance_ranks_first(bad):
    score = torch.arange(100.0)
    score[3] = bad
    assert kept_channels(score, 1, 1).tolist() == [3]
    assert kept_channels(score, 10, 1)[0] == 3


@pytest.mark.parametrize("way", ["sorted", "counted", "in C"])
@pytest.mark.parametrize("case", range(40))
def test_every_way_to_choose_keeps_the_same_channels(case, way, monkeypatch):
    """PyTorch's sorting, counting (compiled, on accelerators) and the loop in C, with ties and values that are not finite."""
    torch.manual_seed(case)
    groups, per_group = [1, 2, 5][case % 3], int(torch.randint(2, 200, ()))
    keep = int(torch.randint(1, per_group + 1, ()))
    score = torch.randn(groups * per_group) * 10.0 ** ((case % 9) * 8 - 32)
    if case % 2:
        score[torch.randint(0, len(score), (3,))] = [float("nan"), float("inf")][case % 4 // 2]
    if case % 5 == 0:
        score = score.round()
    if way == "in C" and native.library is None:
        pytest.skip("the loops in C have not been built")
    if way != "in C":
        monkeypatch.setattr(native, "library", None)
    index = (selection._counted_channels if way == "counted" else selection._kept_channels)(score, groups, keep)
    chosen = index.view(groups, keep)
    assert (chosen.diff(dim=1) > 0).all()
    rank = torch.where(score.isfinite(), score, float("inf")).view(groups, per_group)  # the two rank alike, and first
    values = rank.gather(1, chosen - torch.arange(groups).unsqueeze(1) * per_group)
    assert torch.equal(values.sort(dim=1).values, rank.sort(dim=1).values[:, -keep:])


def gradient(dtype=torch.float32, shape=(3, 7, 5, 4)):
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sliced", [True, False])
def test_importance_orders_channels_as_its_definition(dtype, sliced):
    grad, output = gradient(dtype)
    g, y = grad.double(), output.double()
    expected = {
        "l1": g.abs().mean((0, 2, 3)),
        "l2": g.square().sum((0, 2, 3)).sqrt(),
        "taylor": (g * y).sum((0, 2, 3)).abs(),
    }
    for criterion, reference in expected.items():
        score = importance(grad, output, criterion, sliced)
        assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert score.argsort().tolist() == reference.argsort().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [1, 2])
def test_norms_in_one_pass_are_the_importance(dtype, order):
    """What accelerators use, on the CPU."""
    grad = torch.randn(3, 7, 5, 6, dtype=torch.float64).to(dtype)
    grad[0, 2, 1, 1], grad[1, 4, 0, 0] = float("nan"), -float("inf")
    found, wanted = norms(grad, order), importance(grad, None, f"l{order}")
    assert found.dtype == wanted.dtype
    for got in (found, wanted if order == 1 else wanted.sqrt()):
        exact = torch.linalg.vector_norm(grad.double(), order, [0, 2, 3])
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0, equal_nan=True)
    assert kept_channels(found, 1, 2).tolist() == [2, 4]


def test_importance_is_accumulated_in_float32():
    grad = torch.full((1, 2, 100, 100), 1e-3, dtype=torch.bfloat16)
    grad[:, 1] = 1.01e-3  # in bfloat16 both sums would stall at the same value
    score = importance(grad, None, "l1")
    assert score[1] > score[0]
    assert score[0] / grad[0, 0, 0, 0].float() == pytest.approx(10_000, rel=1e-3)


@pytest.mark.parametrize("rows", [2, 3, 7, 30])
def test_slices_add_up_to_the_whole(rows):
    grad = torch.randn(rows, 8, 130, 140, dtype=torch.float64)
    whole, sliced = importance(grad, None, "l1", sliced=False), importance(grad, None, "l1", sliced=True)
    torch.testing.assert_close(sliced, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("apart", [False, True])
def test_compiled_importance_is_an_operator_where_there_is_little_to_sum(criterion, apart):
    """The kernel that a compiler would generate takes a second to compile, and runs no faster."""
    for rows, tracing, little in ((2, "real", True), (70, "real", False), (2, "symbolic", False)):
        grad, output = gradient(torch.float64, (rows, 64, 12, 13))

        def score(grad, output):
            return compiled_importance(grad, output if criterion == "taylor" else None, criterion, apart)

        traced = make_fx(score, tracing_mode=tracing)(grad, output)
        operators = [n.target for n in traced.graph.nodes if getattr(n.target, "namespace", "") == "ssprop"]
        assert (torch.ops.ssprop.importance.default in operators) == (little and criterion != "random")
        assert (torch.ops.ssprop.one_after.default in operators) == (apart and not (little and criterion != "random"))
        if criterion != "random":
            expected = importance(grad, output, criterion)
            torch.testing.assert_close(traced(grad, output), expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("tracing", ["real", "symbolic"])
@pytest.mark.parametrize("built", [False, True])
def test_what_a_loop_in_c_sums_is_an_operator_whatever_its_size(built, tracing, monkeypatch):
    if built and native.library is None:
        pytest.skip("the loops in C have not been built")
    if not built:
        monkeypatch.setattr(native, "library", None)
    traced = make_fx(lambda grad: compiled_importance(grad, None, "l1"), tracing_mode=tracing)(torch.randn(70, 64, 12, 13))
    operators = [n.target for n in traced.graph.nodes if getattr(n.target, "namespace", "") == "ssprop"]
    assert operators == [torch.ops.ssprop.importance.default] * built


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor"])
def test_the_importance_operator_is_as_declared(criterion, dtype):
    grad, output = gradient(dtype)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    given = grad, output if criterion == "taylor" else None, criterion
    torch.library.opcheck(torch.ops.ssprop.importance, given, test_utils=tests)


def test_random_gives_each_channel_its_chance():
    grad = torch.ones(1, 10, 2, 2)
    grad[:, 0] = 100
    counts = torch.zeros(10)
    torch.manual_seed(0)
    for _ in range(1000):
        counts[kept_channels(importance(grad, None, "random"), 1, 3)] += 1
    assert (counts - 300).abs().max() < 75  # five standard deviations


def test_an_unknown_criterion_is_an_error():
    with pytest.raises(ValueError, match="unknown criterion 'l3'.*" + ".*".join(CRITERIA)):
        importance(*gradient(), "l3")


def frozen(model, *names):
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


def chain(*channels, kernel=3):
    return nn.Sequential(*(nn.Conv2d(a, b, kernel, padding=kernel // 2) for a, b in itertools.pairwise(channels)))


BUDGETS = {
    "first layer without an input gradient": (chain(40, 40, 40, 40, 40), 0.5, []),
    "two layers and a narrow one": (chain(48, 48, 48, 10), 0.5, []),
    "dense input gradients": (chain(40, 40, 40, 40, 40), 0.5, [{"layers": "[12]", "gradients": "weight"}]),
    "frozen in front": (frozen(chain(3, 64, 64, 128, 128, 128), "0", "1"), 0.8, []),
    "frozen within": (frozen(chain(3, 64, 64, 128, 128, 128), "2", "3"), 0.7, []),
    "wide kernel in front": (nn.Sequential(chain(3, 32, kernel=7), chain(32, 64, 64)), 0.6, []),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["transform", "backend"])
@pytest.mark.parametrize("name", BUDGETS)
def test_rounding_keeps_the_flops_of_the_gradients_that_are_computed(name, compiled):
    model, rate, rules = BUDGETS[name]
    x = torch.randn(2, next(model.parameters()).shape[1], 8, 8)
    chosen = ssprop_fx.Policy(drop_rate=rate, schedule={"kind": "constant"}, rules=rules)
    if compiled:
        torch._dynamo.reset()
        made = torch.compile(model, backend="ssprop", options={"inner": "aot_eager", "policy": chosen})
    else:
        made = ssprop_fx.transform(model, chosen)
    made(x).square().mean().backward()
    report = ssprop_fx.inspect(made)
    asked = 0.0
    for row in report.rows:
        for call in report.calls[row.layer]:
            of_input, of_weight = call.needs
            asked += call.forward_flops() * (of_input * (row.gradients == "weight" or 1 - rate) + of_weight * (1 - rate))
    assert report.flops_now == pytest.approx(asked, rel=0.02)
