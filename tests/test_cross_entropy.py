"""What only cross_entropy has: accuracy, what its target and weights may be, in place of torch's own."""

from decimal import Decimal, localcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import dtypes, for_cpu
from cross_entropy_cases import grad, logits_and_target
from torch._dynamo.testing import CompileCounterWithBackend

import torch_softmax_ext as tse
from torch_softmax_ext.testing.memory import peak_memory


@pytest.mark.parametrize("limit", [1.0, 10.0, 100.0])
def test_accuracy_of_float32(device, limit):
    """Loss within 4 units in the last place of the largest number that enters it; gradient to 1e-6 in norm."""
    x = (torch.rand(64, 32000, device=device) * 2 - 1) * limit
    target = torch.randint(0, 32000, (64,), device=device)
    loss, g = grad(tse.cross_entropy, x, target, reduction="none")
    want, want_g = grad(F.cross_entropy, x.double(), target, reduction="none")
    unit = 2.0**-23 * torch.logsumexp(x.double(), 1).abs().clamp_min(1)
    assert ((loss.double() - want).abs() <= 4 * unit).all()
    assert ((g.double() - want_g).norm(dim=1) <= 1e-6 * want_g.norm(dim=1)).all()


@for_cpu
@pytest.mark.parametrize("scale", [0.1, 1, 10])
@pytest.mark.parametrize("columns", [False, True])
def test_accuracy_of_float64(scale, columns):
    """Against 40 digits, within the same 4 units."""
    x = torch.randn(100, 10, dtype=torch.float64) * scale
    x = x.t().contiguous().t() if columns else x
    target = x.argmax(1)
    loss = tse.cross_entropy(x, target, reduction="none").tolist()
    with localcontext() as context:
        context.prec = 40
        for row, t, got in zip(x.tolist(), target.tolist(), loss, strict=True):
            want = sum((Decimal(v) - Decimal(row[t])).exp() for v in row).ln()
            assert abs(Decimal(got) - want) <= 4 * Decimal(2) ** -52 * max(abs(want + Decimal(row[t])), 1)


@pytest.mark.parametrize("classes", [10, 300])
def test_a_certain_prediction_costs_nothing_and_no_loss_is_negative(device, classes):
    x = torch.zeros(4, classes, device=device)
    x[:, 3] = torch.tensor([20.0, 40.0, 200.0, 1e30], device=device)
    loss = tse.cross_entropy(x, torch.full((4,), 3, device=device), reduction="none")
    want = ((classes - 1) * torch.tensor([-20.0, -40.0], dtype=torch.float64, device=device).exp()).log1p()
    torch.testing.assert_close(loss[:2].double(), want, rtol=1e-5, atol=0)
    assert (loss[2:] == 0).all()
    many = torch.randn(20000, classes // 2, device=device) * 10
    assert (tse.cross_entropy(many, many.argmax(1), reduction="none") >= 0).all()


@pytest.mark.parametrize("classes", [50, 300])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("columns", [False, True])
def test_ignored_rows_have_no_gradient_whatever_their_logits(device, classes, options, columns):
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
def test_impossible_classes_have_no_gradient_at_all(device, dtype, classes):
    x = torch.randn(4, classes, device=device).to(dtype)
    x[:, ::3] = -float("inf")
    for reduction in ("none", "sum", "sum"):
        g = grad(tse.cross_entropy, x, torch.full((4,), 1, device=device), reduction=reduction)[1]
        assert (g[:, ::3] == 0).all()
        assert (g[:, 1] != 0).all()


@dtypes
def test_nan_of_any_bits_stays_nan(device, dtype):
    """All bits set: a carry out of rounding to 16 bits would make it a zero."""
    x = torch.randn(2, 40, device=device).to(dtype).requires_grad_()
    loss = tse.cross_entropy(x, torch.tensor([1, 2], device=device), reduction="none")
    nan = torch.tensor([0x7FFFFFFF] * 2, dtype=torch.int32, device=device).view(torch.float32).to(loss.dtype)
    assert torch.autograd.grad(loss, x, nan)[0].isnan().all()


@for_cpu
@pytest.mark.parametrize("classes", [100, 300])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"softcap": 5.0}, {"probabilities": True}, {"metrics": True}], ids=str
)
def test_images_are_read_where_they_lie(classes, options):
    options = dict(options)
    x, target = torch.randn(2, classes, 32, 32, requires_grad=True), torch.randint(classes, (2, 32, 32))
    if options.pop("probabilities", False):
        target = torch.rand_like(x)
    metrics = options.pop("metrics", False)

    def loss(reduction):
        if metrics:
            return tse.cross_entropy_with_metrics(x, target, reduction=reduction, **options).loss.sum()
        return tse.cross_entropy(x, target, reduction=reduction, **options).sum()

    with torch.no_grad():
        assert peak_memory(lambda: loss("sum")) < 0.1 * x.nbytes
    for reduction in ("sum", "none"):  # the gradient in forward, and in backward
        assert peak_memory(lambda r=reduction: torch.autograd.grad(loss(r), x)) < 1.1 * x.nbytes


