"""C5: the transformed model is the user's model, with another backward pass, and nothing else."""

import copy
import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transforming import assert_sparse, image, policy, ready, same, small, step, zero_rows

import ssprop_fx
from ssprop_fx import Policy, PolicyError, TransformError, survey
from ssprop_fx.coverage import measure
from ssprop_fx.transform import transform, transformation_of

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*", "ignore:.*torch.jit.*")


class Custom(nn.Module):
    """Attributes of many kinds, and methods that use them."""

    registry: list = []  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 1) for _ in range(2)])
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.last = self.blocks[-1]
        self.forms = {"stem": self.stem, "names": ["a", "b"]}
        self.lock = threading.Lock()
        self.calls = 0
        self.anchor = torch.arange(3.0)

    def forward(self, x, double=False):
        self.calls += 1
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = x + block(x).relu()
        return x * self.scale * (2 if double else 1)

    def describe(self):
        return f"{type(self).__name__} called {self.calls} times"


def test_class_keys_attributes_and_methods_are_the_same():
    original = Custom()
    model = transform(original, policy())
    assert type(model) is Custom
    assert list(model.state_dict()) == list(original.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in original.named_modules()]
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert repr(model) == repr(original)
    assert model.lock is original.lock
    model(image(), double=True)
    assert model.describe() == "Custom called 1 times"
    assert original.describe() == "Custom called 0 times"
    assert set(vars(original)) < set(vars(model))


def test_parameters_and_buffers_are_shared_and_modules_are_not():
    original = Custom()
    model = transform(original, policy())
    for (a, p), (b, q) in zip(model.named_parameters(), original.named_parameters(), strict=True):
        assert a == b
        assert p is q
    for (a, p), (b, q) in zip(model.named_buffers(), original.named_buffers(), strict=True):
        assert a == b
        assert p is q
    assert not {id(m) for m in model.modules()} & {id(m) for m in original.modules()}
    assert model.anchor is original.anchor


def test_references_between_modules_lead_to_the_copies():
    model = transform(Custom(), policy())
    assert model.last is model.blocks[1]
    assert model.forms["stem"] is model.stem
    assert model.forms["names"] == ["a", "b"]


def test_original_still_runs_dense():
    original = ready(small())
    _, before = step(original)
    model = transform(original, policy())
    _, after = step(original)
    assert same(before, after)
    assert_sparse(model)
    assert zero_rows(step(original)[1]["0.weight"]) == 0
    assert "_conv_forward" not in vars(original[0])


def test_forward_is_bit_equal_in_train_and_eval_mode():
    original = ready(small())
    model = transform(original, policy())
    for mode in (True, False):
        state = copy.deepcopy(original.state_dict())
        expected = original.train(mode)(image())
        after = copy.deepcopy(original.state_dict())
        original.load_state_dict(state)
        assert torch.equal(model.train(mode)(image()), expected)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in after.items())  # running statistics too


def test_optimizer_of_either_trains_both():
    original = ready(small())
    model = transform(original, policy())
    optimizer = torch.optim.SGD(original.parameters(), lr=0.1)
    before = original[0].weight.detach().clone()
    model(image()).sum().backward()
    optimizer.step()
    assert not torch.equal(before, original[0].weight)
    assert torch.equal(model(image()), original(image()))


def test_torchvision_resnet18_is_the_same_model_with_sparse_gradients():
    import torchvision

    torch.manual_seed(0)
    original = torchvision.models.resnet18(weights=None)
    model = transform(original, policy(0.8))
    x = image(size=32)
    state = copy.deepcopy(original.state_dict())
    expected, dense = step(original, x)
    original.load_state_dict(state)
    output, sparse = step(model, x)
    assert torch.equal(output, expected)
    assert type(model) is type(original)
    assert list(model.state_dict()) == list(original.state_dict())
    assert zero_rows(sparse["layer4.1.conv2.weight"]) == 512 - int(0.2 * 512 + 1e-6)
    assert zero_rows(dense["layer4.1.conv2.weight"]) == 0
    assert torch.equal(sparse["fc.weight"], dense["fc.weight"])
    assert measure(model, x).coverage == 1.0


