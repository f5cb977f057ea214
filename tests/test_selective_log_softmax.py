"""What only selective_log_softmax has: the entropy, exact zeros, several indices a row, memory."""

import math

import pytest
import torch
from conftest import dtypes, for_cpu
from test_compile import with_compiled_autograd

import torch_softmax_ext as tse
from torch_softmax_ext.testing.memory import peak_memory
from torch_softmax_ext.testing.selective_log_softmax import reference_with_entropy as reference

INF = float("inf")


def both(x, index, **kwargs):
    return tse.selective_log_softmax(x, index, return_entropy=True, **kwargs)


def gradient(function, x, index, weights, **kwargs):
    """The results, and the gradient of their weighted sum."""
    x = x.detach().requires_grad_()
    results = function(x, index, **kwargs)
    loss = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
    return *results, torch.autograd.grad(loss, x)[0]


OPTIONS = [{}, {"temperature": 0.6}, {"softcap": 5.0}, {"softcap": 5.0, "temperature": 1.7}]
SHAPES = [((5, 9), (5,)), ((9,), ()), ((2, 3, 40), (2, 3, 4)), ((6, 1003), (6, 7)), ((3, 9000), (3,)), ((4, 1), (4, 2))]


@dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_values_and_gradients_of_both_results(device, dtype, options, shapes):
    x = (torch.randn(shapes[0], dtype=torch.float64) * 3).to(device, dtype)
    index = torch.randint(0, shapes[0][-1], shapes[1], device=device)
    weights = torch.randn(index.shape, device=device), torch.randn(x.shape[:-1], device=device)
    logp, entropy, g = gradient(both, x, index, weights, **options)
    logp64, entropy64, g64 = gradient(reference, x.double(), index, [w.double() for w in weights], **options)
    exact = 1e-11 if dtype == torch.float64 else 2e-6 if dtype == torch.float32 else 8e-6  # shorter exp2
    assert logp.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert g.dtype == dtype
    for got, want in ((logp, logp64), (entropy, entropy64)):
        assert (got - want).abs().max() <= exact * want.abs().max().clamp_min(1)
    assert (g - g64).abs().max() <= max(exact, torch.finfo(dtype).eps) * g64.abs().max().clamp_min(1e-2) * 2
    assert torch.equal(logp, tse.selective_log_softmax(x, index, **options))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(both(x, index, **options), (logp, entropy), strict=True))


@pytest.mark.parametrize("which", [0, 1])
def test_one_result_alone_is_differentiated(device, which):
    x = torch.randn(4, 3000, device=device, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 3000, (4, 2), device=device)
    got, want = (torch.autograd.grad(f(x, index)[which].square().sum(), x)[0] for f in (both, reference))
    torch.testing.assert_close(got, want)


