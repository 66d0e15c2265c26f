"""The processes of a run: who this one is, and how one of them speaks for all."""

from __future__ import annotations

import datetime
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dynamicemb.cli.launch import record_failure
from dynamicemb.errors import ConfigError

#: How long a rank that failed waits for rank 0 to have said so, before it speaks itself.
REPORT_TIMEOUT = datetime.timedelta(seconds=10)
_REPORTED = "error reported"


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; without torchrun, the only one."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    store: dist.Store

    @staticmethod
    def from_environment() -> Ranks:
        if "RANK" not in os.environ:
            return Ranks(0, 1, 0, 1, dist.HashStore())
        store, rank, world_size = next(dist.rendezvous("env://"))
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        return Ranks(rank, world_size, local_rank, local_world_size, store)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def join(self) -> torch.device:
        """Makes the default process group; returns this rank's device: a GPU of its own (NCCL), or the CPU (gloo).

        Raises:
            ConfigError: the machine has GPUs, but fewer than ranks.
        """
        device = torch.device("cpu")
        if torch.cuda.is_available():
            if self.local_world_size > torch.cuda.device_count():
                raise ConfigError(
                    f"{self.local_world_size} ranks on a machine with {torch.cuda.device_count()} GPU(s); start one "
                    "rank for each GPU, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
                )
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("default group", self.store),
            rank=self.rank,
            world_size=self.world_size,
        )
        return device

    def report(self, error: Exception) -> None:
        """Prints ``error`` once, whether one rank raised it or all: rank 0 if it has it, else this one."""
        if not self.is_first:
            try:
                self.store.wait([_REPORTED], REPORT_TIMEOUT)
                return
            except RuntimeError:
                pass  # rank 0 has no error: it waits in a collective, and torchrun will end it
        print(f"error: {error}", file=sys.stderr, flush=True)
        record_failure(f"error: {error}")
        self.store.set(_REPORTED, "")
