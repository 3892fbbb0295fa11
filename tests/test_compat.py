"""A canary for each private name in ``ssprop_fx/_compat.py``: what fails here says what PyTorch has changed."""

import sys
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from ssprop_fx import _compat


def test_function_modes_are_counted():
    class Mode(torch.overrides.TorchFunctionMode):
        pass

    before = _compat.function_modes()
    with Mode():
        assert _compat.function_modes() == before + 1


def test_functorch_is_seen_inside_its_transforms_only():
    seen = []
    torch.func.grad(lambda x: (seen.append(_compat.functorch_active()), x.sum())[1])(torch.ones(2))
    assert seen == [True]
    assert not _compat.functorch_active()


def test_tracing_is_seen_by_the_tensors_and_by_the_compiler():
    real = torch.ones(2)
    assert not _compat.is_traced(real)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(real)
    assert _compat.is_traced(fake)
    seen = []

    def noted(graph, inputs):
        seen.append(_compat.is_traced(real))
        return graph

    torch.compile(lambda x: x + 1, backend=noted)(real)
    assert seen == [True]
    assert not _compat.is_traced(real)


def test_dual_numbers_are_seen_inside_of_forward_mode_only():
    assert not _compat.forward_ad_active()
    with forward_ad.dual_level():
        assert _compat.forward_ad_active()
    seen = []
    torch.func.jvp(lambda x: (seen.append(_compat.forward_ad_active()), x)[1], (torch.ones(2),), (torch.ones(2),))
    assert seen == [True]


class Watched(torch.autograd.Function):
    """Notes, in its backward pass, what ``question`` answers."""

    @staticmethod
    def forward(ctx, x, question, answers):
        ctx.question, ctx.answers = question, answers
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        ctx.answers.append(ctx.question(grad))
        return grad * 2, None, None


def test_a_batch_of_gradients_is_recognised():
    x, answers = torch.ones(3, requires_grad=True), []
    output = Watched.apply(x, _compat.in_batch_of_gradients, answers)
    torch.autograd.grad(output, x, torch.ones(3), retain_graph=True)
    torch.autograd.grad(output, x, torch.ones(2, 3), is_grads_batched=True)
    assert answers == [False, True]


def test_a_backward_pass_knows_whether_its_graph_is_kept():
    x, answers = torch.ones(3, requires_grad=True), []
    loss = Watched.apply(x, lambda grad: _compat.keeps_graph(), answers).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert answers == [True, False]


def test_a_backward_pass_knows_which_gradients_it_uses():
    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return x * y

        @staticmethod
        def backward(ctx, grad):
            answers.append([_compat.wants_gradient_at(node) for node, _ in ctx.next_functions])
            return grad, grad

    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    answers = []
    Asking.apply(x, y).sum().backward()
    torch.autograd.grad(Asking.apply(x, y).sum(), x)
    torch.autograd.grad(Asking.apply(x * 2, y).sum(), y)
    Asking.apply(x * 2, y).sum().backward(inputs=[x])
    assert answers == [[True, True], [True, False], [False, True], [True, False]]


def test_hooks_of_saved_tensors_are_seen():
    assert not _compat.saved_tensors_hooked()
    with torch.autograd.graph.save_on_cpu():
        assert _compat.saved_tensors_hooked()
    assert not _compat.saved_tensors_hooked()


def test_autocast_can_be_left():
    a = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with _compat.autocast_disabled():
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


def test_hooks_that_wait_for_a_gradient_can_be_left_out():
    x, calls = torch.ones(2, requires_grad=True), []
    x.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    with _compat.without_gradient_hooks([x, torch.ones(1)]):
        x.sum().backward()
    assert (len(calls), x.grad.tolist()) == (0, [1, 1])
    x.sum().backward()
    assert (len(calls), x.grad.tolist()) == (1, [2, 2])


def test_compiled_modules_are_recognised():
    plain = nn.Linear(2, 2)
    assert not _compat.is_compiled(plain)
    assert _compat.is_optimized_module(torch.compile(plain, backend="eager"))
    assert _compat.is_compiled(nn.Sequential(torch.compile(plain, backend="eager")))
    in_place = nn.Linear(2, 2)
    in_place.compile(backend="eager")
    assert _compat.is_compiled(in_place)


