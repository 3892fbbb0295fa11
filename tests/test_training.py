"""C5 and C9: what training scripts do around a model works on the transformed model, on the compiled one, and on both at once."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ssprop_fx
from ssprop_fx import Policy
from ssprop_fx.transform import transformation_of


def policy(rate=0.5, **contents):
    return Policy(**({"drop_rate": rate, "round_to": 1, "schedule": {"kind": "constant"}} | contents))


def zero_rows(grad):
    """Output channels whose gradient is zero."""
    return int((grad.flatten(1).abs().sum(1) == 0).sum())


# --- copies ---------------------------------------------------------------------------------------------------


class Padded(nn.Conv2d):
    """A convolution module that calls the function itself."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
def test_copies_refer_to_the_tables_own_rows_and_keep_their_names(copied):
    original = nn.Sequential(nn.Conv2d(3, 8, 3), Padded(8, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Flatten(), nn.Linear(512, 8))
    rules = [{"layers": "1", "drop_rate": 0.75}, {"layers": "4", "kind": "linear", "drop_rate": 0.25}]
    model = ssprop_fx.transform(original, policy(rules=rules))
    other = copied(model)
    other(torch.randn(2, 3, 8, 8)).square().sum().backward()
    sites, others = transformation_of(model).sites, transformation_of(other).sites
    assert list(others) == list(sites) == ["0", "1", "2", "4"]
    assert all(others[name].spec is site.spec for name, site in sites.items())
    assert [zero_rows(other[i].weight.grad) for i in (0, 1, 4)] == [4, 6, 2]


# --- front ends -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, ins, outs):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(ins, outs, 3, padding=1), nn.GroupNorm(2, outs)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class Net(nn.Module):
    """Blocks that may be computed again in the backward pass.

    Args:
        reentrant: of ``checkpoint``; None for none.
    """

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.reentrant = nn.Conv2d(3, 8, 3), reentrant
        self.blocks = nn.ModuleList((Block(8, 8), Block(8, 16)))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


def eager(model, rule):
    return ssprop_fx.transform(model, rule)


def both(model, rule):
    return torch.compile(ssprop_fx.transform(model, rule), backend="ssprop", options={"inner": "aot_eager"})


def backend(model, rule):
    return torch.compile(model, backend="ssprop", options={"inner": "aot_eager", "policy": rule})


front_ends = pytest.mark.parametrize("front_end", [eager, both, backend])
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3])
SPARSE = {"stem.weight": 4, "blocks.0.conv.weight": 4, "blocks.1.conv.weight": 8}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_of(model, images=IMAGES, labels=LABELS):
    return F.cross_entropy(model(images), labels)


def taken(model):
    """Gradients by the names of the user's model; they are reset."""
    grads = {n.removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return grads


def gradients(model, images=IMAGES, labels=LABELS):
    loss_of(model, images, labels).backward()
    return taken(model)


def assert_close(got, expected, rtol=1e-4):
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        assert (got[name] is None) == (grad is None), name
        if grad is not None:
            scale = float(grad.abs().max())
            torch.testing.assert_close(got[name], grad, rtol=rtol, atol=rtol * scale + 1e-9, msg=lambda m, n=name: f"{n}: {m}")


def assert_sparse(grads):
    assert {n: zero_rows(grads[n]) for n in SPARSE} == SPARSE


# --- precision ---------------------------------------------------------------------------------------------------


@front_ends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scaled_autocast_step_trains_and_an_overflow_is_skipped(front_end, dtype):
    model = front_end(Net(), policy())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)

    def step(images):
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model, images)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grads = taken_without_reset(model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return grads, not all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))

    grads, moved = step(IMAGES)
    assert moved
    assert_sparse(grads)
    assert all(g.dtype == torch.float32 for g in grads.values())
    poisoned = IMAGES.clone()
    poisoned[1, 0, 3, 3] = float("inf")
    _, moved = step(poisoned)
    assert not moved
    assert scaler.get_scale() == 2.0**7
    assert step(IMAGES)[1]


def taken_without_reset(model):
    return {n.removeprefix("_orig_mod."): p.grad.clone() for n, p in model.named_parameters()}


