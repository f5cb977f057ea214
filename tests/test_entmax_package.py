"""What the tests of the entmax package check (https://github.com/deep-spin/entmax, files entmax/test_*.py, MIT; Ben
Peters, Vlad Niculae and others), on this package through ``entmax_shim``, which renames functions. Where the package is
installed, its own tests run through the shim, too, and values are compared with its own.

Left out, because there is no such function here: normmax and budget. Different: test_amp.py, which release 1.3 does not
have, expects float32 results under autocast; here they keep the input's dtype unless the argument ``dtype`` says
otherwise.
"""

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import entmax_shim as shim
import pytest
import torch

import torch_softmax_ext as tse

pytestmark = pytest.mark.not_on_host
close = torch.testing.assert_close
gradcheck = functools.partial(torch.autograd.gradcheck, eps=1e-5)
dims = pytest.mark.parametrize("dim", [0, 1, 2])
MAPS = {
    "sparsemax": shim.sparsemax,
    "entmax15": shim.entmax15,
    "sparsemax-k": functools.partial(shim.sparsemax, k=2),
    "entmax15-k": functools.partial(shim.entmax15, k=2),
    "sparsemax-bisect": shim.sparsemax_bisect,
    "entmax-bisect": functools.partial(shim.entmax_bisect, n_iter=24, ensure_sum_one=False),
    "Sparsemax": shim.Sparsemax(k=512),
    "Entmax15": shim.Entmax15(k=512),
    "SparsemaxBisect": shim.SparsemaxBisect(),
    **{f"alpha-{a}": functools.partial(shim.entmax_bisect, alpha=a) for a in (1.25, 1.5, 1.75, 2.25)},
    "EntmaxBisect-1.75": shim.EntmaxBisect(1.75),
}
maps = pytest.mark.parametrize("function", MAPS.values(), ids=MAPS)
LOSSES = {
    "sparsemax": shim.SparsemaxLoss,
    "sparsemax-k": functools.partial(shim.SparsemaxLoss, k=5),
    "entmax15": shim.Entmax15Loss,
    "entmax15-k": functools.partial(shim.Entmax15Loss, k=5),
    "sparsemax-bisect": shim.SparsemaxBisectLoss,
    "entmax-bisect": shim.EntmaxBisectLoss,
    "entmax-bisect-1.2": functools.partial(shim.EntmaxBisectLoss, alpha=1.2),
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def logits(device, *shape):
    return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)


def alphas(device, *shape):
    return (0.05 + 2.5 * torch.rand(shape, dtype=torch.float64, device=device)).requires_grad_()


def scores_and_classes(device, rows=4, classes=10):
    return logits(device, rows, classes), torch.randint(0, classes, (rows,), device=device)


# ---- maps -----------------------------------------------------------------------------------------------------------


@dims
@pytest.mark.parametrize("module", [shim.Sparsemax, shim.Entmax15])
def test_gradcheck_in_every_dimension(device, module, dim):
    assert gradcheck(module(dim, k=3), (logits(device, 3, 4, 5),))


def sorted_threshold(z, dim, power):
    """Threshold and support size by a full sort: the last support that contains its own smallest element."""
    z = z.double().sort(dim, descending=True).values
    count = torch.ones_like(z).cumsum(dim)
    mean = z.cumsum(dim) / count
    variance = z.square().cumsum(dim) / count - mean.square()
    tau = mean - 1 / count if power == 1 else mean - (1 / count - variance).clamp_min(0).sqrt()
    size = (tau < z).sum(dim, keepdim=True)
    return tau.gather(dim, size - 1), size


@dims
@pytest.mark.parametrize("scale", [1e-5, 0.5, 1e4])
@pytest.mark.parametrize("k", [None, 2, 5, 30])
def test_threshold_and_support_are_those_of_a_sort_with_any_k(device, dim, scale, k):
    x = scale * torch.randn(3, 4, 5, device=device)
    for function, power in ((shim._sparsemax_threshold_and_support, 1), (shim._entmax_threshold_and_support, 2)):
        tau, size = function(x, dim=dim, k=k)
        want_tau, want_size = sorted_threshold(x, dim, power)
        close(tau.double(), want_tau, rtol=1e-6, atol=1e-6)
        assert torch.equal(size, want_size)


@pytest.mark.parametrize(
    ("alpha", "function"), [(1, torch.softmax), (1.5, shim.entmax15), (2, shim.sparsemax), (2, shim.sparsemax_bisect)]
)
@pytest.mark.parametrize("shape", [(4, 6), (10, 30000)])
def test_entmax_of_three_alphas_is_another_map(device, alpha, function, shape):
    x = (0.5 * torch.randn(shape, device=device)).requires_grad_()
    g = torch.randn_like(x)
    p, want = shim.entmax_bisect(x, alpha), function(x, 1)
    close(p, want, rtol=1e-5, atol=1e-6)
    close(*(torch.autograd.grad(y, x, g)[0] for y in (p, want)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.75, 1.0, 1.2, 1.5, 1.75, 2.0, 2.25])