def test_zero_rate_makes_the_models_own_call():
    original = ready(small())
    for chosen in (policy(0.0), policy(0.8, schedule={"kind": "constant", "end": 0.0})):
        model = transform(original, chosen)
        original.eval()
        model.eval()
        expected, output = original(image()), model(image())
        assert output.grad_fn.name() == expected.grad_fn.name()
        found, queue = set(), [model[:4](image()).grad_fn]
        while queue:
            node = queue.pop()
            found.add(node.name())
            queue += [n for n, _ in node.next_functions if n is not None]
        assert "ConvolutionBackward0" in found
        assert not any("SparseConvolution" in name for name in found)
        assert same(step(original)[1], step(model)[1])


def test_rate_follows_the_clock_between_steps():
    original = ready(small()).eval()
    chosen = Policy(drop_rate=0.5, round_to=1, schedule={"kind": "bar", "period": 2})
    model = transform(original, chosen)
    _, dense = step(original)
    for t in range(4):
        _, grads = step(model)
        assert same(grads, dense) == (t % 2 == 0)
        chosen.step()


def test_rate_is_the_one_when_the_forward_ran():
    original = ready(small()).eval()
    chosen = Policy(drop_rate=0.5, round_to=1, schedule={"kind": "bar", "period": 2})
    chosen.step()
    model = transform(original, chosen)
    output = model(image())
    chosen.step()
    output.square().sum().backward()
    assert zero_rows(model[0].weight.grad) == 4


def test_hooks_run_on_the_copy():
    original, seen = small(), []
    ready(original)
    conv = original[0]
    conv.register_forward_pre_hook(lambda m, a: seen.append(("pre", m)))
    conv.register_forward_hook(lambda m, a, o: seen.append(("forward", m)))
    conv.register_full_backward_pre_hook(lambda m, g: seen.append(("backward pre", m)))
    conv.register_full_backward_hook(lambda m, gi, go: seen.append(("backward", m)))
    original.register_forward_hook(lambda m, a, o: o * 2)
    model = transform(original, policy())
    output, _ = step(model)
    assert [name for name, _ in seen] == ["pre", "forward", "backward pre", "backward"]
    assert all(m is model[0] for _, m in seen)
    seen.clear()
    assert torch.equal(output, step(original)[0])
    assert all(m is conv for _, m in seen)


def test_hooks_added_later_run_on_the_module_that_they_were_added_to():
    original = ready(small())
    model, seen = transform(original, policy()), []
    handle = model[0].register_forward_hook(lambda m, a, o: seen.append(m))
    original(image())
    assert seen == []
    model(image())
    assert seen == [model[0]]
    handle.remove()
    model(image())
    assert len(seen) == 1


def test_parameter_hooks_see_the_sparse_gradient():
    model, seen = transform(ready(small()), policy()), []
    model[0].weight.register_hook(lambda g: seen.append(zero_rows(g)))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(zero_rows(p.grad)))
    step(model)
    assert seen == [4, 4]


def test_shared_module_is_one_layer_called_twice():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    original = nn.Sequential(conv, nn.ReLU(), conv)
    model = transform(original, policy(0.6))
    assert model[0] is model[2]
    output, sparse = step(model)
    assert torch.equal(output, original(image()))
    assert list(transformation_of(model).sites) == ["0"]
    assert measure(model, image()).calls == {"0": 2}
    assert 0 <= zero_rows(sparse["0.weight"]) < 3  # each call chose for itself


def test_a_rule_for_a_shared_modules_other_name_is_told_its_first():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    original = nn.ModuleDict({"stem": conv, "head": nn.Sequential(conv, nn.ReLU())})
    for pattern in ("head.0", "head.*"):
        with pytest.raises(PolicyError, match=r"'head\.0' is another name of the layer 'stem'.*Nearest: stem\."):
            transform(original, Policy(rules=[{"layers": pattern, "drop_rate": 0.5}]))
    with pytest.raises(PolicyError, match=r"no layer that `layers` matches is of kind depthwise"):
        transform(original, Policy(rules=[{"layers": "*e*", "kind": "depthwise", "drop_rate": 0.5}]))


def test_refuses_a_model_without_convolutions_and_lists_what_it_holds():
    with pytest.raises(TransformError, match=r"Sequential has no convolution.*2 × Linear, 1 × ReLU"):
        transform(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), policy())


def test_refuses_lazy_modules_by_name_and_says_what_to_do():
    with pytest.raises(TransformError, match=r"1 is a lazy module.*forward pass"):
        transform(nn.Sequential(nn.ReLU(), nn.LazyConv2d(8, 3)), policy())


