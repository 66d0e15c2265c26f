"""The run: data, model, training loop, evaluation, report."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import generated_rows
import torch
import torch.distributed as dist
from batches import Batch, BatchMaker
from demo_options import DemoOptions
from evaluation import evaluate
from ranks import Ranks
from report import RunResult, print_result, print_resumed, table_results, training_progress, write_summary
from rows import CATEGORICAL, RowRange, RowSource, split_tail
from saving import SavedRun
from sharded_model import ShardedModel, build
from torch.nn import functional as F

from dynamicemb import DataError
from dynamicemb.kernels.engine import engine_name

#: Steps between two updates of the progress bar, each of which adds up numbers of all ranks.
STEPS_PER_UPDATE = 10


def run(options: DemoOptions, ranks: Ranks) -> None:
    """Trains, evaluates and reports. All ranks call it together.

    Raises:
        DynamicEmbError: a data file or an option that cannot be used.
    """
    training_rows, held_out_rows = load(options)
    device = ranks.join()
    sharded = build(options, ranks, device)
    maker = BatchMaker(
        batch_size=options.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=device,
        static_features=frozenset(CATEGORICAL) - options.dynamic,
        static_rows=options.capacity,
    )
    done = 0
    if options.load is not None:
        done = SavedRun(options.load, options, len(training_rows), ranks).load(sharded)
        if ranks.is_first:
            print_resumed(options.load, done, maker.steps(training_rows) * options.epochs)
    saved = None if options.save is None else SavedRun(options.save, options, len(training_rows), ranks)
    speed = train(sharded, maker, training_rows, options, ranks, done, saved)
    tables = table_results(sharded.model, options)
    quality = evaluate(sharded.model, maker, held_out_rows)
    if ranks.is_first:
        result = RunResult(
            auc=quality.auc,
            log_loss=quality.log_loss,
            rows=len(training_rows) * options.epochs,
            eval_rows=quality.rows,
            ids_per_second=speed,
            world_size=ranks.world_size,
            engine=engine_name(device),
            tables=tables,
        )
        print_result(result, options.save)
        if options.summary is not None:
            write_summary(result, options.summary)
    dist.destroy_process_group()


def load(options: DemoOptions) -> tuple[RowRange, RowRange]:
    """Rows to train on and rows to evaluate on."""
    source = _files(options.data) if options.data else generated_rows.generate(options.rows, options.seed)
    if options.eval_data:
        return _whole(source), _whole(_files(options.eval_data))
    if source.num_rows < 2:
        raise DataError("one row cannot be both trained on and held out; give more rows, or --eval-data")
    return split_tail(source)


def _files(paths: Sequence[Path]) -> RowSource:
    # A generated log needs no pyarrow, which reads files.
    import criteo_files

    return criteo_files.open_files(paths)


def _whole(source: RowSource) -> RowRange:
    return RowRange(source, 0, source.num_rows)


def train(
    sharded: ShardedModel,
    maker: BatchMaker,
    rows: RowRange,
    options: DemoOptions,
    ranks: Ranks,
    done: int = 0,
    saved: Optional[SavedRun] = None,
) -> float:
    """Trains on ``rows`` in the order of the log, after the ``done`` steps that were trained before; saves the run.

    Returns ids per second of all ranks together, 0 if there was nothing left to train: the median over the updates of
    the progress bar. Kernels that no earlier run has compiled are compiled in a few steps, mostly the first, which a
    mean would show instead of the speed.
    """
    sharded.model.train()
    steps_of_epoch = maker.steps(rows)
    steps = steps_of_epoch * options.epochs
    meter = _Meter(maker.device)
    speeds = []
    batches = itertools.chain.from_iterable(
        maker.batches(rows, max(0, done - epoch * steps_of_epoch)) for epoch in range(options.epochs)
    )
    with training_progress(steps, shown=ranks.is_first and done < steps) as show:
        for step, batch in enumerate(batches, start=done + 1):
            meter.add(batch, _train_step(sharded, batch, maker.world_size))
            if step % STEPS_PER_UPDATE == 0 or step == steps:
                loss, ids_per_second = meter.update()
                speeds.append(ids_per_second)
                show(step, loss, ids_per_second)
            if saved is not None and (step == steps or (options.save_every and step % options.save_every == 0)):
                saved.save(sharded, step)
    return statistics.median(speeds) if speeds else 0.0


def _train_step(sharded: ShardedModel, batch: Batch, world_size: int) -> torch.Tensor:
    """Returns the sum of the losses of this rank's rows.

    The gradient is that of the mean over the global batch, whatever each rank's share of it (none at all included): the
    model averages gradients over ranks, so each rank's sum is divided by the global rows and multiplied by the ranks.
    """
    sharded.dense_optimizer.zero_grad()
    logits = sharded.model(batch.dense, batch.sparse)
    loss = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="sum")
    (loss * (world_size / batch.global_rows)).backward()
    sharded.dense_optimizer.step()
    return loss.detach()


class _Meter:
    """Loss and speed over all ranks. Adds up on the device, so that only :meth:`update` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._since_update = torch.zeros(3, dtype=torch.float64, device=device)  # loss, rows, ids
        self._last_update = time.perf_counter()

    def add(self, batch: Batch, loss: torch.Tensor) -> None:
        self._since_update[0] += loss
        self._since_update[1] += len(batch.labels)
        self._since_update[2] += batch.sparse.values().numel()

    def update(self) -> tuple[float, float]:
        """Mean loss and ids per second since the last update, of all ranks; all of them call it together."""
        dist.all_reduce(self._since_update)
        loss, rows, ids = self._since_update.tolist()
        now = time.perf_counter()
        seconds = now - self._last_update
        self._since_update.zero_()
        self._last_update = now
        return loss / rows, ids / seconds
