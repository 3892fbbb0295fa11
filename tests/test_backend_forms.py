"""C3 and C9 through the backend: every form of convolution and every setting, compiled, gives the gradients of ``transform``."""

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import ssprop_fx
from ssprop_fx import Policy, _compat
from ssprop_fx.records import records_of, state_of


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), padding="same")


class General(Functional):
    def forward(self, x):
        return torch.convolution(x, self.weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.head(self.head(x).relu())


FORMS = {
    "1d": (lambda: nn.Conv1d(4, 8, 3, stride=2), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 8, 3, dilation=2), (2, 4, 9, 9)),
    "3d": (lambda: nn.Conv3d(4, 8, 2, bias=False), (2, 4, 4, 5, 4)),
    "pointwise": (lambda: nn.Conv2d(4, 8, 1), (2, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "depthwise, two inputs a group": (lambda: nn.Conv2d(8, 4, 3, groups=4), (2, 8, 5, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 8, 3, stride=2, output_padding=1), (2, 4, 5)),
    "transposed 2d grouped": (lambda: nn.ConvTranspose2d(4, 8, 3, groups=2), (2, 4, 5, 5)),
    "transposed 3d depthwise": (lambda: nn.ConvTranspose3d(4, 4, 2, groups=4), (2, 4, 3, 3, 3)),
    "unbatched": (lambda: nn.Conv2d(4, 8, 3), (4, 6, 6)),
    "unbatched transposed": (lambda: nn.ConvTranspose2d(4, 8, 3), (4, 6, 6)),
    "same, even kernel": (lambda: nn.Conv2d(4, 8, (4, 3), padding="same", dilation=(1, 2)), (2, 4, 7, 7)),
    "reflect": (lambda: nn.Conv2d(4, 8, 3, padding=2, padding_mode="reflect"), (2, 4, 7, 7)),
    "circular": (lambda: nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular"), (2, 4, 7, 7)),
    "functional, computed weight": (Functional, (2, 4, 6, 6)),
    "torch.convolution": (General, (2, 4, 6, 6)),
    "called twice": (Twice, (2, 4, 6, 6)),
}


def policy(**changes):
    return Policy(**({"drop_rate": 0.5, "round_to": 1, "schedule": {"kind": "constant"}} | changes))


def ours(model, chosen, inner="aot_eager", **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="ssprop", options={"policy": chosen, "inner": inner, **options})


def gradients(model, x):
    """The output, and the gradients of input and parameters."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    output = model(x)
    torch.manual_seed(7)
    output.backward(torch.randn_like(output))
    found = [x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    return [output.detach(), *found]


def assert_same(got, expected, tolerance=1e-10):
    for a, b in zip(got, expected, strict=True):
        if b is None:
            assert a is None
        else:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


def model_and_input(form, dtype=torch.float64):
    build, shape = FORMS[form]
    torch.manual_seed(0)
    return nn.Sequential(build(), nn.Tanh()).to(dtype), torch.randn(shape, dtype=dtype)


def assert_sparse(found):
    """Some parameter has rows that got no gradient, which a dense backward never leaves."""
    assert any((g == 0).any() for g in found[2:] if g is not None)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_compiled_equals_transform(form):
    model, x = model_and_input(form)
    expected = gradients(ssprop_fx.transform(model, policy()), x)
    got = gradients(ours(model, policy()), x)
    assert torch.equal(got[0], expected[0])
    assert_same(got, expected)
    if form not in ("called twice", "functional, computed weight"):  # rows of which get the other calls' or the mean's share
        assert_sparse(got)


@pytest.mark.parametrize(
    "changes",
    [
        {"criterion": "l2"},
        {"criterion": "taylor"},
        {"gradients": "weight"},
        {"round_to": 4, "drop_rate": 0.6},
        {"round_to": "auto", "drop_rate": 0.7},
        {"criterion": "taylor", "gradients": "weight"},
    ],
    ids=str,
)
def test_every_setting_compiled_equals_transform(changes):
    for form in ("2d", "depthwise", "transposed 2d grouped"):
        model, x = model_and_input(form)
        expected = gradients(ssprop_fx.transform(model, policy(**changes)), x)
        got = gradients(ours(model, policy(**changes)), x)
        assert_same(got, expected)
        assert_sparse(got)


def test_random_compiled_chooses_anew_each_time():
    model, x = model_and_input("2d")
    run, seen = ours(model, policy(criterion="random")), set()
    torch.manual_seed(0)
    for _ in range(8):
        model.zero_grad()
        run(x).sum().backward()
        assert (model[0].bias.grad == 0).sum() == 4
        seen.add(tuple((model[0].bias.grad == 0).tolist()))
    assert len(seen) > 4  # of 70 that there are


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_frozen_tensors_compiled(frozen):
    model, x = model_and_input("2d")
    if frozen == "input":
        model = nn.Sequential(nn.Identity(), *model)
        x0 = x

        def run(m):
            m.zero_grad()
            m(x0).square().sum().backward()
            return [p.grad for p in m.parameters()]

    else:
        getattr(model[0], frozen).requires_grad_(False)

        def run(m):
            return gradients(m, x)

    expected = run(ssprop_fx.transform(model, policy()))
    model.zero_grad()
    assert_same(run(ours(model, policy())), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_and_layouts_compiled(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)).to(dtype)
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8, dtype=dtype).to(memory_format=torch.channels_last)
    expected = gradients(ssprop_fx.transform(model, policy()), x)
    got = gradients(ours(model, policy()), x)
    assert torch.equal(got[0], expected[0])
    assert_same(got, expected, 1e-5 if dtype == torch.float32 else 2e-2)
    assert got[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_changing_batch_sizes(inner):
    model, _ = model_and_input("2d")
    chosen = policy(schedule={"kind": "bar", "period": 2})
    run, same = ours(model, chosen, inner), policy(schedule={"kind": "bar", "period": 2})
    transformed = ssprop_fx.transform(model, same)
    for batch in (2, 3, 5, 4):
        x = torch.randn(batch, 4, 9 + batch, 9, dtype=torch.float64)
        for _ in range(2):
            assert_same(gradients(run, x), gradients(transformed, x))
            chosen.step()
            same.step()
    assert len(records_of(model)) <= 3  # static, dynamic batch, dynamic height


def test_changing_sizes_of_a_strided_pointwise_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 1, stride=2), nn.Conv2d(16, 8, 1)).to(memory_format=torch.channels_last)
    chosen = policy(drop_rate=0.75)
    run, transformed = ours(model, chosen), ssprop_fx.transform(model, chosen)
    for batch, size in ((2, 9), (3, 9), (5, 12), (16, 33), (4, 65)):
        x = torch.randn(batch, 4, size, size + 1).to(memory_format=torch.channels_last)
        assert_same(gradients(run, x), gradients(transformed, x), 1e-4)


class ToSize(nn.Module):
    """The way up of a U-Net."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1)

    def forward(self, x):
        return self.up(self.down(x), output_size=x.shape[2:])


class ByWidth(nn.Module):
    """Stride, padding and dilation that follow from the width."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

    def forward(self, x):
        size = x.shape[-1]
        return F.conv2d(x, self.weight, None, size // 4, (size // 2, size // 3), size // 8)


class PerSample(nn.Module):
    """Kernels of each sample's own, as groups."""

    def __init__(self):
        super().__init__()
        self.weight, self.gate = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Linear(3, 1)

    def forward(self, x):
        n = x.shape[0]
        kernels = self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None, None] * self.weight
        return F.conv2d(x.flatten(0, 1)[None], kernels.flatten(0, 1), groups=n).unflatten(1, (n, 6))


class PerSampleDepthwise(PerSample):
    def forward(self, x):
        n = x.shape[0]
        kernels = self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None, None] * self.weight[:3, :1]
        return F.conv2d(x.flatten(0, 1)[None], kernels.flatten(0, 1), groups=3 * n).unflatten(1, (n, 3))


@pytest.mark.parametrize("dynamic", [None, True], ids=["found dynamic", "dynamic"])
@pytest.mark.parametrize("make", [ToSize, ByWidth, PerSample, PerSampleDepthwise])
@pytest.mark.parametrize("front_end", ["backend", "transform, then backend"])
def test_a_geometry_that_depends_on_the_size_of_the_input(make, dynamic, front_end):
    model, chosen = make().double(), policy()
    torch._dynamo.reset()
    eager = ssprop_fx.transform(model, chosen)
    options = {"inner": "aot_eager", **({"policy": chosen} if front_end == "backend" else {})}
    run = torch.compile(model if front_end == "backend" else eager, backend="ssprop", options=options, dynamic=dynamic)
    for shape in ((4, 3, 16, 16), (4, 3, 16, 16), (3, 3, 17, 17), (5, 3, 24, 24)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_same(gradients(run, x), gradients(eager, x))


def test_a_policy_file_has_one_clock_for_each_model(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("drop_rate: 0.5\nround_to: 1\nschedule: {kind: constant, clock: optimizer, warmup: 2}\n")
    for _ in range(2):
        model = nn.Sequential(nn.Conv2d(3, 8, 3))
        run, optimizer = ours(model, str(path)), torch.optim.SGD(model.parameters(), 0.01)
        dropped = []
        for _ in range(4):
            optimizer.zero_grad()
            run(torch.ones(2, 3, 6, 6)).square().sum().backward()
            dropped.append(int((model[0].bias.grad == 0).sum()))
            optimizer.step()
        assert dropped == [0, 0, 4, 4]


def test_two_policies_compile_one_model_apart():
    model, x = model_and_input("2d")
    first, second = policy(), policy(drop_rate=0.75)
    torch._dynamo.reset()
    runs = [torch.compile(model, backend="ssprop", options={"policy": p, "inner": "aot_eager"}) for p in (first, second)]
    for _ in range(2):
        assert [(gradients(run, x)[3] == 0).sum().item() for run in runs] == [4, 6]


def test_two_instances_of_a_class_follow_their_own_names():
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, padding=1)
            self.out = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.out(self.conv(x).relu())

    torch.manual_seed(0)
    model = nn.Sequential(Stem(), Stem()).double()
    chosen = policy(rules=[{"layers": "1.conv", "drop_rate": 0.75}])
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    got = gradients(ours(model, chosen), x)
    assert (got[3] == 0).sum() == 4
    assert (got[7] == 0).sum() == 6
    ((_, record),) = records_of(model)
    assert record.layers() == {"0.conv", "0.out", "1.conv", "1.out"}


@pytest.mark.parametrize("first", [lambda model, _: model, ssprop_fx.transform], ids=["backend", "transform"])
def test_a_selective_checkpoint_saves_convolutions(first):
    def choose(context, operator, *args, **kwargs):
        saved = operator is torch.ops.aten.convolution.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    class Saving(nn.Sequential):
        def forward(self, x):
            contexts = functools.partial(create_selective_checkpoint_contexts, choose)
            return checkpoint(super().forward, x, use_reentrant=False, context_fn=contexts)

    torch.manual_seed(0)
    chosen, x = policy(), torch.randn(2, 3, 8, 8)
    model = first(Saving(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Tanh()), chosen)
    torch._dynamo.reset()
    options = {"inner": "aot_eager"} | ({} if first is ssprop_fx.transform else {"policy": chosen})
    torch.compile(model, backend="ssprop", options=options)(x).square().sum().backward()
    (record,) = state_of(chosen).records
    made = {str(node.target) for node in record.backward.graph.nodes if node.op == "call_function"}
    assert {"aten.tanh.default", "ssprop.conv_backward.default"} <= made  # made again; of what was saved
    assert "aten.convolution.default" not in made


def test_checkpointed_blocks_compiled():
    class Checkpointed(nn.Module):
        def __init__(self, use):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.use = nn.Conv2d(4, 8, 3), use
            self.block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))

        def forward(self, x):
            x = self.stem(x)
            return checkpoint(self.block, x, use_reentrant=False) if self.use else self.block(x)

    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    expected = gradients(ssprop_fx.transform(Checkpointed(False).double(), policy()), x)
    got = gradients(ours(Checkpointed(True).double(), policy()), x)
    assert_same(got, expected)
    assert_sparse(got)


