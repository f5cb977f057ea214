"""Row maps at their limits: extreme inputs, and what other libraries got wrong."""

import functools

import pytest
import torch
from conftest import CUDA_ON_HOST, dtypes, for_cpu
from test_row_maps import INF, MAPS, close, maps, probabilities

import torch_softmax_ext as tse

# ---- bugs of other libraries ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.00001, 1.5, 2.0, 4.0, 10.0])
def test_any_alpha_sums_to_one_with_a_gradient(device, alpha):
    """deep-spin/entmax #16, #20, #23, #24, #36, #39: NaN or garbage for large alphas, for 1, and below."""
    x = (torch.randn(6, 40, device=device) * 3).requires_grad_()
    y = tse.entmax(x, alpha)
    close(y.sum(1), torch.ones(6, device=device))
    (g,) = torch.autograd.grad(y.square().sum(), x)
    assert g.isfinite().all()
    assert (g.sum(1).abs() <= 1e-5 * g.abs().sum(1).clamp_min(1)).all()
    close(tse.entmax(x, torch.tensor(alpha, device=device)), y, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@probabilities
def test_half_types_sum_to_one(spec, device, dtype):
    """deep-spin/entmax #30: NaN in float16, and sums of 0.976 in bfloat16."""
    y = spec.op((torch.randn(8, 3000, device=device) / 2).to(dtype))
    assert y.isfinite().all()
    assert ((y.double().sum(1) - 1).abs() < 2 * torch.finfo(dtype).eps).all()


@probabilities
def test_rows_and_entries_of_minus_inf(spec, device):
    """deep-spin/entmax #9, #17, #19: NaN or a crash with -inf."""
    x = torch.randn(4, 12, device=device)
    x[:, ::3] = -INF
    x[2] = -INF
    x.requires_grad_()
    y = spec.op(x)
    close(y.sum(1), torch.tensor([1.0, 1.0, 0.0, 1.0], device=device))
    (g,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(g[:, ::3], torch.zeros_like(g[:, ::3]))
    assert g.isfinite().all()


@probabilities
@pytest.mark.parametrize("n", [5, 300, 5000])
def test_offsets_of_1e8(spec, device, n):
    """tensorflow/addons #2314: NaN for logits of 1e8."""
    x = torch.full((2, n), -1e8, device=device)
    x[:, 3] = 1e8
    x[:, 4] = 1e8
    want = torch.zeros(2, n, device=device)
    want[:, 3:5] = 0.5
    close(spec.op(x), want)


@dtypes
@maps
def test_every_length_and_alignment(spec, device, dtype):
    """pytorch #143644: a softmax of 5 x 517 float64 summed to 0.7 where vectors met the end of memory."""
    is_half = dtype.itemsize == 2
    of_sums = {"rtol": 0, "atol": 2e-2 if is_half else 1e-5}
    of_values = {"rtol": 1e-2, "atol": 1e-3} if is_half else {"rtol": 1e-5, "atol": 1e-6}
    for n in (1, 2, 3, 5, 31, 63, 64, 65, 255, 256, 257, 258, 300, 511, 517, 1025, 2049):
        if CUDA_ON_HOST and n > 300:
            continue
        memory = torch.randn(5 * n + 3, dtype=dtype, device=device)
        for begin in range(3):
            x = memory[begin : begin + 5 * n].view(5, n)
            y = spec.op(x)
            if spec.name != "log_softmax":
                close(y.sum(1, dtype=torch.float64), torch.ones(5, dtype=torch.float64, device=device), **of_sums)
            close(y, spec.reference(x.double()).to(dtype), **of_values)


def test_small_probabilities_keep_their_digits(device):
    x = torch.tensor([37.43, 0.0], device=device, dtype=torch.float64)
    p = tse.softmax(x)
    close(p[1].item(), torch.tensor(-37.43, dtype=torch.float64).exp().item(), rtol=1e-13, atol=0)
    close(tse.log_softmax(x)[1].item(), -37.43 - 5.5e-17, rtol=1e-15, atol=0)


@pytest.mark.parametrize("gap", [3.0, 5.0, 37.43, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [2, 300, 5000])
@pytest.mark.parametrize("differentiable", [False, True])
def test_gradients_next_to_a_probability_of_one(device, dtype, gap, n, differentiable):
    """pytorch #195678, #195680: the gradients of float64 [37.43, 0] were lost by cancellation."""
    x = torch.full((2, n), -torch.inf, dtype=dtype, device=device)
    x[:, n // 2], x[:, 0] = gap, 0
    x.requires_grad_()
    rest = torch.tensor(-gap, dtype=torch.float64).exp() / (1 + torch.tensor(-gap, dtype=torch.float64).exp())
    for function, want in ((tse.softmax, rest * (1 - rest)), (tse.log_softmax, rest)):
        for columns in (False, True):
            y = function(x.t().contiguous(), dim=0).t() if columns else function(x)
            (g,) = torch.autograd.grad(y[:, n // 2].sum(), x, create_graph=differentiable)
            g = g.detach().cpu().double()
            want_g = torch.zeros(2, n, dtype=torch.float64)
            want_g[:, n // 2], want_g[:, 0] = want, -want
            close(g, want_g, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)


@maps
@pytest.mark.parametrize("n", [6, 300, 5000])
def test_nan_in_a_row_of_minus_inf_is_seen(spec, device, n):
    """torch-xpu-ops #5022: NaN in a row that is otherwise -inf became 0."""
    x = torch.full((3, n), -torch.inf, device=device)
    x[1, n - 2], x[2, 0] = torch.nan, 1
    y = spec.op(x)
    assert y.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("n", [32000, 65537, 256000])
def test_mass_of_large_vocabularies(device, n):
    """unslothai/unsloth #10616: with softcap, probabilities of 32000, 65537 or 256000 classes lacked up to half."""
    x = torch.randn(2, n, device=device) * 3
    close(tse.softmax(x).sum(1, dtype=torch.float64).cpu(), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-5)
    t = torch.tensor([1, n - 1], device=device)
    capped = 5 * torch.tanh(x.double() / 5)
    want = torch.nn.functional.cross_entropy(capped, t, reduction="none")
    close(tse.cross_entropy(x, t, softcap=5.0, reduction="none").double(), want)


@maps
def test_integers_with_a_dtype(spec, device):
    """As torch.softmax takes them."""
    x = torch.arange(12, device=device).view(3, 4) % 5
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(spec.op(x, dtype=dtype), spec.op(x.to(dtype)))
        assert torch.equal(spec.op(x > 2, dtype=dtype), spec.op((x > 2).to(dtype)))
    with pytest.raises(NotImplementedError, match=f"{spec.name}: input: expected float32"):
        spec.op(x)


@functools.cache
def _causal(n):
    return torch.ones(n, n).tril().bool()


def test_double_backward_through_masked_attention(device):
    """deep-spin/entmax: double backward of entmax15 and of the bisection was NaN or wrong."""
    q, k = (torch.randn(2, 7, 3, device=device, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for spec in MAPS:
        if spec.name == "log_softmax":  # its masked results are infinite
            continue

        def second(f):
            p = f(q @ k.mT, mask=_causal(7).to(device))
            (g,) = torch.autograd.grad((p @ k).square().sum(), q, create_graph=True)
            return torch.autograd.grad(g.square().sum(), (q, k))

        close(second(spec.op), second(spec.reference))


# ---- limits ---------------------------------------------------------------------------------------------------------


@probabilities
@pytest.mark.parametrize("n", [300, 4096])
def test_a_nan_far_below_a_peak_is_seen(spec, device, n):
    x = torch.randn(2, n, device=device)
    x[0, 5], x[0, n - 100] = 30, float("nan")
    y = spec.op(x)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("function", [tse.sparsemax, tse.entmax15, tse.entmax], ids=lambda f: f.__name__)
def test_an_infinite_gradient_outside_the_support_does_not_matter(device, function):
    """As that of the entropy is, where a probability is 0."""
    x = (torch.randn(3, 40, device=device) * 3).requires_grad_()
    p = function(x)
    (got,) = torch.autograd.grad(p, x, torch.where(p > 0, 1 + p.log(), INF).detach(), retain_graph=True)
    (want,) = torch.autograd.grad(p, x, torch.where(p > 0, 1 + p.log(), 0).detach())
    close(got, want)


@for_cpu
@pytest.mark.parametrize(("n", "alpha"), [(3, 2000.0), (200, 150.0), (2000, 120.0), (2000, 50.0)])
def test_ties_of_a_large_alpha(n, alpha):
    close(tse.entmax(torch.zeros(n), alpha), torch.full((n,), 1 / n))


@maps
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e300])
@pytest.mark.parametrize("n", [7, 9000])
def test_temperatures_that_no_float_has(spec, device, temperature, n):
    x = torch.randn(2, n, device=device).index_fill(1, torch.tensor([1], device=device), -INF).requires_grad_()
    y = spec.op(x, temperature=torch.full((2, 1), temperature, device=device, dtype=torch.float64))
    p = y.exp() if spec.name == "log_softmax" else y
    close(p.sum(1), torch.ones(2, device=device))
    if temperature < 1:
        assert p.argmax(1).tolist() == x.argmax(1).tolist()
    (g,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert not g.isnan().any()


def test_an_added_mask_leaves_the_digits_of_large_logits(device):
    x = 1e6 + torch.arange(8.0, device=device) / 8
    got = tse.softmax(x, temperature=3.0, mask=torch.zeros(8, device=device))
    close(got, ((x.double() - 1e6) / 3).softmax(0).float())


def test_a_large_alpha_is_that_alpha(device):
    x = torch.full((1, 32000), -100.0, device=device)
    x[0, :2] = torch.tensor([0.0, -0.12])
    close(tse.entmax(x, 10.0)[0, :2], torch.tensor([1.0, 0.0], device=device))


@for_cpu
@maps
@dtypes
@pytest.mark.parametrize("n", [1, 5, 31, 33, 64, 65, 256, 257, 513, 1024, 1025])
@pytest.mark.parametrize("rows", [3, 37])
def test_same_bits_in_rows_and_columns(spec, dtype, n, rows):
    """Columns are walked in lanes, rows one by one."""
    x, g = (torch.randn(rows, n) * 3).to(dtype), torch.randn(rows, n).to(dtype)
    if n > 512:  # of which the first 512 elements say little
        x[0, :512], x[1, -1], x[2, 600:] = -torch.inf, 50, -torch.inf

    def value_and_grad(x, g, dim):
        x = x.requires_grad_()
        y = spec.op(x, dim=dim, **spec.row_options)
        return y, torch.autograd.grad(y, x, g)[0]

    rows = value_and_grad(x.clone(), g, 1)
    columns = value_and_grad(x.t().contiguous(), g.t().contiguous(), 0)
    for a, b in zip(rows, columns, strict=True):
        assert torch.equal(a, b.t())