@front_ends
def test_autocast_gradients_are_the_dense_ones_less_the_dropped_channels(front_end):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(Net())
        got = gradients(front_end(Net(), policy(0.0, rules=[{"layers": "stem", "drop_rate": 0.5}])))
    kept = got["stem.bias"] != 0
    assert kept.sum() == 4
    for name in ("stem.weight", "stem.bias"):
        expected[name][~kept] = 0
    assert_close(got, expected, rtol=2e-2)


# --- accumulation, retained graphs, checkpoints ------------------------------------------------------------------


@front_ends
def test_accumulated_gradients_are_the_sum(front_end):
    model = front_end(Net(), policy())
    parts = [gradients(model, IMAGES[i : i + 2], LABELS[i : i + 2]) for i in (0, 2)]
    for i in (0, 2):
        loss_of(model, IMAGES[i : i + 2], LABELS[i : i + 2]).backward()
    assert_close(taken(model), {n: parts[0][n] + parts[1][n] for n in parts[0]}, rtol=1e-6)


@front_ends
def test_a_retained_graph_gives_the_same_gradients_again(front_end):
    model = front_end(Net(), policy())
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    once = taken(model)
    assert_sparse(once)
    loss.backward()
    assert_close(taken(model), once, rtol=1e-6)


@front_ends
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_give_the_gradients_of_plain_ones(front_end, reentrant):
    expected = gradients(eager(Net(), policy()))
    assert_sparse(expected)
    model = front_end(Net(reentrant), policy())
    for _ in range(2):
        assert_close(gradients(model), expected)
    assert ssprop_fx.inspect(model, IMAGES).coverage == 1.0


# --- what is trained ---------------------------------------------------------------------------------------------


@front_ends
def test_frozen_layers_get_no_gradient_and_can_be_thawed(front_end):
    net = Net()
    net.stem.requires_grad_(False)
    net.blocks[0].conv.weight.requires_grad_(False)
    model = front_end(net, policy())
    grads = gradients(model)
    assert grads["stem.weight"] is grads["stem.bias"] is grads["blocks.0.conv.weight"] is None
    assert zero_rows(grads["blocks.0.conv.bias"].unsqueeze(1)) == 4
    assert zero_rows(grads["blocks.1.conv.weight"]) == 8
    net.requires_grad_(True)
    if front_end is eager or compiled_code_notices_thawing():
        assert_sparse(gradients(model))


def compiled_code_notices_thawing():
    """Whether plain ``torch.compile`` does; older releases go on without the parameter's gradient."""
    net = nn.Conv2d(3, 4, 3).requires_grad_(False)
    run, x = torch.compile(net, backend="aot_eager"), torch.ones(1, 3, 8, 8, requires_grad=True)
    run(x).sum().backward()
    net.requires_grad_(True)
    run(x).sum().backward()
    return net.weight.grad is not None


@pytest.mark.parametrize("optimizer_first", [True, False])
@front_ends
def test_an_optimizer_made_before_or_after_trains_the_model(front_end, optimizer_first):
    net = Net()
    if optimizer_first:
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
    model = front_end(net, policy())
    if not optimizer_first:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(5):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert torch.equal(net(IMAGES), model(IMAGES))


@pytest.mark.parametrize("front_end", [eager, both])
def test_an_ema_copy_averages_evaluates_and_is_sparse(front_end):
    model = eager(Net(), policy())
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    trained = model if front_end is eager else torch.compile(model, backend="ssprop", options={"inner": "aot_eager"})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    average.update_parameters(model)
    first = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss_of(trained).backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update_parameters(model)
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p, (first[name] + dict(model.named_parameters())[name]) / 2)
    assert type(average.module) is Net
    assert_sparse(gradients(average.module))
    assert average.eval()(IMAGES).isfinite().all()


@front_ends
def test_functional_call_trains_the_tensors_that_it_is_given(front_end):
    net = Net()
    other = {n: (p.detach() * 1.1).requires_grad_() for n, p in net.named_parameters()}
    if front_end is eager:
        model = eager(net, policy())
        output = torch.func.functional_call(model, other, (IMAGES,))
    else:
        inner = eager(net, policy()) if front_end is both else net
        options = {"inner": "aot_eager"} | ({"policy": policy()} if front_end is backend else {})
        call = torch.compile(lambda t, x: torch.func.functional_call(inner, t, (x,)), backend="ssprop", options=options)
        output = call(other, IMAGES)
    F.cross_entropy(output, LABELS).backward()
    assert all(p.grad is None for p in net.parameters())
    assert_sparse({n: t.grad for n, t in other.items()})
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(other[name])
    assert_close({n: t.grad for n, t in other.items()}, gradients(eager(net, policy())))