def test_autocast_compiled_is_that_of_transform():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(ssprop_fx.transform(model, policy()), x)
        got = gradients(ours(model, policy()), x)
    assert got[0].dtype == torch.bfloat16
    assert torch.equal(got[0], expected[0])
    assert_same(got, expected, 2e-2)
    assert_sparse(got)


def test_accumulated_and_retained_gradients_compiled():
    model, x = model_and_input("2d")
    transformed, run = ssprop_fx.transform(model, policy()), ours(model, policy())
    parts = [gradients(transformed, x * s)[2:] for s in (1, 2)]
    model.zero_grad()
    for scale in (1, 2):
        output = run(x * scale)
        torch.manual_seed(7)
        output.backward(torch.randn_like(output), retain_graph=True)
    for p, a, b in zip(model.parameters(), *parts, strict=True):
        torch.testing.assert_close(p.grad, a + b, rtol=1e-10, atol=1e-10)


def test_several_forwards_before_their_backwards_compiled():
    model, x = model_and_input("2d")
    transformed, run = ssprop_fx.transform(model, policy()), ours(model, policy())
    parts = [gradients(transformed, x * s)[2:] for s in (1, 2)]
    model.zero_grad()
    outputs = [run(x), run(x * 2)]
    for output in reversed(outputs):
        torch.manual_seed(7)
        output.backward(torch.randn_like(output))
    for p, a, b in zip(model.parameters(), *parts, strict=True):
        torch.testing.assert_close(p.grad, a + b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor", "random"])
def test_non_finite_gradients_come_through_compiled_code(criterion):
    model, x = model_and_input("2d")
    run = ours(model, policy(drop_rate=0.8, criterion=criterion))
    for value in (float("inf"), float("nan")):
        model.zero_grad()
        output = run(x)
        grad = torch.ones_like(output)
        grad[1, 5, 2, 2] = value
        output.backward(grad)
        assert not model[0].bias.grad[5].isfinite()
        assert not model[0].weight.grad[5].isfinite().all()


def test_functional_layers_have_their_owners_name():
    model, x = model_and_input("functional, computed weight")
    gradients(ours(model, policy(rules=[{"layers": "0#conv2d.0", "drop_rate": 0.25}])), x)
    ((_, record),) = records_of(model)
    assert record.layers() == {"0#conv2d.0"}
    assert [d.settings.drop_rate for d in record.decisions] == [0.25]


def test_functional_layers_have_their_owners_name_after_a_graph_break():
    class Broken(Functional):
        def forward(self, x):
            x = x + 1
            torch._dynamo.graph_break()
            return super().forward(x)

    torch.manual_seed(0)
    model, x = nn.Sequential(Broken()).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    gradients(ours(model, policy(rules=[{"layers": "0#conv2d.0", "drop_rate": 0.25}])), x)
    layers = {d.convolution.layer: d.settings.drop_rate for _, record in records_of(model) for d in record.decisions}
    assert layers == {"0#conv2d.0": 0.25}


def test_deepcopied_model_compiles_on_its_own():
    model, x = model_and_input("2d")
    chosen = policy()
    expected = gradients(ours(model, chosen), x)
    other = copy.deepcopy(model)
    got = gradients(torch.compile(other, backend="ssprop", options={"policy": chosen, "inner": "aot_eager"}), x)
    assert_same(got, expected)


@pytest.mark.skipif(not _compat.constants_of_objects, reason="Dynamo traces into the policy, which breaks the graph")
@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_functional_convolutions_of_a_transformed_model_need_no_eager_call_first(inner):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.other = nn.Parameter(torch.randn(8, 4, 3, 3)), nn.Parameter(torch.randn(8, 8, 1, 1))

        def forward(self, x):
            return F.conv2d(F.conv2d(x, self.weight).tanh(), self.other)

    torch.manual_seed(0)
    original, x = Functional().double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    chosen = policy(rules=[{"layers": "#conv2d.1", "drop_rate": 0.25}])
    expected = gradients(ssprop_fx.transform(original, chosen), x)
    model = ssprop_fx.transform(original, chosen)
    got = gradients(torch.compile(model, backend="ssprop", options={"inner": inner}, fullgraph=True), x)
    assert_same(got, expected)
    assert {row.layer: row.drop_rate for row in ssprop_fx.inspect(model).rows}["#conv2d.1"] == 0.25


def test_inductors_options_go_to_inductor_and_to_nobody_else():
    model, x = model_and_input("2d")
    with pytest.raises(Exception, match=r"no_such_option.* is not known.*an option of Inductor"):
        gradients(ours(model, policy(), "inductor", no_such_option=True), x)
    with pytest.raises(Exception, match=r"polcy.* is not known.*nearest: policy"):
        gradients(ours(model, policy(), "aot_eager", polcy=policy()), x)
    with pytest.raises(Exception, match=r"max_autotune: options of Inductor"):
        gradients(ours(model, policy(), "aot_eager", max_autotune=True), x)


def test_names_of_inductors_options_may_have_dashes():
    model, x = model_and_input("2d")
    assert_same(gradients(ours(model, policy(), "inductor", **{"max-autotune": False}), x), gradients(ours(model, policy()), x))


def test_random_channels_are_others_each_time_in_inductors_code():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 64, 3)), torch.randn(2, 3, 6, 6)
    run, chosen = ours(model, policy(criterion="random"), "inductor"), []
    for seed in (0, 1, 2, 0):
        model.zero_grad()
        torch.manual_seed(seed)
        run(x).square().sum().backward()
        chosen.append(tuple((model[0].weight.grad.flatten(1).abs().sum(1) > 0).tolist()))
    assert [sum(channels) for channels in chosen] == [32] * 4
    assert len(set(chosen)) == 3
    assert chosen[0] == chosen[3]


