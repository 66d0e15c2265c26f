"""What is installed either fits together, or one error names the versions and the command that mends it."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from dynamicemb import installation
from dynamicemb.errors import InstallationError
from dynamicemb.installation import FBGEMM_BY_TORCH, TORCHREC, require_torchrec
from tests.processes import TIMEOUT_SECONDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

FITTING = {"fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0", "torchmetrics": "1.0.3"}

Install = Callable[[str, Mapping[str, str]], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes it look as if a version of torch and certain distributions were installed. Every module can be imported."""

    def pretend(torch_version: str, versions: Mapping[str, str]) -> None:
        monkeypatch.setattr(installation.torch, "__version__", torch_version)
        monkeypatch.setattr(installation.torch.version, "cuda", None if torch_version.endswith("+cpu") else "13.0")
        monkeypatch.setattr(installation, "_version", versions.get)
        wanted = ["fbgemm-gpu", "torchmetrics==1.0.3", "sphinx==1; extra == 'docs'"]
        monkeypatch.setattr(installation.metadata, "requires", lambda name: wanted)

    return pretend


def message() -> str:
    """The message of the error that the check ends in."""
    with pytest.raises(InstallationError) as caught:
        require_torchrec()
    assert isinstance(caught.value, ImportError)
    return str(caught.value)


@pytest.mark.parametrize("torch_version", ["2.13.0", "2.13.1+cpu", "2.13.0+cu130", "2.13.0.post1"])
def test_a_pair_that_fits_passes(install: Install, torch_version: str) -> None:
    install(torch_version, FITTING)
    require_torchrec()


@pytest.mark.parametrize("suffix", ["", "+cpu", ".post1", "+cu130", ".post2+rocm6.4", "+xpu"])
def test_a_pair_that_does_not_fit_is_refused_in_every_build_of_torch(install: Install, suffix: str) -> None:
    install(f"2.14.0{suffix}", FITTING)
    assert message().startswith(f"fbgemm-gpu-cpu 1.8.0 was built for torch 2.13, and torch 2.14.0{suffix} is installed")


@pytest.mark.parametrize("build", ["fbgemm-gpu", "fbgemm-gpu-cpu"])
@pytest.mark.parametrize("torch_release", FBGEMM_BY_TORCH)
@pytest.mark.parametrize("fbgemm_torch", FBGEMM_BY_TORCH)
def test_every_other_pair_is_refused_with_its_remedy(
    install: Install, build: str, torch_release: str, fbgemm_torch: str
) -> None:
    version = f"{FBGEMM_BY_TORCH[fbgemm_torch]}.0"
    install(f"{torch_release}.0+cpu", {"torchrec": "1.8.0", "torchmetrics": "1.0.3", build: version})
    if torch_release == fbgemm_torch:
        require_torchrec()
        return
    assert message() == (
        f"{build} {version} was built for torch {fbgemm_torch}, and torch {torch_release}.0+cpu is installed; "
        f'run: pip install "{build}=={FBGEMM_BY_TORCH[torch_release]}.*"'
    )


@pytest.mark.parametrize(
    ("torch_version", "fbgemm_version"),
    [
        ("2.14.0.dev20260901+cpu", "1.8.0"),  # a nightly build
        ("2.14.0a0+git1234567", "1.8.0"),  # made by its user, as are the next
        ("2.14.0a0+79aa177.nv26.04", "1.8.0"),
        ("2.14.1+local", "1.8.0"),
        ("2.14.1", "1.8.0+git7654321"),
        ("2.14.1", "2026.9.15"),
        ("2.15.0", "1.9.0"),  # of later releases nothing is known
        ("2.14.1", "1.10.0"),
    ],
)
def test_what_no_table_knows_is_tried(install: Install, torch_version: str, fbgemm_version: str) -> None:
    install(torch_version, {**FITTING, "fbgemm-gpu-cpu": fbgemm_version})
    require_torchrec()


