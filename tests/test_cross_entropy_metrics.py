"""cross_entropy_with_metrics: values, gradients and modes of all five results."""

import pytest
import torch
from conftest import reductions
from test_compile import options_of, with_compiled_autograd

import torch_softmax_ext as tse
from torch_softmax_ext.testing.cross_entropy import reference_with_metrics

OPTIONS = {
    "plain": {},
    "z-loss": {"z_loss_weight": 0.1, "temperature": 0.7},
    "all": {"label_smoothing": 0.2, "z_loss_weight": 0.1, "softcap": 5.0, "temperature": 2.0},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(device, dtype, shape=(8, 30), probabilities=False):
    torch.manual_seed(0)
    x = (torch.randn(shape, dtype=torch.float64) * 3).to(dtype).to(device)
    target = x.argmax(1)
    target.view(-1)[::2] = 1
    target.view(-1)[0] = -100
    if probabilities:
        target = torch.randn(shape, dtype=torch.float64, device=device).softmax(1).to(dtype)
    return x, target, torch.rand(shape[1], dtype=torch.float64, device=device) + 0.5


@options
@reductions
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("shape", [(8, 30), (3, 7, 5), (2, 9000), (8, 64)[::-1], (2, 200, 9)], ids=str)
def test_values_and_gradients(device, options, reduction, probabilities, shape):
    x, target, weight = make(device, torch.float64, shape, probabilities)
    x32, target32 = x.float().requires_grad_(), target.float() if probabilities else target
    got = tse.cross_entropy_with_metrics(x32, target32, weight.float(), reduction=reduction, **options)
    x.copy_(x32.detach()).requires_grad_()
    target = target32.double() if probabilities else target
    want = reference_with_metrics(x, target, weight, reduction=reduction, **options)
    for name, a, b in zip(got._fields, got, want, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=2e-5, atol=2e-5, msg=name)
    g = [torch.randn(b.shape, dtype=torch.float64, device=device) for b in want[:3]]
    (want_grad,) = torch.autograd.grad(want[:3], x, g)
    (got_grad,) = torch.autograd.grad(got[:3], x32, [v.float() for v in g])
    assert (got_grad - want_grad).norm() <= 3e-6 * want_grad.norm()


@pytest.mark.full_on_host
@pytest.mark.parametrize("output", ["loss", "z_loss", "lse"])
def test_each_output_alone_has_its_gradient(device, output):
    x, target, _ = make(device, torch.float64)

    def ours(x):
        return getattr(tse.cross_entropy_with_metrics(x, target, z_loss_weight=0.1), output)

    x.requires_grad_()
    assert torch.autograd.gradcheck(ours, (x,), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(ours, (x,), check_batched_grad=True)


def test_the_loss_has_the_bits_of_cross_entropy(device):
    x, target, weight = make(device, torch.float32)
    got = tse.cross_entropy_with_metrics(x, target, weight, z_loss_weight=0.1)
    assert torch.equal(got.loss, tse.cross_entropy(x, target, weight, z_loss_weight=0.1))
    assert not got.accuracy.requires_grad
    x.requires_grad_()
    got = tse.cross_entropy_with_metrics(x, target, weight)
    assert not got.accuracy.requires_grad
    assert not got.predictions.requires_grad
    assert got.z_loss.item() == 0  # no z-loss without z_loss_weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_predictions_are_argmax(device, dtype):
    x = torch.randint(-3, 3, (40, 5000)).to(dtype).to(device)  # many ties: the first one wins
    x[1, 7] = float("nan")
    x[2] = -float("inf")
    x[3, 4500] = float("inf")
    target = torch.zeros(40, dtype=torch.long, device=device)
    got = tse.cross_entropy_with_metrics(x, target)
    assert torch.equal(got.predictions[3:], torch.stack([(r == r.max()).nonzero()[0, 0] for r in x[3:]]))
    assert got.predictions[1] == 7
    assert got.predictions[2] == 0
    assert got.accuracy.dtype == torch.float32


def test_accuracy_and_mean_are_nan_if_nothing_is_counted(device):
    x, target, _ = make(device, torch.float32)
    got = tse.cross_entropy_with_metrics(x, torch.full_like(target, -100), reduction="sum")
    assert got.loss == 0
    assert got.accuracy.isnan()
    assert torch.equal(got.lse, torch.zeros_like(got.lse))


def test_compile_and_vmap(device):
    x, target, _ = make(device, torch.float32)

    def both(x):
        m = tse.cross_entropy_with_metrics(x * 1.5, target, z_loss_weight=0.1)
        return m.loss + m.lse.sum(), m.accuracy, m.predictions

    def grad(function):
        z = x.clone().requires_grad_()
        loss, accuracy, predictions = function(z)
        return torch.autograd.grad(loss, z)[0], accuracy, predictions

    for a, b in zip(grad(torch.compile(both, fullgraph=True, backend="aot_eager")), grad(both), strict=True):
        torch.testing.assert_close(a, b)
    xs = torch.stack([x, x.flip(1), 2 * x])
    loss = torch.func.vmap(lambda v: tse.cross_entropy_with_metrics(v, target).loss)(xs)
    torch.testing.assert_close(loss, torch.stack([tse.cross_entropy(v, target) for v in xs]))


@pytest.mark.not_on_host
def test_opcheck(device):
    x, target, weight = make(device, torch.float32, (4, 6))
    op = torch.ops.torch_softmax_ext.cross_entropy_with_metrics.default
    torch.library.opcheck(op, (x.requires_grad_(), target, weight), {"label_smoothing": 0.1, "z_loss_weight": 0.1})


def test_errors_name_the_operator(device):
    x, target, _ = make(device, torch.float32)
    with pytest.raises(TypeError, match="cross_entropy_with_metrics: temperature: expected float, got str"):
        tse.cross_entropy_with_metrics(x, target, temperature="hot")
    with pytest.raises(ValueError, match=r"cross_entropy.*: softcap: expected None or a positive number"):
        tse.cross_entropy_with_metrics(x, target, softcap=-1.0)


@pytest.mark.not_on_host
@pytest.mark.parametrize("options", list(options_of(tse.cross_entropy_with_metrics)), ids=str)
@pytest.mark.parametrize(
    "outputs", [(0, 1, 2), *(pytest.param(o, marks=pytest.mark.full) for o in [(0,), (1, 2)])], ids=str
)
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
def test_compiled_autograd(device, options, outputs, probabilities):
    x = torch.randn(7, 30, device=device)
    target = torch.randint(0, 30, (7,), device=device) if not probabilities else x.flip(1).softmax(1)

    def run():
        leaf = x.clone().requires_grad_()
        metrics = tse.cross_entropy_with_metrics(leaf * 1.5, target, **options)
        loss = sum(metrics[i].square().sum() for i in outputs)
        return *(m.detach() for m in metrics), torch.autograd.grad(loss, leaf)[0]

    torch.testing.assert_close(with_compiled_autograd(run), run())
