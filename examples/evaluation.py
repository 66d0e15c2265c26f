"""How good the model is on rows that it has not been trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
import torch.distributed as dist
from batches import BatchMaker
from rows import RowRange
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc


@dataclass(frozen=True)
class Quality:
    """Over ``rows`` held-out rows of all ranks.

    Attributes:
        auc: area under the ROC curve; None if all labels are the same.
        log_loss: mean negative log-likelihood of the labels, in nats.
        rows: how many there were.
    """

    auc: Optional[float]
    log_loss: float
    rows: int


@torch.no_grad()
def evaluate(model: nn.Module, maker: BatchMaker, rows: RowRange) -> Quality:
    """The same on every rank; all of them call it together. Leaves the model in evaluation mode."""
    model.eval()
    shares = [torch.stack([model(batch.dense, batch.sparse), batch.labels]).cpu() for batch in maker.batches(rows)]
    gathered: list[torch.Tensor] = [torch.empty(0)] * maker.world_size
    dist.all_gather_object(gathered, torch.cat(shares, dim=1))
    logits, labels = torch.cat(gathered, dim=1).double()
    both_classes = 0 < int(labels.sum()) < labels.numel()
    return Quality(
        auc=float(binary_auroc(logits.sigmoid(), labels.int())) if both_classes else None,
        log_loss=float(F.binary_cross_entropy_with_logits(logits, labels)),
        rows=labels.numel(),
    )
