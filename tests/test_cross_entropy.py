"""What only cross_entropy has: rows that are ignored, class weights, class probabilities, and the place of torch's own
function in scripts and transforms."""

import pytest
import torch
from conftest import dtypes, for_cpu
from cross_entropy_cases import grad
from torch._dynamo.testing import CompileCounterWithBackend

import torch_softmax_ext as tse


@pytest.mark.parametrize("classes", [50, 300])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("columns", [False, True])
def test_ignored_rows_have_zero_gradient_even_if_not_finite(device, classes, options, columns):
    x = torch.randn(3, classes, device=device)
    x[1, 7], x[1, 8] = float("nan"), float("inf")
    x = x.t().contiguous().t() if columns else x
    for reduction in ("none", "mean", "sum"):
        target = torch.tensor([1, -100, 2], device=device)
        loss, g = grad(tse.cross_entropy, x, target, reduction=reduction, **options)
        assert loss.isfinite().all()
        assert (g[1] == 0).all()


@dtypes
@pytest.mark.parametrize("classes", [50, 9000])
def test_classes_of_minus_infinity_have_zero_gradient(device, dtype, classes):
    x = torch.randn(4, classes, device=device).to(dtype)
    x[:, ::3] = -float("inf")
    for reduction in ("none", "sum", "sum"):
        g = grad(tse.cross_entropy, x, torch.full((4,), 1, device=device), reduction=reduction)[1]
        assert (g[:, ::3] == 0).all()
        assert (g[:, 1] != 0).all()


@dtypes
def test_nan_of_any_bits_in_grad_output_stays_nan(device, dtype):
    """With all bits set, a carry while rounding to 16 bits would make it zero."""
    x = torch.randn(2, 40, device=device).to(dtype).requires_grad_()
    loss = tse.cross_entropy(x, torch.tensor([1, 2], device=device), reduction="none")
    nan = torch.tensor([0x7FFFFFFF] * 2, dtype=torch.int32, device=device).view(torch.float32).to(loss.dtype)
    assert torch.autograd.grad(loss, x, nan)[0].isnan().all()


@for_cpu
def test_ignored_rows_have_zero_gradient_with_infinite_weights():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.tensor([float("inf"), 1, 1, 1])
    loss = tse.cross_entropy(x, torch.tensor([1, -100, 2]), weight, label_smoothing=0.1, reduction="none")
    assert (torch.autograd.grad(loss.sum(), x)[0][1] == 0).all()


