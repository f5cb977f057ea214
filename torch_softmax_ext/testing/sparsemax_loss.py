"""Specification of sparsemax_loss."""

import torch_softmax_ext as tse
from torch_softmax_ext.testing.entmax_losses import loss_spec

SPEC = loss_spec(tse.sparsemax_loss, tse.SparsemaxLoss, 2.0)
