"""Processes that are killed in the middle of a dump, full disks, and places that hold something else."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import pytest
import torch.distributed as dist

from dynamicemb import CheckpointError, DynamicEmbDump, DynamicEmbLoad, RemoteRankError
from dynamicemb.checkpoint import dump
from dynamicemb.checkpoint.files import staging
from dynamicemb.checkpoint.files.reader import Checkpoint
from tests.checkpoint.models import contents, digests, model, train
from tests.distributed import run_on_ranks
from tests.processes import kill_tree, torchrun

#: Every way in which a dump changes what is on disk.
SYSTEM_CALLS = ("open", "pwrite", "fsync", "posix_fallocate", "mkdir", "rename", "unlink", "rmdir")


def _sound(path: Path) -> dict[str, str]:
    """The files of the checkpoint at ``path``, all of which have been read and found right."""
    with Checkpoint(path) as checkpoint:
        for table in checkpoint.tables.values():
            scan = table.scan()
            for _ in scan:
                pass
            assert table.check_spans(scan.spans) == []
        return digests(checkpoint.path)


def _killed_at(call: int, action: Callable[[], None]) -> bool:
    """Runs ``action`` in a child that is killed at the ``call``-th change of the disk; whether it was."""
    child = os.fork()
    if child == 0:
        left = call

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return wrapper

        for name in SYSTEM_CALLS:
            setattr(os, name, counted(getattr(os, name)))
        staging._exchange = counted(staging._exchange)
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _kill_everywhere(rank: int, world_size: int, folder: str, exchange: bool) -> tuple[int, int]:
    path, module = Path(folder, "checkpoint"), model()
    if not exchange:
        staging._exchange = lambda first, second: False  # as on a file system that cannot
    train(module, range(2), rank, world_size)
    DynamicEmbDump(path, module, optim=True)
    old = _sound(path)
    train(module, range(2, 4), rank, world_size)
    DynamicEmbDump(Path(folder, "new"), module, optim=True)
    new = _sound(Path(folder, "new"))
    assert old != new
    shutil.copytree(path, Path(folder, "old"))
    call, found = 0, []
    while _killed_at(call, lambda: DynamicEmbDump(path, module, optim=True)):
        here = _sound(path)
        assert here in (old, new), f"killed at change {call}"
        found.append(here == new)
        assert path.exists() or not exchange
        if here == new:  # put the old one back, so that the next child has as much to do
            for left in Path(folder).glob("checkpoint*"):
                shutil.rmtree(left)
            shutil.copytree(Path(folder, "old"), path)
        call += 1
    assert _sound(path) == new and not list(Path(folder).glob("*.unfinished"))
    assert found == sorted(found), "the new one is there from one moment on"
    return call, sum(found)


@pytest.mark.parametrize("exchange", [pytest.param(True, marks=pytest.mark.slow), False])
def test_killed_at_any_point_the_checkpoint_is_whole(exchange: bool, tmp_path: Path) -> None:
    [(calls, after)] = run_on_ranks(1, _kill_everywhere, str(tmp_path), exchange)
    assert calls > 40 and after > 0


PROGRAM = """
import os, sys
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
from tests.checkpoint.models import model, train
from dynamicemb import DynamicEmbDump
torch.set_num_threads(1)
dist.init_process_group("gloo")
module = model()
step = 0
while True:
    train(module, range(step, step + 1), dist.get_rank(), dist.get_world_size())
    DynamicEmbDump({path!r}, module, optim=True)
    if dist.get_rank() == 0:
        print("dumped", step, flush=True)
    step += 1
"""


@pytest.mark.slow
def test_real_processes_killed_at_random_times(tmp_path: Path) -> None:
    """Two processes dump over and over; both are killed after a while, again and again."""
    path = tmp_path / "checkpoint"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(Path(__file__).parents[2]), path=str(path)))
    generator = random.Random(4)
    for round_number in range(3):
        command = [*torchrun(2), str(program)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(f"dumped {round_number + 1}"):
                    break
            time.sleep(generator.uniform(0.0, 0.1))
            kill_tree(process)
        _sound(path)
    assert run_on_ranks(1, _loadable, str(path)) == [True]


def _loadable(rank: int, world_size: int, path: str) -> bool:
    module = model()
    DynamicEmbLoad(path, module, optim=True)
    return all(contents(module).values())


def _no_room(rank: int, world_size: int, folder: str) -> str:
    """The second rank cannot write beyond a few hundred bytes."""
    path, module = Path(folder, "checkpoint"), model()
    train(module, range(2), rank, world_size)
    DynamicEmbDump(path, module, optim=True)
    old = _sound(path)
    train(module, range(2, 4), rank, world_size)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_checkpoint = dump.write_checkpoint

    def write_little(*arguments: Any) -> None:
        # From here on: the ranks of a test have met in a file, too.
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        write_checkpoint(*arguments)

    error: Optional[Exception] = None
    with mock.patch.object(dump, "write_checkpoint", write_little):
        try:
            DynamicEmbDump(path, module, optim=True)
        except Exception as caught:
            error = caught
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()  # rank 0 cleans up
    assert _sound(path) == old and not Path(folder, "checkpoint.unfinished").exists()
    DynamicEmbDump(path, module, optim=True)
    assert _sound(path) != old
    return f"{type(error).__name__}: {error}"


def test_a_full_disk_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    there, here = run_on_ranks(2, _no_room, str(tmp_path))
    assert here.startswith(CheckpointError.__name__) and "File too large" in here and "make room" in here
    assert there.startswith(RemoteRankError.__name__) and "rank 1" in there and "File too large" in there


def _taken(rank: int, world_size: int, folder: str) -> list[str]:
    module = model()
    train(module, range(2), rank, world_size)
    messages = []
    for name in ("file", "folder", "mixed", "broken"):
        path = Path(folder, name)
        before = _listing(path)
        try:
            DynamicEmbDump(path, module)
        except (CheckpointError, RemoteRankError) as error:
            messages.append(str(error))
        assert _listing(path) == before, name
        DynamicEmbDump(path, module, overwrite=True)
        _sound(path)
    DynamicEmbDump(Path(folder, "empty"), module)
    DynamicEmbDump(Path(folder, "link"), module)
    DynamicEmbDump(Path(folder, "a/b/new"), module)
    _sound(Path(folder, "empty"))
    return messages


def _listing(path: Path) -> list[str]:
    return sorted(str(entry) for entry in path.rglob("*")) if path.is_dir() else [path.read_bytes().hex()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_not_a_checkpoint_is_not_replaced(world_size: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    for name in ("mixed", "broken"):
        run_on_ranks(1, _dump_to, str(tmp_path / name))
    (tmp_path / "mixed" / "mine").write_text("mine")
    (tmp_path / "broken" / "manifest.json").write_text("{}")
    for messages in run_on_ranks(world_size, _taken, str(tmp_path)):
        assert len(messages) == 4 and all("overwrite=True" in message for message in messages)
        assert "other files, such as mine" in messages[2]
    assert (tmp_path / "link").is_symlink() and _sound(tmp_path / "elsewhere")


def _dump_to(rank: int, world_size: int, path: str) -> None:
    module = model()
    train(module, range(1), rank, world_size)
    DynamicEmbDump(path, module)