def test_lazy_linear_layers_are_none_of_its_business():
    model = transform(small(), policy())
    ready(model)
    assert_sparse(model)


def test_refuses_scripted_transformed_compiled_and_wrapped_models():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.raises(TransformError, match="scripted or traced"):
        transform(torch.jit.script(model), policy())
    with pytest.raises(TransformError, match="transformed already"):
        transform(transform(model, policy()), policy())
    with pytest.raises(TransformError, match="transformed already"):
        transform(nn.Sequential(transform(model, policy())), policy())
    with pytest.raises(TransformError, match=r"already compiled.*transform first"):
        transform(torch.compile(model), policy())
    inner = nn.Sequential(nn.Conv2d(3, 8, 3))
    inner[0].compile()
    with pytest.raises(TransformError, match="already compiled"):
        transform(inner, policy())
    with pytest.raises(TransformError, match=r"wrapped in DataParallel.*wrap its result"):
        transform(nn.DataParallel(model), policy())


@pytest.mark.parametrize("thing", [nn.Conv2d, lambda x: x, 3, None])
def test_refuses_what_is_no_module(thing):
    with pytest.raises(TransformError, match=r"takes a torch\.nn\.Module") as error:
        transform(thing, policy())
    assert ("on the instance, not on the class" in str(error.value)) == (thing is nn.Conv2d)


def test_refuses_rules_that_match_nothing_and_names_the_nearest():
    with pytest.raises(PolicyError, match=r"blocks\.3.*Nearest: blocks\.[01]"):
        transform(Custom(), policy(rules=[{"layers": "blocks.3", "drop_rate": 0.5}]))
    with pytest.raises(PolicyError, match="conv3d"):
        transform(Custom(), policy(rules=[{"kind": "conv3d", "drop_rate": 0.5}]))
    transform(Custom(), policy(rules=[{"layers": "blocks.3", "drop_rate": 0.5, "optional": True}]))


def test_scripted_part_is_named_and_the_rest_is_rewritten():
    original = nn.Sequential(nn.Conv2d(3, 8, 3), torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1))))
    model = transform(original, policy())
    assert torch.equal(model(image()), original(image()))
    assert_sparse(model)
    report = ssprop_fx.inspect(model)
    assert [r.layer for r in report.rows if not r.rewritten] == ["1.0"]
    assert "scripted" in report["1.0"].reason
    assert measure(model, image()).coverage == 0.5


def test_meta_device_works():
    with torch.device("meta"):
        original = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2))
    model = transform(original, policy())
    output = model(torch.empty(2, 3, 6, 6, device="meta"))
    assert output.shape == (2, 4, 5, 5)
    output.sum().backward()
    assert model[0].weight.grad.shape == (8, 3, 3, 3)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    assert_sparse(model)


@pytest.mark.parametrize("given", [None, {"drop_rate": 0.5}, "file"])
def test_policy_may_be_default_mapping_or_file(given, tmp_path):
    if given == "file":
        (tmp_path / "policy.yaml").write_text("drop_rate: 0.5\n")
        given = str(tmp_path / "policy.yaml")
    model = transform(nn.Sequential(nn.Conv2d(3, 8, 3)), given)
    assert transformation_of(model).policy.drop_rate == (0.8 if given is None else 0.5)


def test_forward_keeps_its_signature():
    """Trainers choose which columns of a data set to pass on by the names of forward's arguments."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, pixels, labels=None, *, scale: float = 1.0):
            return F.conv2d(self.conv(pixels), torch.ones(1, 4, 1, 1)) * scale

    model = ssprop_fx.transform(Root(), Policy())
    assert inspect.signature(model.forward) == inspect.signature(Root().forward)
    assert inspect.signature(copy.deepcopy(model).forward) == inspect.signature(Root().forward)


def test_a_policy_tells_the_rates_of_the_layers_that_were_rewritten_and_no_others():
    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, dtype=torch.complex64), torch.jit.script(Scripted()))
    chosen = policy()
    left = transformation_of(transform(model, chosen)).skipped
    assert set(left) == {"1", "2.conv"}
    assert chosen.drop_rates() == {"0": 0.5}


def test_the_code_of_each_module_is_looked_at_once(monkeypatch):
    asked = []
    ask = survey.may_call_convolution
    monkeypatch.setattr(survey, "may_call_convolution", lambda module, *known: asked.append(module) or ask(module, *known))
    original = ready(small())
    transform(original, policy())
    assert asked == list(original.modules())
