"""How many processes abort at their very end, after their work is done; see ``dynamicemb/planner/gloo.py``.

    python benchmarks/process_end.py training statistics --processes 200 --busy-loops 2

Pairs of new processes are joined by gloo, do a little work, and end, with what ``dynamicemb`` registers for that and
without it. The more a machine has to do, the later gloo's threads get their turn.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).parents[1]
WORLD_SIZE = 2
STEPS = 3
TABLES = ["item", "country"]
ABORTED = "terminate called without an active exception"
TIMEOUT_SECONDS = 300


def reduce(folder: str) -> None:
    """torch alone, without anything that imports more."""
    for _ in range(STEPS):
        dist.all_reduce(torch.ones(1000))


def reduce_and_destroy(folder: str) -> None:
    reduce(folder)
    dist.destroy_process_group()


def refused(folder: str) -> None:
    """The only collective brings the planner's error to all ranks. Ends with exit code 1 and a traceback."""
    _model(num_embeddings=10**12)


def train(folder: str) -> nn.Module:
    """A few steps of a model with a dynamic and a static table."""
    model = _model(num_embeddings=1024)
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    for step in range(STEPS):
        features = KeyedJaggedTensor(keys=TABLES, values=torch.arange(64) + 16 * step, lengths=torch.full((16,), 4))
        rows = model(features).wait()
        torch.cat([rows[name].values() for name in TABLES]).sum().backward()
    return model


def _model(num_embeddings: int) -> nn.Module:
    """A dynamic and a static table, sharded over both ranks."""
    from processes import quieten_libraries

    quieten_libraries()
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import Topology
    from torchrec.distributed.planner.types import ParameterConstraints
    from torchrec.modules.embedding_configs import EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingCollection
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    from dynamicemb import DynamicEmbTableOptions
    from dynamicemb.planner import DynamicEmbeddingShardingPlanner, DynamicEmbParameterConstraints
    from dynamicemb.shard import DynamicEmbeddingCollectionSharder

    tables = [
        EmbeddingConfig(name=name, num_embeddings=num_embeddings, embedding_dim=8, feature_names=[name])
        for name in TABLES
    ]
    module = EmbeddingCollection(tables=tables, device=torch.device("meta"))
    apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": 0.1})
    constraints = {
        "item": DynamicEmbParameterConstraints(use_dynamicemb=True, dynamicemb_options=DynamicEmbTableOptions()),
        "country": ParameterConstraints(sharding_types=["row_wise"]),
    }
    topology = Topology(world_size=WORLD_SIZE, local_world_size=WORLD_SIZE, compute_device="cpu")
    planner = DynamicEmbeddingShardingPlanner(topology=topology, constraints=constraints, debug=False)
    sharders = [DynamicEmbeddingCollectionSharder()]
    plan = planner.collective_plan(module, sharders, dist.group.WORLD)
    return DistributedModelParallel(module, device=torch.device("cpu"), plan=plan, sharders=sharders)


def train_and_destroy(folder: str) -> None:
    train(folder)
    dist.destroy_process_group()


def statistics_last(folder: str) -> None:
    from dynamicemb.shard import table_statistics

    table_statistics(train(folder))


def dump_last(folder: str) -> None:
    from dynamicemb import DynamicEmbDump

    DynamicEmbDump(os.path.join(folder, "checkpoint"), train(folder), overwrite=True)


def error_last(folder: str) -> None:
    """Ends with exit code 1 and a traceback, as it should."""
    train(folder)
    raise ValueError("expected")


CASES: dict[str, tuple[Callable[[str], object], str]] = {
    "torch": (reduce, "torch alone, which ends after a collective"),
    "torch-destroy": (reduce_and_destroy, "torch alone, then `destroy_process_group()`"),
    "training": (train, "training"),
    "training-destroy": (train_and_destroy, "training, then `destroy_process_group()`"),
    "statistics": (statistics_last, "training, then `table_statistics`"),
    "dump": (dump_last, "training, then `DynamicEmbDump`"),
    "refused": (refused, "a plan that is refused"),
    "error": (error_last, "training, then an uncaught exception"),
}


def work(case: str, hook: bool, rank: int, folder: str) -> None:
    """What one process does, last of all."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    alone = case.startswith("torch")
    if alone and hook:
        _gloo_alone().let_threads_finish_at_exit(dist.group.WORLD)
    elif not alone and not hook:
        from dynamicemb.planner import gloo

        gloo._register = lambda: None  # type: ignore[assignment]
    CASES[case][0](folder)


def _gloo_alone() -> ModuleType:
    """``dynamicemb.planner.gloo`` alone: what else is imported has a part in how a process ends."""
    spec = importlib.util.spec_from_file_location("gloo", ROOT / "dynamicemb" / "planner" / "gloo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pair(case: str, hook: bool) -> list[tuple[int, str]]:
    """Exit code and stderr of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--work", case, str(int(hook))]
        processes = [
            subprocess.Popen([*command, str(rank), folder], stderr=subprocess.PIPE, text=True)
            for rank in range(WORLD_SIZE)
        ]
        texts = [process.communicate(timeout=TIMEOUT_SECONDS)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def measure(case: str, hook: bool, processes: int) -> tuple[int, int, list[str]]:
    """How many processes there were, how many aborted, and what else went wrong."""
    aborted, others, done = 0, [], 0
    expected = 1 if case in ("refused", "error") else 0
    while done < processes:
        for code, stderr in pair(case, hook):
            done += 1
            if code == -signal.SIGABRT and ABORTED in stderr:
                aborted += 1
            elif code != expected:
                others.append(f"exit code {code}: {stderr[-300:]}")
    return done, aborted, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=[], help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--processes", type=int, default=200, help="of each case")
    parser.add_argument("--hook", choices=("with", "without", "both"), default="both")
    parser.add_argument("--busy-loops", type=int, default=2, help="processes beside that keep a core busy each")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    from files import markdown_table
    from host import Host

    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.busy_loops)]
    rows = []
    try:
        for case in options.cases or CASES:
            for hook in {"with": (True,), "without": (False,), "both": (False, True)}[options.hook]:
                done, aborted, others = measure(case, hook, options.processes)
                load = f"{os.getloadavg()[0]:.1f}"
                rows.append(
                    (CASES[case][1], "with" if hook else "without", str(done), str(aborted), str(len(others)), load)
                )
                print(*rows[-1], *others[:3], sep=" | ", flush=True)
    finally:
        for loop in loops:
            loop.kill()
    host = Host.here()
    versions = ", ".join(f"{name} {version}" for name, version in host.versions.items())
    print(f"\n{datetime.date.today()}: {host.cpu}, {host.cores} cores, {host.system}; {versions}; ", end="")
    print(f"{options.busy_loops} busy loops of its own, beside what else the load shows.\n")
    header = ("what ran", "hook", "processes", "aborted", "failed otherwise", "load")
    print("\n".join(markdown_table(header, rows)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        # At the top level: the process ends right after the work, as a script does.
        work(sys.argv[2], sys.argv[3] == "1", int(sys.argv[4]), sys.argv[5])
    else:
        main()