def test_a_marked_function_is_a_constant_when_traced():
    calls = []

    @_compat.constant_when_traced
    def settings():
        calls.append(1)
        return ("layer", 0.5)

    @torch.compile(backend="eager", fullgraph=True)
    def run(x):
        return x * settings()[1]

    assert torch.equal(run(torch.ones(2)), torch.full((2,), 0.5))
    assert torch.equal(run(torch.ones(2)), torch.full((2,), 0.5))
    assert len(calls) == 1


def test_a_function_that_is_never_traced_is_called_where_it_stands():
    callers = []

    @_compat.never_traced
    def note():
        callers.append(sys._getframe(1).f_code.co_name)

    @torch.compile(backend="eager")
    def run(x):
        note()
        return x * 2

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Dynamo's, of what it cannot trace
        for _ in range(2):
            run(torch.ones(2))
    assert callers == ["run", "run"]


def test_an_operation_that_fails_while_traced_tells_its_error():
    torch._dynamo.reset()  # what other tests have compiled makes sizes dynamic, and the error names them otherwise
    layer, x = nn.Conv2d(3, 4, 3), torch.ones(1, 4, 8, 8)
    with pytest.raises(RuntimeError) as own:
        layer(x)
    with pytest.raises(RuntimeError) as traced:
        torch.compile(layer, backend="eager")(x)
    assert type(traced.value) is not RuntimeError
    assert str(_compat.failed_operation(traced.value)) == str(own.value)
    assert _compat.failed_operation(own.value) is None


def test_inputs_of_a_captured_graph_tell_their_tensors():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(x)

    model, found = Model(), {}

    def backend(graph_module, inputs):
        for node in graph_module.graph.find_nodes(op="placeholder"):
            source, tensor = _compat.graph_argument(node)
            found[source] = tensor
        return graph_module.forward

    torch.compile(model, backend=backend)(torch.ones(1, 2))
    (source,) = [source for source, tensor in found.items() if tensor is model.layer.weight]
    assert source.startswith("L['self']")
    assert "layer" in source
    torch._dynamo.reset()


def test_boxed_calls_take_one_list():
    assert _compat.make_boxed(lambda a, b: a + b)([1, 2]) == 3


def test_the_autograd_cache_is_off_inside():
    import torch._functorch.config as config

    with _compat.autograd_cache_off():
        assert not config.enable_autograd_cache


def test_the_autograd_cache_keeps_what_compilers_return():
    import torch._functorch.config as config
    from torch._functorch._aot_autograd.autograd_cache import should_bundle_autograd_cache

    with _compat.autograd_cache(stores=True):
        assert config.enable_autograd_cache
        assert should_bundle_autograd_cache()
        assert config.force_non_lazy_backward_lowering
        assert not config.donated_buffer
        with _compat.inductor_cache():
            assert not should_bundle_autograd_cache()
    with _compat.autograd_cache(stores=False):
        assert not config.enable_autograd_cache
        assert not config.donated_buffer


def test_code_without_a_key_is_refused():
    with pytest.raises(Exception, match="does not hold") as error:
        _compat.code_key(object())
    assert type(error.value).__name__ == "BypassAOTAutogradCache"


def test_a_graph_goes_through_bytes_with_its_fake_values():
    from torch._subclasses import FakeTensorMode

    first, second = FakeTensorMode(), FakeTensorMode()
    graph = torch.fx.symbolic_trace(torch.nn.ReLU())
    for node in graph.graph.nodes:
        node.meta["val"] = first.from_tensor(torch.ones(2, 3))
    found = _compat.unpickle_graph(_compat.pickle_graph(graph), second)
    assert [n.name for n in found.graph.nodes] == [n.name for n in graph.graph.nodes]
    values = [n.meta["val"] for n in found.graph.nodes]
    assert all(v.fake_mode is second and v.shape == (2, 3) for v in values)


def test_inductors_settings_are_a_text_and_hold_for_a_time():
    import torch._inductor.config as config

    usual, before = config.max_fusion_size, _compat.inductor_state()
    with _compat.inductor_settings({"max_fusion_size": 17}):
        assert config.max_fusion_size == 17
        assert _compat.inductor_state() != before
    assert config.max_fusion_size == usual
    assert _compat.inductor_state() == before
    assert " at 0x" not in before  # it must be the same in every process
    assert _compat.inductor_folder().is_absolute()