@for_cpu
@dtypes
@pytest.mark.parametrize("inner", [3, 7, 131])
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"softcap": 5.0, "z_loss_weight": 0.1}], ids=str)
@pytest.mark.parametrize("probabilities", [None, "of images", "of rows"])
def test_images_have_the_bits_of_rows(dtype, inner, options, probabilities):
    """Of more classes than the kernels of few take, with options that are computed row by row."""
    x = torch.randn(2, 300, inner, dtype=torch.float64).to(dtype)
    target = torch.randint(300, (2, inner))
    rows = x.movedim(1, -1).reshape(-1, 300)
    target_of_rows = target.reshape(-1)
    if probabilities:
        target_of_rows = rows.flip(1).softmax(1)
        target = target_of_rows.view(2, inner, 300).movedim(-1, 1)
        target = target.contiguous() if probabilities == "of images" else target
    for reduction in ("none", "sum"):
        loss, g = grad(tse.cross_entropy, x, target, reduction=reduction, **options)
        want, want_g = grad(tse.cross_entropy, rows, target_of_rows, reduction=reduction, **options)
        assert torch.equal(loss.reshape(-1), want.reshape(-1))
        assert torch.equal(g.movedim(1, -1).reshape(-1, 300), want_g)


@for_cpu
@dtypes
@pytest.mark.parametrize("classes", [10, 128, 300])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1, "temperature": 0.7}, {"label_smoothing": 0.1, "z_loss_weight": 0.1}],
    ids=str,
)
def test_same_gradient_bits_however_the_gradient_comes_in(dtype, classes, columns, options):
    x, target = logits_and_target("cpu", rows=21, classes=classes, dtype=dtype)
    x = x.t().contiguous().t() if columns else x
    weight = torch.rand(classes).to(torch.float64 if dtype == torch.float64 else torch.float32) + 0.5
    leaf = x.detach().requires_grad_()
    losses = tse.cross_entropy(leaf, target, weight, reduction="none", **options)
    one = torch.ones((), dtype=losses.dtype)
    (want,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses), retain_graph=True)
    assert torch.equal(torch.autograd.grad(losses, leaf, one.expand_as(losses))[0], want)
    assert torch.equal(grad(tse.cross_entropy, x, target, weight, reduction="sum", **options)[1], want)  # in forward
    for i in () if columns else range(1, 4):  # alone, rows have no columns
        assert torch.equal(grad(tse.cross_entropy, x[i], target[i], weight, reduction="none", **options)[1], want[i])


@for_cpu
@dtypes
@pytest.mark.parametrize("classes", [10, 300])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (65,)], ids=str)
def test_same_bits_in_any_batch_of_columns(dtype, classes, options, shape):
    x = torch.randn(70, *shape, classes, dtype=torch.float64).to(dtype)
    target = torch.randint(classes, x.shape[:-1])

    def first(n):  # as rows that are neighbours in memory
        columns = x[:n].t().contiguous().t() if shape == () else x[:n].movedim(-1, 1).contiguous()
        return grad(tse.cross_entropy, columns, target[:n], reduction="none", **options)

    loss, g = first(70)
    for n in (2, 63, 64):
        assert all(torch.equal(a, b[:n]) for a, b in zip(first(n), (loss, g), strict=True))


