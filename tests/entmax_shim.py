"""The names of the entmax package (https://github.com/deep-spin/entmax, MIT) on torch_softmax_ext.

``k``, ``n_iter`` and ``ensure_sum_one`` have no effect: every threshold is found to rounding. What has no counterpart,
normmax and budget, is at the end, and raises when it is used.
"""

import torch_softmax_ext as tse


def sparsemax(X, dim=-1, k=None):
    return tse.sparsemax(X, dim)


def entmax15(X, dim=-1, k=None):
    return tse.entmax15(X, dim)


def sparsemax_bisect(X, dim=-1, n_iter=50, ensure_sum_one=True):
    return tse.sparsemax(X, dim)


def entmax_bisect(X, alpha=1.5, dim=-1, n_iter=50, ensure_sum_one=True):
    return tse.entmax(X, alpha, dim)


class Sparsemax(tse.Sparsemax):
    def __init__(self, dim=-1, k=None):
        super().__init__(dim)


class Entmax15(tse.Entmax15):
    def __init__(self, dim=-1, k=None):
        super().__init__(dim)


class SparsemaxBisect(tse.Sparsemax):
    def __init__(self, dim=-1, n_iter=None):
        super().__init__(dim)


class EntmaxBisect(tse.Entmax):
    def __init__(self, alpha=1.5, dim=-1, n_iter=50):
        super().__init__(alpha, dim)


def _sparsemax_threshold_and_support(X, dim=-1, k=None):
    p = tse.sparsemax(X, dim)
    return (X - p).amax(dim, keepdim=True), (p > 0).sum(dim, keepdim=True)


def _entmax_threshold_and_support(X, dim=-1, k=None):
    """Of logits that are halved already."""
    p = tse.entmax15(2 * X, dim)
    return (X - p.sqrt()).amax(dim, keepdim=True), (p > 0).sum(dim, keepdim=True)


def sparsemax_loss(X, target, k=None):
    return tse.sparsemax_loss(X, target, reduction="none")


def entmax15_loss(X, target, k=None):
    return tse.entmax15_loss(X, target, reduction="none")


def sparsemax_bisect_loss(X, target, n_iter=50):
    return tse.sparsemax_loss(X, target, reduction="none")


def entmax_bisect_loss(X, target, alpha=1.5, n_iter=50):
    return tse.entmax_loss(X, target, alpha, reduction="none")


def _options(ignore_index, reduction):
    return {"ignore_index": ignore_index, "reduction": {"elementwise_mean": "mean"}.get(reduction, reduction)}


class SparsemaxLoss(tse.SparsemaxLoss):
    def __init__(self, k=None, ignore_index=-100, reduction="elementwise_mean"):
        super().__init__(**_options(ignore_index, reduction))


class Entmax15Loss(tse.Entmax15Loss):
    def __init__(self, k=100, ignore_index=-100, reduction="elementwise_mean"):
        super().__init__(**_options(ignore_index, reduction))


class SparsemaxBisectLoss(tse.SparsemaxLoss):
    def __init__(self, n_iter=50, ignore_index=-100, reduction="elementwise_mean"):
        super().__init__(**_options(ignore_index, reduction))


class EntmaxBisectLoss(tse.EntmaxLoss):
    def __init__(self, alpha=1.5, n_iter=50, ignore_index=-100, reduction="elementwise_mean"):
        super().__init__(alpha, **_options(ignore_index, reduction))


def _missing(name):
    def function(*args, **options):
        raise NotImplementedError(f"{name}: not in torch_softmax_ext")

    function.__name__ = name
    return function


normmax_bisect, budget_bisect = _missing("normmax_bisect"), _missing("budget_bisect")
normmax_bisect_loss, NormmaxBisectLoss = _missing("normmax_bisect_loss"), _missing("NormmaxBisectLoss")
NormmaxBisect, BudgetBisect = _missing("NormmaxBisect"), _missing("BudgetBisect")
