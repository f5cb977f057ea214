"""Gradients for a batch of grad_outputs at once, by is_grads_batched and by torch.func.vmap."""

import pytest
import torch

import torch_softmax_ext as tse

OPTIONS = {
    "plain": {},
    "options": {"label_smoothing": 0.1, "z_loss_weight": 0.2, "softcap": 5.0, "temperature": 0.7},
}
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def cases():
    """Pairs of a name and a function of x, one for each path through autograd."""

    def indices(x):
        return torch.arange(len(x), device=x.device) % x.shape[1]

    for name, o in OPTIONS.items():
        for reduction in ("none", "mean", "sum"):
            k = {**o, "reduction": reduction}
            yield f"cross_entropy-{name}-{reduction}", lambda x, k=k: tse.cross_entropy(x * 2, indices(x), **k)
            yield (
                f"inplace-{name}-{reduction}",
                lambda x, k=k: tse.cross_entropy(x * 2, indices(x), inplace_backward=True, **k),
            )
            yield (
                f"probabilities-{name}-{reduction}",
                lambda x, k=k: tse.cross_entropy(x * 2, (x * 3).softmax(1), **k),
            )
            yield (
                f"metrics-{name}-{reduction}",
                lambda x, k=k: torch.cat(
                    [m.reshape(-1) for m in tse.cross_entropy_with_metrics(x * 2, indices(x), **k)[:3]]
                ),
            )
            yield (
                f"linear-{name}-{reduction}",
                lambda x, k=k: tse.linear_cross_entropy(
                    x * 2, x[:3] * 3, indices(x) % 3, linear_bias=x[:3, 0], chunk_size=2, **k
                ),
            )
    for name, o in {"plain": {}, "options": {"softcap": 5.0, "temperature": 0.7}}.items():
        yield f"selective-{name}", lambda x, o=o: tse.selective_log_softmax(x * 2, indices(x), **o)
        yield (
            f"entropy-{name}",
            lambda x, o=o: sum(tse.selective_log_softmax(x * 2, indices(x), return_entropy=True, **o)),
        )
    yield "sparsemax", lambda x: tse.sparsemax(x * 2)


CASES = dict(cases())
functions = pytest.mark.parametrize("name", CASES)


@functions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
def test_a_batch_gives_the_gradients_of_single_calls(name, dtype, way, device):
    f = CASES[name]
    x = torch.randn(5, 6, device=device).to(dtype).requires_grad_()
    g = torch.randn(4, *f(x).shape, device=device).to(f(x).dtype)
    want = torch.stack([torch.autograd.grad(f(x), x, row)[0] for row in g])
    if way == "vmap":
        y = f(x)
        got = torch.func.vmap(lambda row: torch.autograd.grad(y, x, row, retain_graph=True)[0])(g)
    else:
        (got,) = torch.autograd.grad(f(x), x, g, is_grads_batched=True)
    assert got.dtype == dtype
    eps = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=eps, atol=eps * want.abs().max().item())


@functions
def test_vectorized_jacobian(name, device):
    f = CASES[name]
    x = torch.randn(5, 6, device=device, dtype=torch.float64)
    want = torch.autograd.functional.jacobian(CASES[name.replace("inplace", "cross_entropy")], x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(f, x, vectorize=True), want)
    forward = torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode")
    torch.testing.assert_close(forward, want)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_batch_does_not_use_up_the_gradient_of_forward(scale, device):
    """A later backward through the same graph still gets it."""
    x = torch.randn(5, 6, device=device, requires_grad=True)
    target = torch.arange(5, device=device)
    (want,) = torch.autograd.grad(tse.cross_entropy(x * 2, target) * scale, x)
    loss = tse.cross_entropy(x * 2, target, inplace_backward=True) * scale
    torch.autograd.grad(loss, x, torch.ones(3, device=device), is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], want)
