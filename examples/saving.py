"""Saving a run, and taking it up where it was: at the end of it, or in the middle of an epoch.

``--save DIR`` is a checkpoint of the dynamic tables: what ``dynamicemb inspect DIR`` and ``dynamicemb verify DIR`` work
on. Beside it, ``DIR.rest-<step>`` has everything else: the dense part of the model with its optimizer, static tables,
and what the run was. It is written first, and the one before is removed last, so that a run that is killed at any
moment can be taken up: the step that the checkpoint has tells which rest belongs to it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from demo_options import DemoOptions
from ranks import Ranks
from rows import CATEGORICAL
from sharded_model import ShardedModel
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.optim.optimizers import in_backward_optimizer_filter

from dynamicemb import CheckpointError, ConfigError, DynamicEmbDump, DynamicEmbLoad
from dynamicemb.checkpoint.files.manifest import read_manifest
from dynamicemb.checkpoint.files.staging import finished

_DENSE, _STATIC = "dense.pt", "static"


class SavedRun:
    """Where a run is kept.

    Args:
        path: of the checkpoint.
        options: of this run.
        num_rows: rows that it trains on in each epoch.
        ranks: all of them call the methods together.
    """

    def __init__(self, path: Path, options: DemoOptions, num_rows: int, ranks: Ranks) -> None:
        self._path, self._ranks = path, ranks
        self._static = len(options.dynamic) < len(CATEGORICAL)
        #: What decides which rows a step trains on; a run goes on with the same.
        self._data = {"--batch-size": options.batch_size, "--seed": options.seed, "training rows": num_rows}

    def _rest(self, step: int) -> Path:
        return self._path.with_name(f"{self._path.name}.rest-{step}")

    def save(self, sharded: ShardedModel, step: int) -> None:
        """Saves the run after its ``step``-th step, in place of what was saved before."""
        rest = self._rest(step)
        unfinished = rest.with_name(f"{rest.name}.unfinished")
        if self._ranks.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            torch.save({"step": step, "data": self._data, **_dense_state(sharded)}, unfinished / _DENSE)
        dist.barrier()
        if self._static:
            dcp.save(_static_state(sharded), checkpoint_id=unfinished / _STATIC)
        if self._ranks.is_first:
            shutil.rmtree(rest, ignore_errors=True)
            os.replace(unfinished, rest)
        DynamicEmbDump(self._path, sharded.model, optim=True)
        if self._ranks.is_first:
            for other in self._path.parent.glob(f"{self._path.name}.rest-*"):
                if other != rest:
                    shutil.rmtree(other)
        dist.barrier()

    def load(self, sharded: ShardedModel) -> int:
        """Brings the model to where the run was saved; returns the number of steps it has done.

        Raises:
            CheckpointError: there is nothing that could be taken up.
            ConfigError: it was a run over other rows.
        """
        tables = read_manifest(finished(self._path)).tables
        step = next((record.clock for records in tables.values() for record in records.values()), 0)
        rest = self._rest(step)
        if not (rest / _DENSE).exists():
            raise CheckpointError(
                f"{rest}: no such folder, but {self._path} was saved after step {step}; keep the two together"
            )
        saved = torch.load(rest / _DENSE, weights_only=True)
        for name, value in self._data.items():
            if saved["data"][name] != value:
                raise ConfigError(f"{name} {value}: the run saved in {self._path} has {saved['data'][name]}; use that")
        parameters = _dense_parameters(sharded)
        with torch.no_grad():
            for name, value in saved["parameters"].items():
                parameters[name].copy_(value)
        sharded.dense_optimizer.load_state_dict(saved["optimizer"])
        if self._static:
            dcp.load(_static_state(sharded), checkpoint_id=rest / _STATIC)  # into the tables' own memory
        DynamicEmbLoad(self._path, sharded.model, optim=True)
        return step


def _dense_parameters(sharded: ShardedModel) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach() for name, parameter in in_backward_optimizer_filter(sharded.model.named_parameters())
    }


def _dense_state(sharded: ShardedModel) -> dict[str, Any]:
    return {"parameters": _dense_parameters(sharded), "optimizer": sharded.dense_optimizer.state_dict()}


def _static_state(sharded: ShardedModel) -> dict[str, Any]:
    """Rows and optimizer state of the static tables, as torchrec has them."""
    static = tuple(f".{table}.weight" for table in CATEGORICAL if table not in sharded.dynamic_tables)
    rows = {name: value for name, value in sharded.model.state_dict().items() if name.endswith(static)}
    states = {
        f"{name}.{state}": value
        for name, by_state in sharded.model.fused_optimizer.state_dict()["state"].items()  # type: ignore[union-attr]
        for state, value in by_state.items()
        if isinstance(value, ShardedTensor)
    }
    return {"rows": rows, "states": states}
