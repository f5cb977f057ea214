"""DTensor inputs in two processes: replicated or sharded along rows, the results are those of plain tensors."""

import os

import pytest
import torch
import torch.multiprocessing as mp

import torch_softmax_ext as tse

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
RANKS = 2
OPTIONS = {"label_smoothing": 0.1, "z_loss_weight": 0.2, "softcap": 5.0, "temperature": 0.7}


def cases():
    """Tuples: name, function of tensors, tensors, class dimension of the first, indices of those differentiated."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def classes(count, *shape):
        return torch.randint(0, count, shape, generator=generator)

    for reduction in ("none", "mean", "sum"):
        for name, o in (("plain", {}), ("options", OPTIONS)):
            o = {**o, "reduction": reduction}
            y = classes(5, 6)
            y[0] = -100
            args = [normal(6, 5), y]
            yield f"cross_entropy-{name}-{reduction}", lambda *t, o=o: tse.cross_entropy(*t, **o), args, (0,)
            weighted = [*args, normal(5).exp()]
            yield f"weight-{name}-{reduction}", lambda *t, o=o: tse.cross_entropy(*t, **o), weighted, (0,)
            soft = [normal(6, 5), normal(6, 5).softmax(1)]
            yield f"probabilities-{name}-{reduction}", lambda *t, o=o: tse.cross_entropy(*t, **o), soft, (0,)
            image = [normal(4, 5, 6), classes(5, 4, 6)]
            yield f"image-{name}-{reduction}", lambda *t, o=o: tse.cross_entropy(*t, **o), image, (0,)
            yield (
                f"metrics-{name}-{reduction}",
                lambda *t, o=o: total(tse.cross_entropy_with_metrics(*t, **o)),
                [normal(6, 5), y],
                (0,),
            )
            yield (
                f"metrics-weight-{name}-{reduction}",
                lambda *t, o=o: total(tse.cross_entropy_with_metrics(*t, **o)),
                [normal(4, 5, 6), classes(5, 4, 6), normal(5).exp()],
                (0,),
            )
            yield (
                f"metrics-probabilities-{name}-{reduction}",
                lambda *t, o=o: total(tse.cross_entropy_with_metrics(*t, **o)),
                soft,
                (0,),
            )
            hidden = [normal(6, 3), y, normal(5, 3), normal(5), normal(5).exp()]
            yield (
                f"linear-{name}-{reduction}",
                lambda x, y, w, b, c, o=o: tse.linear_cross_entropy(x, w, y, linear_bias=b, weight=c, **o),
                hidden,
                (0, 2, 3),
            )
            yield (
                f"linear-probabilities-{name}-{reduction}",
                lambda x, y, w, o=o: tse.linear_cross_entropy(x, w, y, **o),
                [normal(6, 3), normal(6, 5).softmax(1), normal(5, 3)],
                (0, 2),
            )
            for alpha, loss in ((2, tse.sparsemax_loss), (1.5, tse.entmax15_loss), (1.3, tse.entmax_loss)):
                o = {"reduction": reduction} | ({"alpha": alpha} if alpha == 1.3 else {})
                for kind, tensors in (("indices", args), ("probabilities", soft), ("image", image)):
                    of = (0, 1) if kind == "probabilities" else (0,)
                    yield f"{kind}-{loss.__name__}-{reduction}", lambda *t, f=loss, o=o: f(*t, **o), tensors, of
            alphas = torch.linspace(1.1, 1.9, 6, dtype=torch.float64)[:, None]
            yield (
                f"alphas-{reduction}",
                lambda x, y, a, r=reduction: tse.entmax_loss(x, y, a, reduction=r),
                [*args, alphas],
                (0,),
            )
    yield "selective", tse.selective_log_softmax, [normal(6, 4, 5), classes(5, 6, 4)], (0,)
    yield (
        "entropy",
        lambda *t: sum(tse.selective_log_softmax(*t, return_entropy=True, temperature=0.7)),
        [normal(6, 4, 5), classes(5, 6, 4)],
        (0,),
    )
    yield "sparsemax", tse.sparsemax, [normal(6, 4, 5)], (0,)
    yield "sparsemax-middle", lambda x: tse.sparsemax(x, 1), [normal(6, 4, 5)], (0,)


def total(metrics):
    """The sum of each differentiable result."""
    return sum((i + 1) * metric.double().sum() for i, metric in enumerate(metrics))


def run(function, tensors, differentiated):
    y = function(*tensors)
    leaves = [tensors[i] for i in differentiated]
    return y, *torch.autograd.grad(y.square().sum(), leaves)


def full(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def check(name, function, tensors, differentiated, mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    leaves = [t.clone().requires_grad_(i in differentiated) for i, t in enumerate(tensors)]
    want = run(function, leaves, differentiated)
    rows = len(tensors[0])
    for placement in (Replicate(), Shard(0), Shard(2)):
        if placement == Shard(2) and not name.startswith("image"):
            continue
        placed = []
        for i, t in enumerate(tensors):
            p = placement
            if placement != Replicate() and (i > 1 or len(t) != rows):
                p = Replicate()  # weights
            if placement == Shard(2) and i == 1:
                p = Shard(1)  # the target has no dimension of classes
            placed.append(distribute_tensor(t, mesh, [p]).requires_grad_(i in differentiated))
        with CommDebugMode() as communication:
            got = run(function, placed, differentiated)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(full(a), b, msg=lambda m: f"{name} {placement}: {m}")  # noqa: B023
        with torch.no_grad():
            torch.testing.assert_close(full(function(*placed)), want[0])
        gathers = communication.get_comm_counts().get(torch.ops.c10d_functional.all_gather_into_tensor, 0)
        assert gathers == 0, (name, placement, communication.get_comm_counts())
        assert got[1].placements == placed[0].placements, (name, placement, got[1].placements)


def check_errors(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    def shard(t, dim):
        return distribute_tensor(t, mesh, [Shard(dim)])

    x, target = torch.randn(4, 6), torch.zeros(4, dtype=torch.long)
    for call in (
        lambda: tse.cross_entropy(shard(x, 1), shard(target, 0)),
        lambda: tse.cross_entropy(shard(x[0], 0), shard(target, 0)[0]),
        lambda: tse.cross_entropy_with_metrics(shard(x, 1), shard(target, 0)),
        lambda: tse.selective_log_softmax(shard(x, 1), shard(target, 0)),
        lambda: tse.sparsemax(shard(x, 1)),
        lambda: tse.sparsemax_loss(shard(x, 1), shard(target, 0)),
        lambda: tse.linear_cross_entropy(shard(x, 0), shard(x, 0), shard(target, 0)),
    ):
        with pytest.raises((NotImplementedError, RuntimeError), match="that is not sharded"):
            call()


def worker(rank, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = torch.distributed.init_device_mesh("cpu", (RANKS,))
    try:
        failed = []
        for case in cases():
            try:
                check(*case, mesh)
            except Exception as error:
                failed.append(f"{case[0]}: {type(error).__name__}: {str(error)[:400]}")
        assert not failed, "\n".join(failed)
        check_errors(mesh)
        torch.distributed.barrier()  # so that no process outlives its peer
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(worker, (tmp_path / "store",), nprocs=RANKS)
