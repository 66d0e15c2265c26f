"""``dynamicemb inspect``: every number against NumPy, whatever pieces the files are read in."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamicemb.checkpoint.inspection import summary
from tests.checkpoint.histories import History
from tests.cli.checkpoints import Arrays, table, write
from tests.cli.command import dynamicemb


def inspected(path: Path, *arguments: object) -> dict[str, Any]:
    result = dynamicemb("inspect", path, "--json", *arguments)
    assert (result.code, result.err) == (0, "")
    return result.document


def float_values(arrays: Arrays, dtype: str) -> np.ndarray:
    values = arrays["values"]
    return ((values.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else values).astype(np.float64)


def in_bins(histogram: dict[str, Any], numbers: list[float]) -> list[int]:
    """Counts by a plain loop: a number is in the last bin that begins at or below it."""
    counts = [0] * len(histogram["counts"])
    for one in numbers:
        counts[max(index for index, edge in enumerate(histogram["edges"][:-1]) if edge <= one)] += 1
    return counts


@pytest.fixture(params=[2000, 16 << 20], ids=["small pieces", "one piece"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "PIECE_BYTES", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("strategy", ["lru", "customized"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_all_numbers(tmp_path: Path, dtype: str, strategy: str) -> None:
    record, arrays = table(dtype=dtype, strategy=strategy)
    [found] = inspected(write(tmp_path / "a", {"item": (record, arrays)}), "--top", 3)["tables"]
    assert (found["rows"], found["dim"], found["dtype"]) == (300, 8, dtype)
    assert found["bytes"] == sum(array.nbytes for array in arrays.values())
    assert found["parts"]["values"]["shape"] == [300, 8]
    assert (found["optimizer"]["kind"], found["optimizer"]["steps"]) == ("adam", 321)
    scores, listed = found["scores"], arrays["scores"].tolist()
    assert (scores["smallest"], scores["largest"]) == (min(listed), max(listed))
    assert scores["mean"] == pytest.approx(sum(listed) / 300)
    assert scores["histogram"]["counts"] == in_bins(scores["histogram"], listed)
    assert sum(scores["histogram"]["counts"]) == 300
    norms = np.sqrt((float_values(arrays, dtype) ** 2).sum(1))
    for name, sign in (("top", -1), ("bottom", 1)):
        rows = sorted(range(300), key=lambda row: (sign * listed[row], row))[:3]
        assert [row["row"] for row in scores[name]] == rows
        assert [row["key"] for row in scores[name]] == arrays["keys"][rows].tolist()
        assert [row["norm"] for row in scores[name]] == pytest.approx(norms[rows].tolist(), rel=1e-6)
    assert found["norms"]["smallest"] == pytest.approx(norms.min(), rel=1e-6)
    assert found["norms"]["largest"] == pytest.approx(norms.max(), rel=1e-6)
    assert found["norms"]["median"] == pytest.approx(np.sort(norms)[149], rel=1e-3)
    assert (found["norms"]["zero"], found["norms"]["non_finite"]) == (int((norms == 0).sum()), 0)
    expected = in_bins(found["norms"]["histogram"], np.maximum(norms, found["norms"]["smallest"]).tolist())
    # The bins of the histogram are made of much finer ones: a norm very near to an edge may be on its other side.
    assert np.abs(np.array(expected) - found["norms"]["histogram"]["counts"]).sum() <= 4


def test_scores_of_many_magnitudes(tmp_path: Path) -> None:
    record, arrays = table(strategy="lfu", kind="sgd")
    arrays["scores"][:] = 1
    arrays["scores"][:100] = np.arange(100) ** 4
    [found] = inspected(write(tmp_path / "a", {"item": (record, arrays)}))["tables"]
    histogram = found["scores"]["histogram"]
    assert histogram["logarithmic"]
    assert histogram["counts"] == in_bins(histogram, arrays["scores"].tolist())
    assert sum(count > 0 for count in histogram["counts"]) > 8


@pytest.mark.parametrize("score", [-(2**63), 0, 7, 2**63 - 1])
def test_one_score_for_all(tmp_path: Path, score: int) -> None:
    record, arrays = table(strategy="customized", kind="sgd")
    arrays["scores"][:] = score
    path = write(tmp_path / "a", {"item": (record, arrays)})
    [found] = inspected(path)["tables"]
    assert found["scores"]["histogram"]["counts"] == [300]
    assert f"{score:,}" in dynamicemb("inspect", path).out


def test_scores_as_far_apart_as_can_be(tmp_path: Path) -> None:
    record, arrays = table(strategy="customized", kind="sgd")
    arrays["scores"][:2] = -(2**63), 2**63 - 1
    path = write(tmp_path / "a", {"item": (record, arrays)})
    histogram = inspected(path)["tables"][0]["scores"]["histogram"]
    assert histogram["counts"] == in_bins(histogram, arrays["scores"].tolist())
    assert max(map(len, dynamicemb("inspect", path, "--top", 0).out.splitlines()[:45])) <= 90


def test_rows_that_are_zero_or_not_finite(tmp_path: Path) -> None:
    record, arrays = table(kind="sgd")
    arrays["values"][:5], arrays["values"][5:8, 0], arrays["values"][8, 0] = 0, np.inf, np.nan
    path = write(tmp_path / "a", {"item": (record, arrays)})
    norms = inspected(path)["tables"][0]["norms"]
    assert (norms["zero"], norms["non_finite"], norms["smallest"]) == (5, 4, 0.0)
    assert sum(norms["histogram"]["counts"]) == 296
    assert "5 all zeros; 4 not finite" in dynamicemb("inspect", path).out
    arrays["values"][:] = np.nan
    path = write(tmp_path / "b", {"item": (record, arrays)})
    assert inspected(path)["tables"][0]["norms"]["median"] is None
    assert "none is finite" in dynamicemb("inspect", path).out


def test_what_the_screen_shows(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"item": table(), "user": table(kind="sgd", dtype="float16", seed=1)})
    result = dynamicemb("inspect", path)
    assert result.code == 0 and result.err == ""
    assert "full checkpoint, 2 tables, 600 rows" in result.out
    for text in ("model.embedding_module", "item", "user", "float16", "adam", "learning_rate 0.001", "clock 5,000"):
        assert text in result.out
    assert "\x1b" not in result.out
    assert max(map(len, result.out.splitlines()[1:])) <= 80
    key = int(table()[1]["keys"][table()[1]["scores"].argmax()])
    assert str(key) in result.out
    only = dynamicemb("inspect", path, "--table", "user").out
    assert "user in" in only and "item in" not in only


def test_empty_tables_and_deltas(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty", {"item": table(rows=0)})
    assert inspected(empty)["tables"][0]["scores"] is None
    assert "no rows" in dynamicemb("inspect", empty).out
    history = History()
    history.step({1: 10, 2: 20}, set())
    history.step({}, set())
    history.step({4: 40}, {2})
    result = dynamicemb("inspect", history.write(tmp_path / "delta", since=2))
    assert "since clock 2: 1 rows, 1 keys gone; table of 2 rows" in result.out


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_a_picture(tmp_path: Path, rows: int) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    record, arrays = table(rows=rows)
    skewed, other = table(strategy="lfu", kind="sgd")
    other["scores"][:] = np.arange(300) ** 4
    path = write(tmp_path / "a", {"item": (record, arrays), "user": (skewed, other)})
    assert dynamicemb("inspect", path, "--plot", tmp_path / "a.png", "--json").document["rows"] == rows + 300
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        assert sum(count > 0 for count in picture.convert("L").histogram()) > 5


@pytest.mark.parametrize("name", ["missing/a.png", "a.text"])
def test_a_picture_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    result = dynamicemb("inspect", write(tmp_path / "a", {"item": table()}), "--plot", tmp_path / name)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: --plot ")


def test_a_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    result = dynamicemb("inspect", write(tmp_path / "a", {"item": table()}), "--plot", tmp_path / "a.png")
    assert (result.code, result.out) == (1, "")
    assert "needs matplotlib; pip install 'dynamicemb[plot]'" in result.err


@pytest.mark.parametrize(
    ("smallest", "largest"), [(0, 0), (0, 1), (3, 18), (3, 19), (1, 2**63 - 1), (2**40, 2**40 + 5)]
)
def test_edges_of_scores(smallest: int, largest: int) -> None:
    for kind in (summary._linear_edges, *([summary._logarithmic_edges] if largest else [])):
        edges = kind(smallest, largest)
        assert edges[0] <= smallest and edges[-1] == largest
        assert edges[:-1] == sorted(set(edges[:-1])) and len(edges) <= summary.BINS + 2
