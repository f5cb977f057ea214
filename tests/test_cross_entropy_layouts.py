"""cross_entropy of rows, columns and images: the same bits in every layout, batch and gradient path, without copies."""

import pytest
import torch
from conftest import dtypes, for_cpu
from cross_entropy_cases import grad, logits_and_target

import torch_softmax_ext as tse
from torch_softmax_ext.testing.memory import peak_memory


@for_cpu
@dtypes
@pytest.mark.parametrize("inner", [3, 7, 131])
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"softcap": 5.0, "z_loss_weight": 0.1}], ids=str)
@pytest.mark.parametrize("probabilities", [None, "of images", "of rows"])
def test_images_have_the_bits_of_rows(dtype, inner, options, probabilities):
    """With more classes than lanes take, and options that need every class."""
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
@pytest.mark.parametrize("classes", [512, 513, 4096, 4097, 9000])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 5.0, "z_loss_weight": 0.1}], ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
def test_long_rows_of_any_kind_have_the_same_bits_in_every_layout(dtype, classes, options, probabilities):
    """Blocks that are far from the row's first logits are summed against another reference, and then joined."""
    rows = torch.randn(7, classes, dtype=torch.float64) * 3
    rows[0, -1] = 200
    rows[1, :-2] = -6e4
    rows[2, :-1] = -float("inf")
    rows[3, classes // 2] = float("nan")
    rows[4] = -6e4
    rows[5] *= 2e4 if dtype == torch.float16 else 1e30
    rows = rows.to(dtype)
    target = torch.randint(classes, (7,))
    target[6] = -100
    if probabilities:
        target = torch.rand(7, classes, dtype=torch.float64).softmax(1).to(dtype)
    for reduction in ("none", "sum"):  # gradient in backward, then in forward
        want = grad(tse.cross_entropy, rows, target, reduction=reduction, **options)
        got = grad(tse.cross_entropy, rows.t().contiguous().t(), target, reduction=reduction, **options)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    want = tse.cross_entropy_with_metrics(rows, target, **options)
    got = tse.cross_entropy_with_metrics(rows.t().contiguous().t(), target, **options)
    torch.testing.assert_close(tuple(got), tuple(want), rtol=0, atol=0, equal_nan=True)


@for_cpu
@dtypes
@pytest.mark.parametrize("classes", [10, 128, 300])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1, "temperature": 0.7}, {"label_smoothing": 0.1, "z_loss_weight": 0.1}],
    ids=str,
)
def test_gradient_bits_do_not_depend_on_strides_of_grad_output_or_the_guess(dtype, classes, columns, options):
    x, target = logits_and_target("cpu", rows=21, classes=classes, dtype=dtype)
    x = x.t().contiguous().t() if columns else x
    weight = torch.rand(classes).to(torch.float64 if dtype == torch.float64 else torch.float32) + 0.5
    leaf = x.detach().requires_grad_()
    losses = tse.cross_entropy(leaf, target, weight, reduction="none", **options)
    one = torch.ones((), dtype=losses.dtype)
    (want,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses), retain_graph=True)
    assert torch.equal(torch.autograd.grad(losses, leaf, one.expand_as(losses))[0], want)
    assert torch.equal(grad(tse.cross_entropy, x, target, weight, reduction="sum", **options)[1], want)  # in forward
    for i in () if columns else range(1, 4):  # a row alone has no columns
        assert torch.equal(grad(tse.cross_entropy, x[i], target[i], weight, reduction="none", **options)[1], want[i])


@for_cpu
@dtypes
@pytest.mark.parametrize("classes", [10, 300])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (65,)], ids=str)
def test_same_bits_in_any_batch_of_columns(dtype, classes, options, shape):
    x = torch.randn(70, *shape, classes, dtype=torch.float64).to(dtype)
    target = torch.randint(classes, x.shape[:-1])

    def first(n):
        columns = x[:n].t().contiguous().t() if shape == () else x[:n].movedim(-1, 1).contiguous()
        return grad(tse.cross_entropy, columns, target[:n], reduction="none", **options)

    loss, g = first(70)
    for n in (2, 63, 64):
        assert all(torch.equal(a, b[:n]) for a, b in zip(first(n), (loss, g), strict=True))


@for_cpu
@pytest.mark.parametrize("classes", [100, 300])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"softcap": 5.0}, {"probabilities": True}, {"metrics": True}], ids=str
)
def test_images_are_not_copied(classes, options):
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
    for reduction in ("sum", "none"):  # gradient in forward, then in backward
        assert peak_memory(lambda r=reduction: torch.autograd.grad(loss(r), x)) < 1.1 * x.nbytes


def test_losses_of_any_number_of_rows(device):
    """Among them ignored rows, and rows longer than a block; kernels finish several rows together."""
    for n in (3, 700, 9000):
        for rows in (1, 2, 15, 16, 17, 35):
            x, target = torch.randn(rows, n, device=device) * 3, torch.randint(0, n, (rows,), device=device)
            target[::3] = -100
            for reduction in ("none", "sum"):
                want = torch.nn.functional.cross_entropy(x.double(), target, reduction=reduction).float()
                got = tse.cross_entropy(x, target, reduction=reduction)
                torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
