"""What a GPU machine without a network is given: machine code for it alone, and its size."""

from __future__ import annotations

import importlib
import io
import json
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import gpu_bundle
import gpu_libraries
import pytest
from quarter_hour import unpack
from quarter_hour.journal import read_lines

PTX, CODE = 1, 2


def fat_binary(*entries: tuple[int, int, bytes]) -> bytes:
    """(kind, GPU, contents) of each, in CUDA's format."""
    parts = [
        struct.pack("<HHIQQIII", kind, 1, 64, len(content), 0, 0, architecture, 0).ljust(64, b"\1") + content
        for kind, architecture, content in entries
    ]
    content = b"".join(parts)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(content)) + content


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Two fat binaries among other bytes, and their magic number where it means nothing."""
    file = tmp_path / "library.so"
    first = fat_binary((CODE, 80, b"A" * 100), (CODE, 90, b"H" * 50), (PTX, 90, b"P" * 30))
    second = fat_binary((CODE, 90, b"h" * 20), (CODE, 100, b"B" * 40))
    number = struct.pack("<I", 0xBA55ED50)
    file.write_bytes(b"\x7fELF" + number + b"code" * 5 + first + bytes(24) + second + b"rest" + number)
    return file


def test_other_gpus_are_blanked(library: Path) -> None:
    before = library.read_bytes()
    assert gpu_libraries.blanked(library, 90) == (70, 170)
    expected = before
    for blank in (b"A" * 100, b"P" * 30, b"B" * 40):
        expected = expected.replace(blank, bytes(len(blank)))
    assert library.read_bytes() == expected


def test_a_library_without_code_for_the_gpu_is_refused(library: Path) -> None:
    with pytest.raises(ValueError, match="has nothing for sm_80"):
        gpu_libraries.blanked(library, 80)


def test_a_release_that_is_written_otherwise_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("one\ntwo\n")
    gpu_libraries._change(file, "two\n", "before two\n")
    assert file.read_text() == "one\nbefore two\ntwo\n"
    with pytest.raises(ValueError, match="has to be looked at anew"):
        gpu_libraries._change(file, "three\n", "before three\n")


def test_the_folder_has_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; open(sys.argv[sys.argv.index('--out') + 1], 'wb').write(bytes(1 << 20))")
    arguments = ["--output", str(tmp_path / "bundle"), "--only", "libraries", "--script", str(script)]
    assert gpu_bundle.main([*arguments, "--limit", "1.1"]) == 0
    assert "site.tar.xz: 1.0 MiB, made by script.py" in capsys.readouterr().out
    assert gpu_bundle.main([*arguments, "--limit", "0.9"]) == 1
    shown = capsys.readouterr().out
    assert "made before" in shown and "1.0 MiB of at most 0.9" in shown


def test_half_an_archive_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a program that dies while it writes, and then by one that does not."""
    script, archive = tmp_path / "script.py", tmp_path / "bundle" / "site.tar.xz"
    arguments = ["--output", str(archive.parent), "--only", "libraries", "--script", str(script)]
    writes = "import sys; open(sys.argv[sys.argv.index('--out') + 1], 'wb').write(b'half'); "
    for program, wrong in ((writes + "sys.exit(3)", "exit status 3"), ("", "it has not written")):
        script.write_text(program)
        with pytest.raises(SystemExit, match=f"{script}: {wrong}"):
            gpu_bundle.main(arguments)
        assert not archive.exists()
    script.write_text(writes)
    assert gpu_bundle.main(arguments) == 0 and archive.read_bytes() == b"half"
    assert "made by" in capsys.readouterr().out


def test_libraries_for_another_gpu_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(archive: Path, downloads: Path, architecture: int) -> tuple[int, int]:
        archive.write_text(str(architecture))
        return 0, 0

    monkeypatch.setattr(gpu_libraries, "make_archive", make)
    arguments = ["--output", str(tmp_path), "--only", "libraries"]
    for architecture in ("90", "100"):
        for said in ("machine code", "made before"):
            gpu_bundle.main([*arguments, "--architecture", architecture])
            assert said in capsys.readouterr().out
            assert (tmp_path / "site.tar.xz").read_text() == architecture


def test_a_module_that_is_there_is_not_unpacked_again(tmp_path: Path) -> None:
    wheels, work, lines = tmp_path / "wheels", tmp_path / "work", tmp_path / "lines.jsonl"
    wheels.mkdir()
    for name in ("pytest", "no_such_module"):
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "version = 1")
    given = ["wheels", "libraries", "--bundle", str(tmp_path), "--work", str(work), "--findings", str(lines)]
    assert unpack.main(given) == 0
    first, second = read_lines(lines)[0]
    assert first["outcome"] == "ok" and first["figures"] == {"missing here": ["no_such_module-1.0-py3-none-any.whl"]}
    assert second["outcome"] == "skipped" and "site.tar.xz" in second["reason"]
    assert [path.name for path in (work / "wheels").iterdir()] == ["no_such_module"]
    assert json.loads(lines.read_text().splitlines()[0]) == first and "no_such_module" not in sys.modules


def test_half_a_wheel_is_unpacked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed within it: nothing is found that is not whole."""
    wheels, work = tmp_path / "wheels", tmp_path / "wheels-there"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "half_a_module-1.0-py3-none-any.whl", "w") as wheel:
        for name in ("half_a_module/__init__.py", "half_a_module/rest.py", "half_a_module-1.0.dist-info/METADATA"):
            wheel.writestr(name, "version = 1")
    monkeypatch.syspath_prepend(str(work))

    def killed(self: zipfile.ZipFile, folder: Path) -> None:
        self.extract("half_a_module/__init__.py", folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", killed)
        with pytest.raises(KeyboardInterrupt):
            unpack._unpack_wheels(wheels, work)
    (work / "half_a_module-1.0.dist-info").mkdir()  # killed again, between the moves
    importlib.invalidate_caches()
    assert unpack._unpack_wheels(wheels, work) == {"missing here": ["half_a_module-1.0-py3-none-any.whl"]}
    assert {path.name for path in work.rglob("*")} == {
        "half_a_module", "__init__.py", "rest.py", "half_a_module-1.0.dist-info", "METADATA",
    }  # fmt: skip
    importlib.invalidate_caches()
    assert unpack._unpack_wheels(wheels, work) == {"missing here": []}


@pytest.mark.parametrize(("dry", "outcome"), [([], "failed"), (["--dry-run"], "skipped")])
def test_kernels_for_another_triton(dry: list[str], outcome: str, tmp_path: Path) -> None:
    """A dry run on a CPU needs none; a GPU should have had them."""
    with tarfile.open(tmp_path / "kernels.tar.xz", "w:xz") as tar:
        content = json.dumps({"triton": "0.0.1", "build": "", "entries": []}).encode()
        member = tarfile.TarInfo("manifest.json")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    lines = tmp_path / "lines.jsonl"
    folders = ["--bundle", str(tmp_path), "--work", str(tmp_path / "work"), "--findings", str(lines)]
    assert unpack.main(["kernels", *folders, *dry]) == 0
    (line,) = read_lines(lines)[0]
    assert line["outcome"] == outcome and "compiled by Triton 0.0.1" in line["reason"]