def test_inductor_lists_its_settings():
    assert {"max_autotune", "max_fusion_size"} <= set(_compat.inductor_options())
    assert "policy" not in _compat.inductor_options()


def test_inductor_lists_its_decompositions():
    assert torch.ops.aten.native_batch_norm_backward.default in _compat.inductor_decompositions()


def test_a_compile_has_an_id():
    ids = []

    def backend(graph_module, inputs):
        ids.append(_compat.current_compile_id())
        return graph_module.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    assert len(ids) == 1
    assert str(ids[0]).count("/") == 1
    assert _compat.current_compile_id() is None


def test_the_last_compile_of_code_is_known():
    last = []

    def backend(graph_module, inputs):
        last.append(_compat.last_compile())
        return graph_module.forward

    with torch._dynamo.config.patch(recompile_limit=2):
        compiled = torch.compile(lambda x, n: x + n, backend=backend, dynamic=False)
        for n in ("1", "2", "3"):
            compiled(torch.ones(1), float(n) if n != "3" else 3)
    assert last == [False, True]
    assert not _compat.last_compile()


def test_a_reset_is_noticed_by_a_backend():
    def backend(graph_module, inputs):
        return graph_module.forward

    resets = []
    backend.reset = lambda: resets.append(1)
    for _ in range(2):
        _compat.notice_reset(backend)
        torch.compiler.reset()
    torch.compiler.reset()
    assert len(resets) == 2


def test_artifacts_reach_the_structured_trace():
    import logging

    records = []
    handler = logging.Handler()
    handler.emit = records.append
    trace = logging.getLogger("torch.__trace")
    trace.addHandler(handler)
    try:
        _compat.trace_artifact("ssprop_test", lambda: "the text", None)
    finally:
        trace.removeHandler(handler)
    (record,) = records
    assert record.metadata["artifact"] == {"name": "ssprop_test", "encoding": "string"}
    assert record.payload == "the text"


def test_a_fake_mode_is_found_among_inputs():
    from torch._subclasses import FakeTensorMode

    mode = FakeTensorMode()
    fake = mode.from_tensor(torch.ones(2))
    assert _compat.fake_mode_of([fake]) is mode
    with _compat.lowering_context(mode):
        assert torch._guards.TracingContext.get().fake_mode is mode


def test_modes_of_torch_compile_have_options():
    assert _compat.inductor_mode_options("max-autotune")["max_autotune"] is True


def test_autocast_can_be_entered_and_left_by_calls():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mode = _compat.enter_autocast("cpu", None, False, None)
        assert not torch.is_autocast_enabled("cpu")
        _compat.exit_autocast(mode)
        assert torch.is_autocast_enabled("cpu")


def test_the_format_of_an_input_gradient_is_known():
    weight, geometry = torch.randn(8, 4, 3, 3), ((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    for form in (torch.contiguous_format, torch.channels_last):
        input = torch.randn(2, 4, 6, 6).contiguous(memory_format=form).requires_grad_()
        assert _compat.gradient_format(input, weight, geometry) == form
        torch.convolution(input, weight, None, *geometry).sum().backward()


def test_autocast_of_any_device_is_seen():
    assert not _compat.any_autocast()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _compat.any_autocast()


def test_a_layout_can_be_settled():
    tensor = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    assert torch.equal(_compat.in_memory_order(tensor), tensor)
    assert _compat.in_memory_order(tensor).stride() == tensor.stride()
    assert "inductor_force_stride_order" in str(
        torch.fx.experimental.proxy_tensor.make_fx(_compat.in_memory_order)(tensor).graph
    )


def test_the_forward_of_a_function_is_told_from_no_grad():
    found = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch.no_grad():
                found.append(_compat.in_function_forward())
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            found.append(_compat.in_function_forward())
            return grad

    Noting.apply(torch.ones(1, requires_grad=True)).backward()
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            found.append(_compat.in_function_forward())
    assert found == [True, False, False, False, False]


def test_a_distributed_model_runs_alone(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        model.reducer = None  # whoever asks it fails
        _compat.run_alone(model)
        x = torch.randn(3, 2)
        assert torch.equal(model(x), model.module(x))
    finally:
        torch.distributed.destroy_process_group()
