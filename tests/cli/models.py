"""What ``--model tests.cli.models:...`` names: functions without arguments that return a sharded, trained model."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from tests.checkpoint.models import model, train

NOT_A_FUNCTION = 3


def trained() -> nn.Module:
    """Relies on a process group that is there."""
    sharded = model()
    train(sharded, range(4), dist.get_rank(), dist.get_world_size())
    return sharded


def with_own_group() -> nn.Module:
    """As in a training script: makes the process group without asking whether there is one."""
    dist.init_process_group("gloo")
    return empty()


def with_another_backend() -> nn.Module:
    dist.init_process_group("mpi")
    return empty()


def empty() -> nn.Module:
    return model()


def collection_alone() -> nn.Module:
    """The collection of the model, which was a part of it when it was written."""
    return model().module.embeddings


def nothing() -> None:
    """Returns no model."""