@pytest.mark.not_on_host
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(4,), (4, 3)], ids=str)
def test_gradcheck_of_both_results(device, options, shape):
    x = torch.randn(4, 7, dtype=torch.float64, device=device, requires_grad=True)
    index = torch.randint(0, 7, shape, device=device)
    assert torch.autograd.gradcheck(lambda x: both(x, index, **options), (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: both(x, index, **options), (x,))


@pytest.mark.not_on_host
def test_opcheck_of_both_results(device):
    op = torch.ops.torch_softmax_ext.selective_log_softmax_with_entropy.default
    x = torch.randn(4, 7, device=device, requires_grad=True)
    torch.library.opcheck(op, (x, torch.randint(0, 7, (4, 2), device=device)), {"softcap": 3.0})


def test_vmap_of_both_results(device):
    x = torch.randn(5, 4, 7, device=device)
    index = torch.randint(0, 7, (4, 5), device=device)
    got = torch.func.vmap(both, in_dims=(0, 1))(x, index)
    for a, b in zip(got, both(x, index.t()), strict=True):
        assert torch.equal(a, b)


@dtypes
@pytest.mark.parametrize("n", [2, 17, 513, 9000])
def test_entropy_of_certain_and_of_uniform_rows(device, dtype, n):
    low = torch.finfo(dtype).min
    x = torch.full((4, n), -INF, dtype=dtype, device=device)
    at = torch.tensor([0, 1, n // 2, n - 1], device=device)
    x[torch.arange(4), at] = torch.tensor([0.3, -7.0, 50.0, 3000.0], dtype=dtype, device=device)
    finite = x.clamp_min(low)
    for logits in (x, finite):
        logp, entropy = both(logits, at)
        assert (logp == 0).all()
        assert (entropy == 0).all()
        g = gradient(both, logits, at, (torch.randn(4, device=device), torch.randn(4, device=device)))[2]
        assert (g == 0).all()
    for value in (0.0, 5.5, -1000.0):
        entropy = both(torch.full((2, n), value, dtype=dtype, device=device), at[:2])[1]
        tolerance = 1e-12 if dtype == torch.float64 else 5e-7
        assert (entropy - math.log(n)).abs().max() <= tolerance * math.log(n)


@pytest.mark.full_on_host
@dtypes
def test_nothing_is_positive_and_entropy_is_not_negative(device, dtype):
    for scale in (1.0, 10.0, 30.0):
        x = (torch.randn(4000, 5, device=device) * scale).to(dtype)
        logp, entropy = both(x, x.argmax(1))
        assert (logp <= 0).all()
        assert (entropy >= 0).all()
        assert (entropy <= math.log(5) * (1 + 1e-6)).all()


@dtypes
@pytest.mark.parametrize("n", [40, 6000])
def test_minus_infinity_has_no_part_in_the_entropy(device, dtype, n):
    """Masked logits count as absent: single ones, whole blocks, and one at the index."""
    x = (torch.randn(3, n, dtype=torch.float64) * 3).to(device, dtype)
    kept = torch.arange(n, device=device) % 3 == 1 if n == 40 else torch.arange(n, device=device) >= n - 700
    masked = x.masked_fill(~kept, -INF)
    first = int(kept.nonzero()[0])
    index = torch.full((3,), first, device=device)
    weights = torch.randn(3, device=device), torch.randn(3, device=device)
    logp, entropy, g = gradient(both, masked, index, weights)
    want = gradient(both, x[:, kept], torch.zeros_like(index), weights)
    tolerance = {"rtol": 8e-6, "atol": 8e-6} if dtype != torch.float64 else {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(logp, want[0], **tolerance)
    torch.testing.assert_close(entropy, want[1], **tolerance)
    assert (g[:, ~kept] == 0).all()
    assert (g[:, kept].double() - want[2].double()).abs().max() <= max(2e-5, torch.finfo(dtype).eps)
    assert (tse.selective_log_softmax(masked, torch.zeros_like(index)) == -INF).all()
    assert (tse.selective_log_softmax(masked, torch.zeros_like(index), temperature=9.0) == -INF).all()


def test_rows_that_are_not_finite_are_nan_and_leave_the_others_alone(device):
    x = torch.randn(5, 5000, device=device)
    want = both(x, torch.full((5,), 7, device=device))
    x[0, 4900], x[1, 3], x[2], x[3, 0] = float("nan"), INF, -INF, float("nan")
    for got, clean in zip(both(x, torch.full((5,), 7, device=device)), want, strict=True):
        assert got[:4].isnan().all()
        assert got[4] == clean[4]


@for_cpu  # on CUDA a device-side assertion
@pytest.mark.parametrize("shape", [(3,), (3, 2)], ids=str)
def test_no_index_is_read_outside(shape):
    index = torch.zeros(shape, dtype=torch.int64)
    for bad in (5, -1, 2**40):
        index.view(-1)[-1] = bad
        for function in (tse.selective_log_softmax, both):
            with pytest.raises(IndexError, match=rf"index: .* got {bad} at row 2"):
                function(torch.randn(3, 5, requires_grad=True), index)


@dtypes
@pytest.mark.parametrize("shape", [(64, 10), (5, 9000)], ids=str)
def test_same_bits_alone_and_with_any_threads(device, dtype, shape):
    x = torch.randn(shape, device=device).to(dtype)
    index = torch.randint(0, shape[1], (shape[0], 3), device=device)
    weights = torch.ones(shape[0], 3, device=device), torch.ones(shape[0], device=device)
    want = gradient(both, x, index, weights)
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            alone = gradient(both, x[:1], index[:1], [w[:1] for w in weights])
            again = gradient(both, x, index, weights)
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))
        assert all(torch.equal(a, b[:1]) for a, b in zip(alone, want, strict=True))


@pytest.mark.not_on_host  # nothing here depends on the kernels
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_of_both_results(device, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic)
    for rows in (5, 8):
        x, index = torch.randn(rows, 30, device=device), torch.randint(0, 30, (rows, 2), device=device)
        weights = torch.randn(rows, 2, device=device), torch.randn(rows, device=device)
        for got, want in zip(gradient(compiled, x, index, weights), gradient(both, x, index, weights), strict=True):
            torch.testing.assert_close(got, want)


@for_cpu
@pytest.mark.parametrize("return_entropy", [False, True])
def test_memory(return_entropy):
    """Forward allocates nothing of the logits' size, backward only the gradient."""
    x = torch.randn(64, 30000, requires_grad=True)
    index = torch.randint(0, 30000, (64,))

    def forward():
        r = tse.selective_log_softmax(x, index, return_entropy=return_entropy)
        return r[0] + r[1] if return_entropy else r

    def step():
        torch.autograd.grad(forward().sum(), x)

    step()
    assert peak_memory(forward) < 0.01 * x.nbytes
    assert x.nbytes <= peak_memory(step) < 1.01 * x.nbytes


@dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_blocks_far_apart(device, dtype, options):
    """A block of large negative logits, or a NaN in its own block, does not change the other blocks."""
    lowest = torch.finfo(dtype).min
    x = (torch.randn(4, 8192, dtype=torch.float64) * 20).to(device, dtype)
    x[1, :4096] = lowest
    x[2, 4096:] = lowest
    x[3, 8191] = float("nan")
    index = torch.tensor([[0, 5000], [5000, 4100], [0, 7], [0, 1]], device=device)
    weights = torch.ones(4, 2, device=device), torch.ones(4, device=device)
    got = gradient(both, x, index, weights, **options)
    want = gradient(reference, x.double(), index, [w.double() for w in weights], **options)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        torch.testing.assert_close(a[:3].double(), b[:3], rtol=2e-2 if a.dtype == dtype else 2e-5, atol=2e-5)
    assert torch.equal(got[0].nan_to_num(), tse.selective_log_softmax(x, index, **options).nan_to_num())


@pytest.mark.not_on_host
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 5.0}], ids=str)
def test_compiled_autograd_of_both_results(device, options):
    x, index = torch.randn(7, 30, device=device), torch.randint(0, 30, (7,), device=device)

    def run():
        leaf = x.clone().requires_grad_()
        logp, entropy = tse.selective_log_softmax(leaf * 1.5, index, return_entropy=True, **options)
        return logp.detach(), entropy.detach(), torch.autograd.grad(logp.sum() + entropy.square().sum(), leaf)[0]

    torch.testing.assert_close(with_compiled_autograd(run), run())
