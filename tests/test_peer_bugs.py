"""Bugs of other libraries. Each test fails with the behaviour that was reported there."""

import mmap

import pytest
import torch
import torch.nn.functional as F

import torch_softmax_ext as tse


def logits(device, *shape, scale=3.0, dtype=torch.float32):
    torch.manual_seed(0)
    return (torch.randn(shape) * scale).to(dtype).to(device).requires_grad_()


def targets(device, classes, *shape, ignored=0):
    t = torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(1)).to(device)
    t.view(-1)[:ignored] = -100
    return t


def test_reduction_none_weighs_each_row_by_its_gradient(device):
    """Liger-Kernel #680: with reduction="none" the gradient was computed as if every row's grad_output were 1."""
    x, t = logits(device, 6, 11), targets(device, 11, 6)
    g = torch.arange(6.0, device=device)
    (got,) = torch.autograd.grad(tse.cross_entropy(x, t, reduction="none"), x, g)
    (want,) = torch.autograd.grad(F.cross_entropy(x, t, reduction="none"), x, g)
    torch.testing.assert_close(got, want)
    assert got[0].abs().max() == 0


def test_ignored_rows_under_compile(device):
    """Liger-Kernel #1338: the compiled loss kept the number of counted targets of the first call."""
    compiled = torch.compile(lambda x, t: tse.cross_entropy(x * 1.0, t), fullgraph=True, backend="aot_eager")
    x = logits(device, 8, 11)
    for ignored in (0, 3, 6):
        t = targets(device, 11, 8, ignored=ignored)
        (got,) = torch.autograd.grad(compiled(x, t), x)
        (want,) = torch.autograd.grad(F.cross_entropy(x, t), x)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_smoothing_with_ignored_targets_and_weights(device, reduction):
    """pytorch #72056, #73205: ignored rows entered the smoothed loss, and its divisor used the weights differently."""
    x, t = logits(device, 8, 11), targets(device, 11, 8, ignored=3)
    w = torch.rand(11, device=device) + 0.1
    got = tse.cross_entropy(x, t, w, label_smoothing=0.3, reduction=reduction)
    log_p = x.log_softmax(1)
    rows = -0.7 * w[t.clamp_min(0)] * log_p.gather(1, t.clamp_min(0)[:, None])[:, 0] - 0.3 / 11 * (w * log_p).sum(1)
    rows = rows * (t != -100)
    want = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / w[t[t != -100]].sum()}[reduction]
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert grad[:3].abs().max() == 0


def test_mean_counts_only_what_is_not_ignored(device):
    """TransformerEngine #2476: the mean was divided by all tokens."""
    x, t = logits(device, 8, 11), targets(device, 11, 8, ignored=6)
    torch.testing.assert_close(tse.cross_entropy(x, t), tse.cross_entropy(x[6:], t[6:]))


def test_loss_of_bf16_logits_is_fp32(device):
    """Liger-Kernel #1430: the loss was rounded to bf16, so that 10.01 and 10.04 were the same."""
    x, t = logits(device, 4096, 50, scale=0.05, dtype=torch.bfloat16), targets(device, 50, 4096)
    got = tse.cross_entropy(x, t)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, F.cross_entropy(x.double(), t).float(), rtol=1e-6, atol=0)


def test_ignored_target_reads_nothing(device):
    """apex: -100 in the padding was used as an index, 400 bytes before the row."""
    if device.type == "cuda":
        pytest.skip("mapped memory is the host's")
    page, n = mmap.PAGESIZE, mmap.PAGESIZE // 4
    memory = mmap.mmap(-1, page)  # the row starts where the mapping starts
    x = torch.frombuffer(memory, dtype=torch.float32).view(1, n)
    t = torch.tensor([-100])
    for options in ({}, {"weight": torch.ones(n)}, {"label_smoothing": 0.1}, {"softcap": 2.0}, {"z_loss_weight": 1.0}):
        loss = tse.cross_entropy(x, t, reduction="sum", **options)
        assert loss == 0


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6])
def test_a_common_offset_changes_nothing(device, offset):
    """pytorch #195829: the loss of large logits with a large common offset lost its digits."""
    x = torch.randint(-8, 8, (5, 300), device=device).float()
    t = targets(device, 300, 5)
    for options in ({}, {"label_smoothing": 0.1}):
        torch.testing.assert_close(
            tse.cross_entropy(x + offset, t, **options), tse.cross_entropy(x, t, **options), rtol=1e-6, atol=1e-6
        )


def test_log_probabilities_are_never_positive(device):
    """verl #2656: the log-probability of a nearly certain token came out above 0."""
    torch.manual_seed(0)
    x = torch.randn(2000, 64, device=device) * 0.3
    t = torch.randint(0, 64, (2000,), device=device)
    x[torch.arange(2000, device=device), t] += torch.linspace(0, 40, 2000, device=device)
    assert tse.cross_entropy(x, t, reduction="none").min() >= 0


def test_z_loss_is_absent_when_off(device):
    """OLMo-core #702: the z-loss was added although it was off."""
    x, t = logits(device, 8, 11), targets(device, 11, 8)
    assert torch.equal(tse.cross_entropy(x, t, z_loss_weight=0.0), tse.cross_entropy(x, t))
    torch.testing.assert_close(tse.cross_entropy(x, t), F.cross_entropy(x, t))
    assert tse.cross_entropy_with_metrics(x, t).z_loss == 0


def test_gradient_in_place_does_not_change_saved_tensors(device):
    """Liger-Kernel #1251: writing the gradient over the logits changed a tensor that upstream had saved."""
    w, t = logits(device, 12, 11), targets(device, 11, 8)
    h = torch.randn(8, 12, device=device)
    y = torch.tanh(h @ w)  # tanh saves its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        tse.cross_entropy(y, t, inplace_backward=True).backward()
    torch.autograd.grad(tse.cross_entropy(h @ w, t, inplace_backward=True), w)  # a product does not


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"softcap": 3.0}], ids=["plain", "smoothing", "softcap"]
)
def test_expanded_and_strided_gradients(device, options):
    """Kernels that assumed a contiguous grad_output read beyond it, or the wrong rows."""
    x, t = logits(device, 6, 11), targets(device, 11, 6)
    y = tse.cross_entropy(x, t, reduction="none", **options)
    wide = torch.randn(6, 4, device=device)
    for g in (torch.full((), 0.5, device=device).expand(6), wide[:, 1], wide[:, 2].flip(0)):
        want = torch.autograd.grad(F.cross_entropy(capped(x, options), t, reduction="none", **smoothing(options)), x, g)
        torch.testing.assert_close(torch.autograd.grad(y, x, g, retain_graph=True), want)


def capped(x, options):
    return options["softcap"] * torch.tanh(x / options["softcap"]) if "softcap" in options else x


def smoothing(options):
    return {k: v for k, v in options.items() if k == "label_smoothing"}
