"""torch.func and forward-mode derivatives, over the spec of every operator."""

import pytest
import torch
from conftest import first, get, small_samples, specs
from torch.autograd import forward_ad


@pytest.mark.not_on_host
@small_samples
def test_func_transforms(spec, sample, device):
    s = get(spec, sample, device, torch.float64)
    x, v = s.input, torch.randn_like(s.input)

    def ours(x):
        return s.call(spec.op, x)

    def reference(x):
        return s.call(spec.reference, x)

    close = torch.testing.assert_close
    close(
        torch.func.grad(lambda x: ours(x).square().sum())(x), torch.func.grad(lambda x: reference(x).square().sum())(x)
    )
    for a, b in zip(torch.func.jvp(ours, (x,), (v,)), torch.func.jvp(reference, (x,), (v,)), strict=True):
        close(a, b)
    y, vjp = torch.func.vjp(ours, x)
    g = torch.randn_like(y)
    close(vjp(g)[0], torch.func.vjp(reference, x)[1](g)[0])
    close(torch.func.hessian(lambda x: ours(x).sum())(x), torch.func.hessian(lambda x: reference(x).sum())(x))
    batch = torch.stack([x, x + v, v])
    want = torch.stack([reference(b) for b in batch])
    close(torch.func.vmap(ours)(batch), want)
    close(torch.func.vmap(ours, in_dims=-1)(batch.movedim(0, -1)), want)
    grads = torch.func.vmap(torch.func.grad(lambda x: ours(x).square().sum()))(batch)
    close(grads, torch.stack([torch.func.grad(lambda x: reference(x).square().sum())(b) for b in batch]))
    with forward_ad.dual_level():
        y, t = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, v)))
    close((y, t), torch.func.jvp(reference, (x,), (v,)))


@specs
def test_vmap_does_not_loop(spec, device, recwarn):
    s = first(spec, device, torch.float32)
    torch.func.vmap(lambda x: s.call(spec.op, x))(s.input.expand(3, *s.input.shape))
    assert not [w for w in recwarn if "performance drop" in str(w.message)]