@for_cpu
def test_ignored_rows_have_no_gradient_whatever_the_weights():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.tensor([float("inf"), 1, 1, 1])
    loss = tse.cross_entropy(x, torch.tensor([1, -100, 2]), weight, label_smoothing=0.1, reduction="none")
    assert (torch.autograd.grad(loss.sum(), x)[0][1] == 0).all()


@for_cpu
def test_weights_that_cancel():
    x, weight = torch.tensor([[0.0, 1.0]], requires_grad=True), torch.tensor([1.0, -3.0])
    grads = [
        torch.autograd.grad(f(x, torch.tensor([0]), weight, label_smoothing=0.5, reduction="sum"), x)[0]
        for f in (tse.cross_entropy, F.cross_entropy)
    ]
    torch.testing.assert_close(*grads)


def test_class_weights_have_no_gradient(device):
    x, target = logits_and_target(device)
    weight = torch.ones(x.shape[1], device=device, requires_grad=True)
    for logits in (x, x.detach().requires_grad_(), x.detach().requires_grad_() * 1):
        for function in (tse.cross_entropy, tse.cross_entropy_with_metrics):
            with pytest.raises(RuntimeError, match="cross_entropy: weight: expected no gradient"):
                function(logits, target, weight)
    with pytest.raises(RuntimeError, match="cross_entropy: weight: expected no gradient"):
        tse.cross_entropy(logits, target, weight, inplace_backward=True)
    with torch.no_grad():
        assert torch.equal(tse.cross_entropy(x, target, weight), tse.cross_entropy(x, target))


# ---- in place of torch's own ---------------------------------------------------------------------------------------


def train(device, loss_module, steps=15):
    """A stock script: it knows nothing of this package."""
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
def test_drop_in(device, monkeypatch, replaced):
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
    """In the wider of the two, as torch."""
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
def test_no_classes(device, options):
    """Of class probabilities over nothing: as torch, NaN for the mean, and nothing divides by zero."""
    x, q = torch.empty(2, 0, device=device, requires_grad=True), torch.empty(2, 0, device=device, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        loss = tse.cross_entropy(x, q, reduction=reduction, **options)
        want = torch.nn.functional.cross_entropy(x, q, reduction=reduction, **options)
        torch.testing.assert_close(loss, want, equal_nan=True)
        loss.sum().backward()
    with pytest.raises(RuntimeError, match="cross_entropy: input: expected at least one class"):
        tse.cross_entropy_with_metrics(x, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_vmap_with_weights(device, dtype):
    """ignore_index beyond the classes, and weights of any precision."""
    torch.manual_seed(0)
    x, target = torch.randn(3, 500, 5, device=device), torch.randint(0, 5, (500,), device=device)
    target[:7] = 9
    weight = (torch.rand(5, device=device) + 0.5).to(dtype)

    def loss(x):
        return tse.cross_entropy(x, target, weight, ignore_index=9, z_loss_weight=0.1)

    got = torch.func.vmap(loss)(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.stack([loss(v) for v in x]))


def test_ignored_rows_that_are_not_finite(device):
    """Their gradient is 0 on every path."""
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


def test_logits_that_a_transform_does_not_differentiate(device):
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


def test_losses_of_any_number_of_rows(device):
    """Rows are finished several at a time; ignored ones, and ones that outgrow a block, among them."""
    for n in (3, 700, 9000):
        for rows in (1, 2, 15, 16, 17, 35):
            x, target = torch.randn(rows, n, device=device) * 3, torch.randint(0, n, (rows,), device=device)
            target[::3] = -100
            for reduction in ("none", "sum"):
                want = torch.nn.functional.cross_entropy(x.double(), target, reduction=reduction).float()
                got = tse.cross_entropy(x, target, reduction=reduction)
                torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
