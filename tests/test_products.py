"""Products with a long sum, taken in parts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ssprop_fx.ops import register_flop_formulas
from ssprop_fx.products import product_of_columns


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [1024, 7680, 8200, 1000])
def test_a_long_product_of_columns_is_the_product(positions, dtype, compiling):
    torch.manual_seed(0)
    a, b = (torch.randint(-1, 2, (positions, n)).to(dtype) for n in (12, 20))
    b[:, 0] = a[:, 0] = 1
    b[::512, 0] += 6  # each of 15 parts sums to 518, which bfloat16 rounds to 520; the whole, 7770, is 7776
    exact = (a.double().t() @ b.double()).to(dtype)
    assert torch.equal(product_of_columns(a, b, compiling), exact)


@pytest.mark.parametrize("compiling", [False, True])
def test_positions_have_any_shape_and_gaps(compiling):
    a, b = torch.randn(2, 32, 32, 12), torch.randn(2, 64, 64, 20)[:, ::2, ::2]
    exact = torch.einsum("nhwk,nhwc->kc", a.double(), b.double())
    torch.testing.assert_close(product_of_columns(a, b, compiling), exact.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shapes", [((6, 3), (6, 4)), ((2, 32, 32, 12), (2, 32, 32, 20))])
def test_the_operator_passes_opcheck(shapes):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.ssprop.product, tuple(map(torch.randn, shapes)), test_utils=tests)


def test_the_counter_of_flops_counts_it():
    register_flop_formulas()
    a, b = torch.randn(2, 32, 32, 12), torch.randn(2, 32, 32, 20)
    counts = []
    for compiling in (False, True):
        with FlopCounterMode(display=False) as counter:
            product_of_columns(a, b, compiling)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * 32 * 32 * 12 * 20] * 2