def fail_to_import(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def import_module(name: str) -> None:
        assert name == "fbgemm_gpu"
        raise error

    monkeypatch.setattr(installation.importlib, "import_module", import_module)


def test_an_import_that_fails_is_one_error(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("2.15.0+cpu", {**FITTING, "fbgemm-gpu-cpu": "1.9.0"})
    fail_to_import(monkeypatch, OSError("a.so: undefined symbol: _ZN3c10"))
    assert message() == (
        "fbgemm-gpu-cpu 1.9.0 cannot be loaded with torch 2.15.0+cpu (a.so: undefined symbol: _ZN3c10); "
        'run: pip install "torch==2.14.*" "fbgemm-gpu-cpu==1.9.*"'
    )


def test_the_cuda_build_beside_a_torch_without_cuda_gives_way(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("2.13.0+cpu", {"fbgemm-gpu": "1.8.0", "torchrec": "1.8.0"})
    monkeypatch.setattr(installation.torch.cuda, "is_available", lambda: False)
    fail_to_import(monkeypatch, OSError("libtorch_cuda.so: cannot open shared object file"))
    assert message() == (
        "fbgemm-gpu 1.8.0 cannot be loaded with torch 2.13.0+cpu (libtorch_cuda.so: cannot open shared object file); "
        'run: pip uninstall --yes fbgemm-gpu && pip install --force-reinstall --no-deps "fbgemm-gpu-cpu==1.8.*"'
    )


def test_both_builds_of_fbgemm(install: Install) -> None:
    install("2.13.0+cpu", {**FITTING, "fbgemm-gpu": "1.9.0"})
    assert message().startswith(
        "fbgemm-gpu 1.9.0 and fbgemm-gpu-cpu 1.8.0 are installed together, and each has overwritten files of the "
        'other; run: pip uninstall --yes fbgemm-gpu fbgemm-gpu-cpu && pip install "fbgemm-gpu'
    )


@pytest.mark.parametrize(("has_gpu", "build"), [(True, "fbgemm-gpu"), (False, "fbgemm-gpu-cpu")])
def test_no_fbgemm(install: Install, monkeypatch: pytest.MonkeyPatch, has_gpu: bool, build: str) -> None:
    install("2.12.1", {"torchrec": "1.8.0"})
    monkeypatch.setattr(installation.torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: None)
    assert message() == f'fbgemm is not installed, which torchrec needs; run: pip install "{build}==1.7.*"'


def test_no_torchrec(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("2.13.0+cpu", {"fbgemm-gpu-cpu": "1.8.0"})
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: None if name == "torchrec" else True)
    assert message() == f'torchrec is not installed; run: pip install --no-deps "torchrec{TORCHREC}"'


def test_an_old_torchrec(install: Install) -> None:
    install("2.13.0+cpu", {**FITTING, "torchrec": "1.5.1"})
    assert message() == f'torchrec 1.5.1 is older than 1.6; run: pip install --no-deps "torchrec{TORCHREC}"'


def test_a_torchrec_whose_release_has_two_digits_is_not_old(install: Install) -> None:
    install("2.13.0+cpu", {**FITTING, "torchrec": "1.10.0"})
    require_torchrec()


@pytest.mark.parametrize(
    ("builds", "shown"), [({"fbgemm-gpu-cpu": "1.8.0"}, False), ({"fbgemm-gpu-cpu": "1.7.99"}, True), ({}, True)]
)
def test_what_fbgemm_logs_is_shown_unless_the_pair_is_known_to_fit(
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    builds: Mapping[str, str],
    shown: bool,
) -> None:
    """No build at all: somebody has compiled it, and nothing is written down of that."""
    install("2.16.0" if "1.7.99" in builds.values() else "2.13.0", {"torchrec": "1.8.0", "torchmetrics": "1", **builds})
    monkeypatch.setattr(installation.importlib, "import_module", lambda name: logging.error("a library is missing"))
    require_torchrec()
    assert ("a library is missing" in caplog.text) == shown
    logging.error("afterwards")
    assert "afterwards" in caplog.text


def test_libraries_that_torchrec_needs(install: Install) -> None:
    install("2.13.0+cpu", {name: version for name, version in FITTING.items() if name != "torchmetrics"})
    assert message() == 'torchrec 1.8.0 needs torchmetrics; run: pip install "torchmetrics==1.0.3"'


def test_a_build_that_fails_says_it_once_and_before_torchrec(tmp_path: Path) -> None:
    # As fbgemm does: a line in the log for each library, then an exception with the reason as its cause.
    (tmp_path / "fbgemm_gpu").mkdir()
    (tmp_path / "fbgemm_gpu" / "__init__.py").write_text(
        "import logging\nlogging.error('NOISE')\n"
        "try:\n    raise OSError('undefined symbol: x')\n"
        "except OSError as error:\n    raise OSError('Could not load this library') from error\n"
    )
    (tmp_path / "fbgemm_gpu_cpu-1.99.0.dist-info").mkdir()
    (tmp_path / "fbgemm_gpu_cpu-1.99.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: fbgemm_gpu-cpu\nVersion: 1.99.0\n"
    )
    for module in ("dynamicemb.planner", "dynamicemb.shard", "dynamicemb.shard.tables", "dynamicemb.checkpoint.dump"):
        error = _run([sys.executable, "-c", f"import {module}"], tmp_path, fails=True, PYTHONPATH=f"{tmp_path}:{ROOT}")
        assert "fbgemm-gpu-cpu 1.99.0 cannot be loaded with torch 2." in error.splitlines()[-1]
        assert "(undefined symbol: x); run: pip install" in error.splitlines()[-1]
        assert error.count("Traceback") == 1 and "NOISE" not in error
    # What does without torchrec does without fbgemm.
    _run([sys.executable, "-c", "import dynamicemb, dynamicemb.cli"], tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")


# What pip is told, in pyproject.toml and in the README, is what the check knows.


def test_extras_have_the_pairs_of_the_check() -> None:
    extras = PROJECT["optional-dependencies"]
    for stack, build in (("cpu", "fbgemm-gpu-cpu"), ("cuda", "fbgemm-gpu")):
        pairs = {name: wants[:2] for name, wants in extras.items() if name.startswith(f"{stack}-torch")}
        assert pairs == {
            f"{stack}-torch{torch.replace('.', '')}": [f"torch=={torch}.*", f"{build}=={fbgemm}.*"]
            for torch, fbgemm in FBGEMM_BY_TORCH.items()
        }
        assert all(f"torchrec{TORCHREC}" in wants for name, wants in extras.items() if name.startswith("cuda-"))


def test_the_default_pair_is_the_one_that_make_pins() -> None:
    pins = {
        name: re.search(rf"^{name}==(\d+\.\d+)", (ROOT / "requirements" / file).read_text(), re.MULTILINE)[1]
        for name, file in (("torch", "torch.txt"), ("fbgemm-gpu-cpu", "cpu.txt"), ("fbgemm-gpu", "cuda.txt"))
    }
    assert FBGEMM_BY_TORCH[pins["torch"]] == pins["fbgemm-gpu-cpu"] == pins["fbgemm-gpu"]
    short = pins["torch"].replace(".", "")
    for stack in ("cpu", "cuda"):
        assert PROJECT["optional-dependencies"][stack] == [f"dynamicemb[{stack}-torch{short}]"]


def test_the_readme_has_the_pairs_of_the_check() -> None:
    rows = re.findall(r"^\| (2\.\d+) \| (1\.\d+) \| `\.\[(.*)\]` \| `\.\[(.*)\]` \|$", README, re.MULTILINE)
    assert [(torch, fbgemm) for torch, fbgemm, *_ in rows] == list(FBGEMM_BY_TORCH.items())
    for torch, _, *extras in rows:
        assert extras == [f"{stack}-torch{torch.replace('.', '')}" for stack in ("cpu", "cuda")]


def _run(
    command: Sequence[str], folder: Path, fails: bool = False, timeout: float = TIMEOUT_SECONDS, **environment: str
) -> str:
    """What a command prints: its stdout, or its stderr if it is to fail."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    finished = subprocess.run(
        command, cwd=folder, env={**inherited, **environment}, capture_output=True, text=True, timeout=timeout
    )
    assert (finished.returncode != 0) == fails, finished.stderr[-3000:]
    return finished.stderr if fails else finished.stdout


#: What pip says of a machine whose network or disk fails it.
_OF_THE_MACHINE = re.compile(
    "No space left|Disk quota exceeded|name resolution|Max retries|NewConnectionError|ConnectionError|SSLError"
    "|timed out|TimeoutError|Connection (refused|reset|aborted|broken)|IncompleteRead|IncompleteDownload"
    r"|HTTP error (429|5\d\d)"
)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Path]:
    """Python of a fresh environment, which is deleted afterwards: pytest keeps its folders, and this one is large."""
    _run([sys.executable, "-m", "venv", str(tmp_path / "venv")], tmp_path)
    yield tmp_path / "venv" / "bin" / "python"
    shutil.rmtree(tmp_path / "venv")


@pytest.mark.slow
def test_the_readme_installs_into_a_fresh_environment_and_its_quick_start_runs(
    tmp_path: Path, environment: Path
) -> None:
    """The README's commands as they stand, in a copy of this tree; then what does not fit, and the remedy of each."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "dynamicemb", source / "dynamicemb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    def shell(command: str) -> None:
        path = f"{environment.parent}{os.pathsep}{os.environ['PATH']}"
        try:
            _run(["bash", "-c", command], source, PATH=path, PIP_DISABLE_PIP_VERSION_CHECK="1")
        except subprocess.TimeoutExpired:
            pytest.skip(f"the network is too slow for {command}")
        except AssertionError as error:
            if _OF_THE_MACHINE.search(str(error)):
                pytest.skip(f"network or disk fail {command}: {error}")
            raise

    wanted = PROJECT["optional-dependencies"]["cpu-torch213"][1]
    try:
        shell(f'pip download --quiet --retries 1 --no-deps "{wanted}"')
    except AssertionError as error:
        pytest.skip(f"no package index with {wanted} can be reached: {error}")
    if index := os.environ.get("TORCH_INDEX"):
        shell(f'pip install "torch==2.13.*" --index-url {index}')
    shell(re.search(r'^pip install "\.\[cpu\]" && .*$', README, re.MULTILINE)[0])
    quick_start = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    (tmp_path / "quick_start.py").write_text(quick_start)

    def run(fails: bool = False) -> str:
        # Port 0: any that is free, since other tests may run beside this one.
        return _run([str(environment), "quick_start.py"], tmp_path, fails, MASTER_PORT="0", OMP_NUM_THREADS="1")

    assert "TableStatistics(size=3, capacity=100096, " in run()

    shell("pip install --no-deps fbgemm-gpu-cpu==1.9.0")
    error = run(fails=True)
    assert "fbgemm-gpu-cpu 1.9.0 was built for torch 2.14, and torch 2.13." in error.splitlines()[-1]
    assert error.count("Traceback") == 1 and "undefined symbol" not in error
    shell(error.splitlines()[-1].partition("; run: ")[2])
    assert "TableStatistics(size=3, capacity=100096, " in run()

    shell("pip uninstall --yes torchrec tqdm")
    for _ in range(2):  # one thing after the other
        error = run(fails=True)
        shell(error.splitlines()[-1].partition("; run: ")[2])
    assert "TableStatistics(size=3, capacity=100096, " in run()
