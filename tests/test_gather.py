"""Taking channels and putting them back: layouts, the operators that stand for it in graphs, autograd."""

import pytest
import torch

from ssprop_fx.gather import after, between_zeros, channels_last, spread, take

INDEX = torch.tensor([1, 4, 6])
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


@pytest.fixture(params=[(8, 8), (8, 8, 5), (8, 8, 5, 4), (8, 8, 2, 3, 4)], ids=str)
def tensor(request):
    torch.manual_seed(0)
    return torch.randn(request.param)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_take_is_index_select_and_keeps_channels_last(tensor, layout, dim, compiling):
    tensor = LAYOUTS[layout](tensor)
    got = take(tensor, dim, INDEX, compiling)
    assert torch.equal(got, tensor.index_select(dim, INDEX))
    if tensor.dim() > 2:
        assert channels_last(got) == channels_last(tensor)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("layout", list(LAYOUTS)[:2])
def test_spread_undoes_take(tensor, layout, dim, compiling):
    tensor = LAYOUTS[layout](tensor)
    got = spread(take(tensor, dim, INDEX), dim, INDEX, tensor, compiling)
    expected = torch.zeros_like(tensor).index_copy(dim, INDEX, tensor.index_select(dim, INDEX))
    assert torch.equal(got, expected)
    assert got.stride() == tensor.stride()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operators_pass_opcheck(tensor, layout, dim):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.ssprop.take, (LAYOUTS[layout](tensor), dim, INDEX), test_utils=tests)
    torch.library.opcheck(torch.ops.ssprop.places, (INDEX, 8), test_utils=tests)
    order = sorted(range(tensor.dim()), key=lambda d: -LAYOUTS[layout](tensor).stride(d))
    torch.library.opcheck(torch.ops.ssprop.put, (LAYOUTS[layout](tensor)[: len(INDEX)], INDEX, 8, order), test_utils=tests)


def test_places_tells_where_each_channel_stands():
    assert torch.ops.ssprop.places(INDEX, 8).tolist() == [-1, 0, -1, -1, 1, -1, 2, -1]


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(
    ("sizes", "stride"), [((5,), (2,)), ((8, 6), (2, 1)), ((7, 9), (3, 2)), ((4, 3, 5), (2, 2, 2))], ids=str
)
def test_between_zeros_undoes_strided_slices(sizes, stride, compiling):
    whole = torch.randn(2, *sizes, 3)
    places = (slice(None), *(slice(None, None, s) for s in stride))
    expected = torch.zeros_like(whole)
    expected[places] = whole[places]
    got = between_zeros(whole[places], stride, sizes, compiling)
    assert torch.equal(got, expected)
    assert got.is_contiguous()
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.ssprop.between_zeros, (whole[places], list(stride), list(sizes)), test_utils=tests)


def test_what_is_read_afterwards_is_the_same():
    values = torch.tensor([1.5, -0.0, float("inf"), float("nan"), 1e-45], dtype=torch.float32)
    assert torch.equal(after(values)[[0, 1, 2, 4]], values[[0, 1, 2, 4]])
    assert after(values)[3].isnan()
    torch.library.opcheck(torch.ops.ssprop.one_after, (values,), test_utils=("test_schema", "test_faketensor"))