# --- gradient penalties ------------------------------------------------------------------------------------------


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, groups=2)

    def forward(self, x):
        return self.second(F.softplus(self.first(x))).square().sum((1, 2, 3))


def penalty(model, x):
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


class MaskedConv(torch.autograd.Function):
    """The oracle, differentiable twice: a dense convolution whose output's gradient loses all but its largest channels."""

    @staticmethod
    def forward(ctx, output, keep, groups):
        ctx.keep, ctx.groups = keep, groups
        return output.clone()

    @staticmethod
    def backward(ctx, grad):
        score = grad.detach().abs().mean((0, 2, 3)).view(ctx.groups, -1)
        mask = torch.zeros_like(score).scatter_(1, score.topk(ctx.keep, 1).indices, 1.0)
        return grad * mask.view(1, -1, 1, 1), None, None


def test_a_gradient_penalty_is_that_of_the_oracle():
    net = Critic().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)

    def oracle(x):
        hidden = MaskedConv.apply(net.first(x), 2, 1)
        return MaskedConv.apply(net.second(F.softplus(hidden)), 1, 2).square().sum((1, 2, 3))

    wanted = torch.autograd.grad(penalty(oracle, x), list(net.parameters()), allow_unused=True)
    got = torch.autograd.grad(penalty(ssprop_fx.transform(net, policy(0.7)), x), list(net.parameters()), allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    dense = torch.autograd.grad(penalty(net, x), list(net.parameters()), allow_unused=True)
    assert not torch.allclose(got[0], dense[0])


@pytest.mark.parametrize("front_end", [both, backend])
def test_a_compiled_gradient_penalty_is_refused_clearly(front_end):
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="double backward"):
        penalty(front_end(Critic(), policy()), x).backward()


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="newer releases trace autograd.grad")
def test_a_gradient_penalty_inside_of_compiled_code_is_refused_clearly():
    net, x = Critic(), torch.randn(2, 3, 8, 8, requires_grad=True)
    with torch._dynamo.config.patch(trace_autograd_ops=True), pytest.raises(Exception, match="double backward"):
        torch.compile(penalty, backend="ssprop", options={"policy": policy(), "inner": "aot_eager"})(net, x).backward()


@pytest.mark.skipif(torch.__version__ < (2, 14), reason="operators could not be differentiated by traced torch.func before")
def test_torch_func_inside_of_compiled_code_wants_the_model_transformed_first():
    torch._dynamo.reset()
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(2, 3, 8, 8)
    parameters = {k: v.detach() for k, v in net.named_parameters()}

    def of(model):
        def loss(p, x):
            return torch.func.functional_call(model, p, (x,)).square().sum()

        return lambda p, x: torch.func.grad(loss)(p, x)

    options = {"inner": "aot_eager"}
    with pytest.raises(Exception, match=r"call ssprop_fx\.transform"):
        torch.compile(of(net), backend="ssprop", options={**options, "policy": policy()})(parameters, x)
    model = ssprop_fx.transform(net, policy())
    got = torch.compile(of(model), backend="ssprop", options=options)(parameters, x)
    torch.testing.assert_close(got, of(model)(parameters, x))


@pytest.mark.parametrize("front_end", [both, backend])
def test_forward_mode_inside_of_compiled_code_is_refused(front_end):
    """The operator would have a tangent of zero."""
    torch._dynamo.reset()
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(2, 3, 8, 8)
    model = ssprop_fx.transform(net, policy()) if front_end is both else net
    options = {"inner": "aot_eager"} if front_end is both else {"inner": "aot_eager", "policy": policy()}
    run = torch.compile(lambda x: torch.func.jvp(model, (x,), (x,)), backend="ssprop", options=options)
    with pytest.raises(Exception, match=r"jvp.*leave it out of torch\.compile"):
        run(x)
