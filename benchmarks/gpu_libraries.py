"""fbgemm and TorchRec for a GPU machine without a network, in an archive a tenth of the size of fbgemm's wheel.

A wheel of fbgemm-gpu has 465 MB, 2.5 GB unpacked, nearly all of it machine code for GPUs of every generation. The
loader of CUDA takes the one piece for its GPU out of each bundle of machine code ("fat binary"), and of the others it
reads the headers alone. So their contents are blanked: offsets stay as they are, and a sparse archive leaves out what
is blank. Three libraries that training never calls are left out.
"""

from __future__ import annotations

import mmap
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["LIBRARIES", "blanked", "fetched", "make_archive"]

PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
#: What the machine lacks: fbgemm and TorchRec in the releases for its torch 2.11, and what TorchRec imports.
LIBRARIES = (
    "fbgemm-gpu==1.6.0", "torchrec==1.6.1", "tensordict==0.15.3", "pyvers==0.2.3", "torchmetrics==1.0.3",
    "iopath==0.1.9",
)  # fmt: skip

#: Without these, training with tables of fixed batches is complete: inference, variable batches, global weight decay.
_LEFT_OUT = (
    "fbgemm_gpu_tbe_inference", "fbgemm_gpu_tbe_training_backward_vbe", "fbgemm_gpu_tbe_training_backward_gwd",
)  # fmt: skip
# fbgemm_gpu loads its libraries by a list, and describes operations of the one for inference: both learn what is there.
_CHANGES = {
    "__init__.py": (
        "libraries_to_load = {\n",
        "fbgemm_gpu_libraries = [name for name in fbgemm_gpu_libraries if name not in {left_out!r}]\n",
    ),
    "sparse_ops.py": (
        '        for dkey in ["CompositeImplicitAutograd", "Meta"]:\n',
        '        if not hasattr(torch.ops.fbgemm, op_name.rpartition("::")[2]):\n            return\n',
    ),
}

# Of a fat binary: magic number, version, bytes of this header, bytes of all entries; of an entry: kind, bytes of its
# header, bytes of its contents, GPU that it is for (90 for sm_90). Numbers are little-endian.
_BINARY, _MAGIC, _VERSION, _HEADER_BYTES = struct.Struct("<IHHQ"), 0xBA55ED50, 1, 16
_ENTRY, _MACHINE_CODE = struct.Struct("<HxxIQ12xI"), 2
#: The dictionary spans machine code of kernels that resemble each other over hundreds of megabytes.
_COMPRESSION = "xz --threads=1 --lzma2=preset=3,dict=256MiB"


def fetched(requirements: Sequence[str], folder: Path) -> list[Path]:
    """Wheels of these requirements for the machine's Python, by pip; those in ``folder`` are not fetched again."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"]
    options += [f"--platform={platform}" for platform in PLATFORMS]
    wheels = []
    for requirement in requirements:
        target = folder / requirement
        if not list(target.glob("*.whl")):
            command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(target), requirement]
            subprocess.run(command, check=True)
        (wheel,) = target.glob("*.whl")
        wheels.append(wheel)
    return wheels


def _entries(code: mmap.mmap, begin: int, end: int) -> Iterator[tuple[bool, int, int, int]]:
    """(whether it is machine code, its GPU, begin, end of its contents) of the entries of one fat binary.

    Raises:
        ValueError: there is none there.
    """
    while begin < end:
        kind, header_bytes, content_bytes, architecture = _ENTRY.unpack_from(code, begin)
        first, begin = begin + header_bytes, begin + header_bytes + content_bytes
        if header_bytes < _ENTRY.size or begin > end:
            raise ValueError("an entry does not fit into its fat binary")
        yield kind == _MACHINE_CODE, architecture, first, begin


def blanked(library: Path, architecture: int) -> tuple[int, int]:
    """Overwrites machine code for other GPUs with zeros, in place. Returns bytes of it that stay, and that went.

    Raises:
        ValueError: a fat binary has nothing for ``architecture``.
    """
    stayed = went = 0
    with library.open("r+b") as file, mmap.mmap(file.fileno(), 0) as code:
        place = code.find(_MAGIC.to_bytes(4, "little"))
        while 0 <= place <= len(code) - _BINARY.size:
            _, version, header_bytes, content_bytes = _BINARY.unpack_from(code, place)
            begin, end = place + header_bytes, place + header_bytes + content_bytes
            if (version, header_bytes) != (_VERSION, _HEADER_BYTES) or end > len(code):
                end = place + 4  # the number, for another reason
            else:
                entries = list(_entries(code, begin, end))
                if not any(is_code and its == architecture for is_code, its, _, _ in entries):
                    raise ValueError(f"{library.name} has nothing for sm_{architecture}")
                for is_code, its, first, last in entries:
                    if is_code and its == architecture:
                        stayed += last - first
                    else:
                        code[first:last] = bytes(last - first)
                        went += last - first
            place = code.find(_MAGIC.to_bytes(4, "little"), end)
    return stayed, went


def _change(file: Path, anchor: str, addition: str) -> None:
    text = file.read_text()
    if text.count(anchor) != 1:
        raise ValueError(f"{file}: there is not one {anchor.strip()!r}: this release has to be looked at anew")
    file.write_text(text.replace(anchor, addition + anchor))


def make_archive(archive: Path, wheels: Path, architecture: int) -> tuple[int, int]:
    """Fetches, blanks and packs. Takes minutes, and 3 GB of the folder for temporary files. Interrupted, it may leave
    half an archive.

    Returns:
        Bytes of machine code that stayed, and that went.
    """
    with tempfile.TemporaryDirectory(prefix="gpu-libraries-") as temporary:
        site = Path(temporary)
        for wheel in fetched(LIBRARIES, wheels):
            with zipfile.ZipFile(wheel) as content:
                content.extractall(site, [name for name in content.namelist() if Path(name).stem not in _LEFT_OUT])
        for name, (anchor, addition) in _CHANGES.items():
            _change(site / "fbgemm_gpu" / name, anchor, addition.format(left_out=_LEFT_OUT))
        sizes = [blanked(library, architecture) for library in sorted((site / "fbgemm_gpu").rglob("*.so"))]
        for library in site.rglob("*.so"):
            subprocess.run(["fallocate", "--dig-holes", str(library)], check=True)
        command = ["tar", "--create", "--sparse", "--sort=name", "--mtime=@0", "--owner=0", "--group=0"]
        command += [f"--use-compress-program={_COMPRESSION}", f"--file={archive.resolve()}", f"--directory={site}"]
        subprocess.run([*command, *sorted(path.name for path in site.iterdir())], check=True)
    return sum(stayed for stayed, _ in sizes), sum(went for _, went in sizes)