def test_gradcheck_of_logits_and_alpha(device, alpha):
    alpha = torch.tensor(alpha, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(shim.entmax_bisect, (logits(device, 4, 6), alpha))


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_an_alpha_for_each_row_in_every_dimension(device, dim):
    shape = [3, 4, 2, 5]
    x = logits(device, *shape)
    alpha = alphas(device, *(1 if d == dim else n for d, n in enumerate(shape)))
    p = shim.entmax_bisect(x, alpha, dim).movedim(dim, -1).flatten(0, -2)
    rows = zip(x.movedim(dim, -1).flatten(0, -2), alpha.flatten().tolist(), strict=True)
    close(p, torch.stack([shim.entmax_bisect(row, a) for row, a in rows]))


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_gradcheck_with_an_alpha_for_each_row(device, dim):
    shape = [2, 3, 2, 3]
    alpha = alphas(device, *(1 if d == dim else n for d, n in enumerate(shape)))
    assert gradcheck(functools.partial(shim.entmax_bisect, dim=dim), (logits(device, *shape), alpha))


@maps
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_minus_infinity_is_as_good_as_absent(device, function, dtype):
    x = torch.randn(2, 6, dtype=dtype, device=device)
    x[:, 3:] = -torch.inf
    p = function(x)
    close(p[:, :3], function(x[:, :3]))
    assert (p[:, 3:] == 0).all()


@maps
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_half_types_are_computed_in_float32(device, function, dtype):
    x = torch.randn(5, 1000, device=device).to(dtype)
    want = function(x.float())
    with torch.autocast(device.type, dtype):
        p = function(x)
    close(p, want.to(dtype))
    close(want.sum(-1), torch.ones(5, device=device))


@pytest.mark.parametrize("function", [tse.sparsemax, tse.entmax15, tse.entmax, functools.partial(tse.entmax, alpha=2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_sums_are_one_where_the_result_is_float32(device, function, dtype):
    x = torch.randn(5, 1000, device=device).to(dtype)
    with torch.autocast(device.type, dtype):
        p = function(x, dtype=torch.float32)
    close(p.sum(-1), torch.ones(5, device=device))
    close(p, function(x.float()))


# ---- losses ---------------------------------------------------------------------------------------------------------


@losses
def test_losses_are_not_negative_and_zero_at_a_large_margin(device, loss):
    x, target = scores_and_classes(device, rows=20)
    assert (loss(reduction="none")(x, target) >= 0).all()
    x = x.detach().scatter(1, target[:, None], 30)
    assert (loss(reduction="none")(x, target) == 0).all()


@losses
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "elementwise_mean"])
def test_gradcheck_of_losses(device, loss, ignored, reduction):
    x, target = scores_and_classes(device)
    criterion = loss(ignore_index=target[0] if ignored else -100, reduction=reduction)
    assert gradcheck(criterion, (x, target))


@losses
def test_an_ignored_class_adds_nothing(device, loss):
    x, target = scores_and_classes(device, 20, 6)
    kept = target != target[0]
    rows = loss(reduction="none")(x, target)
    assert loss(reduction="sum", ignore_index=target[0])(x, target) < rows.sum()
    close(loss(reduction="sum", ignore_index=target[0])(x, target), rows[kept].sum())
    close(loss(ignore_index=target[0])(x, target), rows[kept].mean())


# ---- where the package is installed ---------------------------------------------------------------------------------


def test_values_and_gradients_are_those_of_the_package():
    entmax = pytest.importorskip("entmax")
    x, target = scores_and_classes("cpu", 20, 12)
    alpha = (1.05 + torch.rand(20, 1, dtype=torch.float64)).requires_grad_()

    def check(call, *inputs):
        ours, theirs = call(shim), call(entmax)
        close(ours, theirs, rtol=1e-6, atol=1e-8)
        g = torch.randn_like(ours)
        for got, want in zip(*(torch.autograd.grad(y, inputs, g) for y in (ours, theirs)), strict=True):
            close(got, want, rtol=1e-6, atol=1e-8)

    for name in ("sparsemax", "entmax15", "sparsemax_bisect", "entmax_bisect"):
        check(lambda m, name=name: getattr(m, name)(x, dim=0), x)
    check(lambda m: m.entmax_bisect(x, alpha), x, alpha)
    for name in ("sparsemax_loss", "entmax15_loss", "sparsemax_bisect_loss", "entmax_bisect_loss"):
        check(lambda m, name=name: getattr(m, name)(x, target), x)
    check(lambda m: m.entmax_bisect_loss(x, target, 1.2), x)
    for name in ("SparsemaxLoss", "Entmax15Loss", "SparsemaxBisectLoss", "EntmaxBisectLoss"):
        check(lambda m, name=name: getattr(m, name)(ignore_index=int(target[0]))(x, target), x)


RUN = """
import sys, pytest, torch, entmax_shim
torch.manual_seed(0)
sys.modules.update({n: entmax_shim for n in ("entmax", "entmax.activations", "entmax.losses", "entmax.root_finding")})

class Seed:
    @pytest.fixture(autouse=True)
    def seed(self):
        torch.manual_seed(0)

sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not normmax and not budget", sys.argv[1]], [Seed()]))
"""


def test_the_packages_own_tests_pass(tmp_path):
    """Those of the installed package, without normmax and budget."""
    package = Path(pytest.importorskip("entmax").__file__).parent
    files = [package / f"test_{name}.py" for name in ("losses", "mask", "root_finding", "topk")]
    if not all(f.exists() for f in files):
        pytest.skip("the installed entmax has no tests")
    for file in files:
        shutil.copy(file, tmp_path)
    path = [str(Path(__file__).parent), *sys.path]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n" + RUN, str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 80
