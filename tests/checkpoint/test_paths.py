"""What is no path of a file system is refused wherever paths come in, and nothing is made of it; odd ones are taken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from dynamicemb import CheckpointError, ConfigError, DynamicEmbDump, DynamicEmbError, DynamicEmbLoad, incremental_dump
from dynamicemb.checkpoint import dcp
from dynamicemb.checkpoint.convert import convert, detect
from dynamicemb.checkpoint.files.paths import local_path
from dynamicemb.checkpoint.files.reader import Checkpoint
from dynamicemb.checkpoint.files.writer import CheckpointWriter
from dynamicemb.checkpoint.inspection.verify import verify
from dynamicemb.checkpoint.merge import merge
from tests.checkpoint.histories import History, files
from tests.checkpoint.models import model
from tests.cli.command import dynamicemb
from tests.distributed import run_on_ranks

URLS = [
    "s3://bucket/day1", "S3://bucket", "gs://bucket/x", "hdfs:///data", "memory://x", "local:///tmp/x", "https://host/x",
    "file:///tmp/x", "file:/tmp/x", "FILE:///tmp/x", "abfs+x.y-z://c@a/x", "simplecache::s3://bucket/x", "zip://x::file:///y",
    "s3:/bucket/day1",
]  # fmt: skip
NO_PATHS: list[Any] = [None, 3, True, b"/tmp/x", "", "a\0b", ["a"], {}, *URLS, Path("s3://bucket/day1")]
LOCAL = ["a:b", "s3:", "s3:bucket", "a:/b", "./s3:/bucket", "/tmp/s3://x", "with space", "x/file:y", "1a://x", "~x~"]


class _Own:
    """A path of another library."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def __fspath__(self) -> Any:
        return self.path

    def __repr__(self) -> str:  # without an address: workers must give a test the same name
        return f"_Own({self.path!r})"


@pytest.mark.parametrize("path", [*NO_PATHS, _Own("s3://bucket"), _Own(b"x"), PurePosixPath("gs://b")], ids=repr)
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        local_path(path, "dst")
    message = str(raised.value)
    assert message.startswith("dst=") and ("; " in message)
    if message.lower().startswith("dst='file:"):
        assert "give the plain path, such as '/tmp/x'" in message
    elif "is a URL" in message:
        assert "local or shared folder" in message


@pytest.mark.parametrize("path", LOCAL)
def test_other_names_are_taken_as_they_are(path: str) -> None:
    assert local_path(path) == local_path(_Own(path)) == Path(path)


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert local_path("~/x") == local_path(Path("~/x")) == Path("/home/somebody/x")
    assert local_path("~") == Path("/home/somebody") and local_path("x/~") == Path("x/~")


def _calls(good: str) -> dict[str, Callable[[Any], Any]]:
    """Everything that takes a path and needs no model."""
    return {
        "Checkpoint": Checkpoint,
        "CheckpointWriter": CheckpointWriter,
        "verify": verify,
        "detect": detect,
        "convert from": lambda path: convert(path, "dst", "native"),
        "convert to": lambda path: convert(good, path, "parquet"),
        "merge from": lambda path: merge([path], "dst"),
        "merge with": lambda path: merge([good, path], "dst"),
        "merge to": lambda path: merge([good], path),
    }


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A checkpoint, in whose folder the test runs."""
    monkeypatch.chdir(tmp_path)
    history = History()
    history.step({1: 1, 2: 2}, set())
    return str(history.write(tmp_path / "good"))


@pytest.mark.parametrize("name", list(_calls("")))
def test_everything_refuses_them_and_makes_nothing(name: str, good: str) -> None:
    for path in NO_PATHS:
        with pytest.raises(ConfigError):
            _calls(good)[name](path)
        assert os.listdir() == ["good"], path


def test_one_path_is_no_chain(good: str) -> None:
    for path in (good, Path(good)):
        with pytest.raises(ConfigError, match="is one path; give a list"):
            merge(path, "dst")  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["a:b", "s3:", "with space"])
def test_local_names_with_colons(path: str, good: str) -> None:
    merge([good], path)
    assert files(Path(path)) == files(Path(good)) and not verify(path).findings
    assert dynamicemb("verify", path).code == 0


@pytest.mark.parametrize("url", URLS)
def test_the_command_refuses_urls(url: str, good: str) -> None:
    for arguments in (
        ("inspect", url), ("inspect", good, "--plot", url), ("verify", url), ("get", url, "item", 1),
        ("diff", good, url),
        ("diff", url, good), ("merge", good, url, "dst"), ("merge", good, good, url), ("merge", url, good, "dst"),
        ("convert", url, "dst", "--to", "native"), ("convert", good, url, "--to", "parquet"),
        ("dump", "--model", "x:y", "--path", url), ("load", "--model", "x:y", "--path", good, "--path", url),
    ):  # fmt: skip
        result = dynamicemb(*arguments, columns=400)
        assert result.code == 2 and "is a URL" in result.err and not result.out, arguments
        assert os.listdir() == ["good"], arguments


def _with_a_model(rank: int, world_size: int, folder: str) -> None:
    os.chdir(folder)
    module = model(tables=1)
    DynamicEmbDump("good", module)
    calls: dict[str, Callable[[Any], Any]] = {
        "dump": lambda path: DynamicEmbDump(path, module),
        "overwrite": lambda path: DynamicEmbDump(path, module, overwrite=True),
        "delta": lambda path: incremental_dump(path, module, 0),
        "load": lambda path: DynamicEmbLoad(path, module),
        "load a chain": lambda path: DynamicEmbLoad(["good", path], module),
    }
    for name, call in calls.items():
        for path in NO_PATHS:
            if name == "load" and path in (["a"], {}):
                continue  # a chain of paths that there are not, and one of none
            # Wrong on one rank alone, it is an error on all of them.
            with pytest.raises(DynamicEmbError):
                call(path if rank == world_size - 1 else "good" if name.startswith("load") else "other")
            assert os.listdir() == ["good"], (name, path)
    for url in URLS:
        with pytest.raises(DynamicEmbError, match=r"since=.*is a URL"):  # rank 0 looks at it and tells the others
            incremental_dump("delta", module, url)
        with pytest.raises(ConfigError, match=r"checkpoint_id=.*is a URL"):
            dcp.load(module, url)
    assert os.listdir() == ["good"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_models_refuse_them_on_all_ranks(world_size: int, tmp_path: Path) -> None:
    run_on_ranks(world_size, _with_a_model, str(tmp_path))


def test_files_in_the_way_are_one_error(good: str) -> None:
    Path("file").write_text("mine")
    Path("folder").mkdir()
    Path("folder/mine").write_text("mine")
    for name, call in _calls(good).items():
        for path in ("file", "file/below", "nothing", "x" * 300, "/proc/below"):
            if path == "nothing" and name.split()[-1] in ("to", "CheckpointWriter"):
                continue
            if name == "verify":
                assert verify(path).findings
            elif name == "CheckpointWriter":
                with pytest.raises(CheckpointError, match=path), CheckpointWriter(path):
                    pass
            else:
                with pytest.raises(CheckpointError, match=path):
                    call(path)
    for call in (lambda: merge([good], "folder"), lambda: convert(good, "folder", "parquet")):
        with pytest.raises(CheckpointError, match=r"folder.*overwrite"):
            call()
    assert sorted(os.listdir()) == ["file", "folder", "good"]
    assert Path("file").read_text() == Path("folder/mine").read_text() == "mine"