def test_a_compiled_part_may_begin_with_a_pool():
    torch.manual_seed(0)
    model = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3))
    inputs = [torch.randn(2, 8, 12, 12).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0])
    for run, x in zip((ours(model, policy(), "inductor"), ssprop_fx.transform(model, policy())), inputs, strict=True):
        run(x).square().mean().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_a_number_that_becomes_symbolic_is_no_failure():
    class Annealed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.share = nn.Conv2d(3, 8, 3), 0.1

        def forward(self, x):
            return torch.nn.functional.dropout(self.conv(x), self.share, self.training) * self.share

    model = Annealed()
    run = ours(model, policy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model.share in (0.1, 0.2, 0.3):
            model.zero_grad()
            run(torch.randn(2, 3, 6, 6)).sum().backward()
            assert (model.conv.weight.grad.flatten(1).abs().sum(1) == 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"criterion": "taylor"}, {"gradients": "weight"}, {"round_to": "auto"}], ids=str)
def test_inductor_equals_transform_on_every_form(changes):
    for form in FORMS:
        model, x = model_and_input(form)
        expected = gradients(ssprop_fx.transform(model, policy(**changes)), x)
        assert_same(gradients(ours(model, policy(**changes), "inductor"), x), expected, 1e-9)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Conv1d(4, 8, 3), (4, 9)),
        (lambda: nn.Conv2d(4, 8, 3, groups=2), (4, 6, 6)),
        (lambda: nn.Conv2d(4, 8, 3), (1, 4, 6, 6)),
        (lambda: nn.Conv2d(4, 8, (2, 3), padding="same"), (4, 6, 6)),
        (lambda: nn.Conv2d(4, 8, (2, 3), padding="same"), (1, 4, 6, 6)),
        (lambda: nn.ConvTranspose2d(4, 8, 3), (4, 5, 5)),
    ],
    ids=["1d", "2d grouped", "batched", "same", "same, batched", "transposed"],
)
def test_a_convolution_under_vmap_equals_transform(build, shape):
    class Each(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = build()

        def forward(self, x):
            return torch.vmap(lambda sample: self.conv(sample).tanh())(x)

    torch.manual_seed(0)
    model, x = Each().double(), torch.randn(3, *shape, dtype=torch.float64)
    expected = gradients(ssprop_fx.transform(model, policy()), x)
    assert_same(gradients(ours(model, policy()), x), expected)
    assert not torch.allclose(gradients(model, x)[2], expected[2])