def train(device, loss_module, steps=15):
    """A training script that does not know this package."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    weight = torch.linspace(0.5, 1.5, 10, device=device)
    criterion = loss_module(weight=weight, label_smoothing=0.1, ignore_index=3)
    x, y = torch.randn(256, 20, device=device), torch.randint(0, 10, (256,), device=device)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(x)
        loss = criterion(logits, y) + 0.1 * torch.nn.functional.cross_entropy(logits, logits.detach().softmax(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.not_on_host
@pytest.mark.parametrize("replaced", ["function", "module", "both"])
def test_a_training_script_gives_the_same_losses_with_torchs_names_replaced(device, monkeypatch, replaced):
    want = train(device, torch.nn.CrossEntropyLoss)
    if replaced != "module":
        monkeypatch.setattr(torch.nn.functional, "cross_entropy", tse.cross_entropy)
    if replaced != "function":
        monkeypatch.setattr(torch.nn, "CrossEntropyLoss", tse.CrossEntropyLoss)
    torch.testing.assert_close(train(device, torch.nn.CrossEntropyLoss), want, rtol=2e-4, atol=0)
    assert want[-1] < want[0]


@pytest.mark.not_on_host
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "softcap": 4.0, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 5, 4)], ids=str)
def test_gradient_of_class_probabilities(device, options, reduction, shape):
    torch.manual_seed(0)
    dim = 0 if len(shape) == 1 else 1
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    q = torch.rand(shape, dtype=torch.float64, device=device).softmax(dim).requires_grad_()
    w = torch.rand(shape[dim], dtype=torch.float64, device=device) + 0.5

    def loss(x, q):
        return tse.cross_entropy(x, q, w, reduction=reduction, **options)

    assert torch.autograd.gradcheck(loss, (x, q))
    assert torch.autograd.gradgradcheck(loss, (x, q))
    assert torch.autograd.gradcheck(lambda q: loss(x.detach(), q), (q,))  # of the target alone
    (got,) = torch.autograd.grad(loss(x.float(), q.bfloat16()).sum(), q)
    (want,) = torch.autograd.grad(loss(x, q).sum(), q)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.not_on_host
def test_class_probabilities_of_another_dtype(device):
    """Computed in the wider of the two dtypes, as in torch."""
    x, q = torch.randn(4, 9, device=device), torch.randn(4, 9, device=device).softmax(1)
    for a, b in ((x, q.double()), (x.double(), q), (x.bfloat16(), q), (x.half(), q.bfloat16())):
        want = torch.nn.functional.cross_entropy(a, b)
        got = tse.cross_entropy(a, b)
        assert got.dtype == want.dtype
        close = {"rtol": 1e-2, "atol": 0} if a.itemsize == 2 else {}  # torch rounds its log-probabilities there
        torch.testing.assert_close(got, want, **close)
        torch.testing.assert_close(tse.cross_entropy(a.clone().requires_grad_(), b), got)
        with torch.inference_mode():  # below autograd
            assert torch.equal(tse.cross_entropy(a, b), got)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
def test_probabilities_over_no_classes_are_as_torchs(device, options):
    """The mean is NaN, and nothing divides by zero."""
    x, q = torch.empty(2, 0, device=device, requires_grad=True), torch.empty(2, 0, device=device, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        loss = tse.cross_entropy(x, q, reduction=reduction, **options)
        want = torch.nn.functional.cross_entropy(x, q, reduction=reduction, **options)
        torch.testing.assert_close(loss, want, equal_nan=True)
        loss.sum().backward()
    with pytest.raises(RuntimeError, match="cross_entropy: input: expected at least one class"):
        tse.cross_entropy_with_metrics(x, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_vmap_with_class_weights_and_an_ignore_index_beyond_the_classes(device, dtype):
    """The weights may have another precision than the logits."""
    torch.manual_seed(0)
    x, target = torch.randn(3, 500, 5, device=device), torch.randint(0, 5, (500,), device=device)
    target[:7] = 9
    weight = (torch.rand(5, device=device) + 0.5).to(dtype)

    def loss(x):
        return tse.cross_entropy(x, target, weight, ignore_index=9, z_loss_weight=0.1)

    got = torch.func.vmap(loss)(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.stack([loss(v) for v in x]))


def test_ignored_rows_have_zero_gradient_in_double_backward_and_transforms(device):
    x = torch.randn(4, 5, device=device)
    x[3], target = float("nan"), torch.tensor([0, 1, 2, -100], device=device)
    x.requires_grad_()
    for options in ({}, {"z_loss_weight": 0.1}, {"label_smoothing": 0.1, "softcap": 3.0}):
        for create_graph in (False, True):
            (g,) = torch.autograd.grad(tse.cross_entropy(x, target, **options), x, create_graph=create_graph)
            assert g.isfinite().all()
            assert g[3].abs().max() == 0
        g = torch.func.grad(lambda x, o=options: tse.cross_entropy(x, target, **o))(x.detach())
        assert g[3].abs().max() == 0
        assert g.isfinite().all()


def test_probabilities_that_require_grad_share_a_graph(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, q: tse.cross_entropy(x * 1, q), fullgraph=True, backend=counter)
    for rows in (4, 6, 9, 11):
        x = torch.randn(rows, 5, device=device, requires_grad=True)
        q = torch.rand(rows, 5, device=device, requires_grad=True)
        compiled(x, q).backward()
    assert counter.frame_count == 2


def test_transforms_that_do_not_differentiate_the_logits(device):
    x, target = torch.randn(4, 7, device=device), torch.randint(0, 7, (4,), device=device)
    want = torch.nn.functional.cross_entropy(x, target)
    a = torch.randn(3, device=device)
    torch.testing.assert_close(
        torch.func.grad(lambda a: a.sum() * tse.cross_entropy(x, target))(a), want.expand(3).contiguous()
    )
    detached = torch.func.grad(lambda x: x.sum() * tse.cross_entropy(x.detach(), target))(x)
    torch.testing.assert_close(detached, want.expand(4, 7).contiguous())
    torch.testing.assert_close(
        tse.cross_entropy(torch._neg_view(x), target), torch.nn.functional.cross_entropy(-x, target)
    )
