"""Specification of entmax15_loss."""

import torch_softmax_ext as tse
from torch_softmax_ext.testing.entmax_losses import loss_spec

SPEC = loss_spec(tse.entmax15_loss, tse.Entmax15Loss, 1.5)
