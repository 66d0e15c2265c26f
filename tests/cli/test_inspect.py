"""``dynamicemb inspect``: every number against NumPy, whatever pieces the files are read in."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamicemb.checkpoint.files.manifest import TableRecord
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


def named(count: int, rows: int = 20) -> dict[str, tuple[TableRecord, Arrays]]:
    """Tables ``c1``, ``c2``, ...: files have them in the order of text, ``c10`` after ``c1``."""
    made = [table(rows=rows, kind=("adam", "sgd")[number % 2], seed=number) for number in range(4)]
    return {f"c{number}": made[number % 4] for number in range(1, count + 1)}


def lines_of(out: str) -> list[str]:
    """The first words of the lines that are about one table each."""
    return [line.split()[0] for line in out.splitlines() if re.match(r"  c[0-9]+ ", line)]


def test_what_the_screen_shows_of_one_table(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"item": table()})
    result = dynamicemb("inspect", path)
    assert result.code == 0 and result.err == ""
    assert "full checkpoint, 1 table, 300 rows" in result.out
    for text in ("item in model.embedding_module", "300 of dim 8, float32", "adam, learning_rate 0.001", "clock 5,000"):
        assert text in result.out
    assert "\x1b" not in result.out
    assert max(map(len, result.out.splitlines()[1:])) <= 80
    key = int(table()[1]["keys"][table()[1]["scores"].argmax()])
    assert str(key) in result.out
    assert len(result.out.splitlines()) < 70


def test_labels_of_histograms(tmp_path: Path) -> None:
    """Scores are whole numbers, so no score is in two labels; norms have the digits that tell them apart."""
    record, arrays = table(kind="adagrad")
    arrays["scores"][:] = np.arange(300) % 48
    arrays["values"][:], arrays["values"][:, 0] = 0, 100 + np.arange(300) / 100
    path = write(tmp_path / "a", {"item": (record, arrays)})
    [found], out = inspected(path)["tables"], dynamicemb("inspect", path).out
    edges = found["scores"]["histogram"]["edges"]
    assert len(edges) == 17
    bins = [*zip(edges[:-2], [edge - 1 for edge in edges[1:-1]]), tuple(edges[-2:])]
    expected = [f"{a:.0f} to {b:.0f}" for a, b in bins]
    title, *labels = re.findall(r"(?<![.0-9])[0-9]+ to [0-9]+(?![.0-9])", out)
    assert (title, labels) == ("0 to 47", expected)
    norms = [label for line in out.splitlines() for label in re.findall(r"10[.0-9]+ to 10[.0-9]+", line)]
    assert len(set(norms)) >= len(found["norms"]["histogram"]["counts"]) > 8
    assert all(label.split(" to ")[0] != label.split(" to ")[1] for label in norms)
    assert re.search(r"\beps [0-9]", out) and "beta1" not in out


def test_labels_of_great_scores_leave_room(tmp_path: Path) -> None:
    record, arrays = table(strategy="lfu", kind="sgd")
    arrays["scores"][:], arrays["scores"][0] = 1, 2**62
    out = dynamicemb("inspect", write(tmp_path / "a", {"item": (record, arrays)}), "--top", 0).out
    assert max(map(len, out.splitlines()[1:])) <= 80 and "4.612e+18" in out


def test_many_tables_fit_a_screen_in_the_order_in_which_people_count(tmp_path: Path) -> None:
    path = write(tmp_path / "a", named(26))
    result = dynamicemb("inspect", path)
    assert (result.code, result.err) == (0, "")
    assert len(result.out.splitlines()) <= 40
    assert max(map(len, result.out.splitlines()[1:])) <= 80
    assert lines_of(result.out) == [f"c{number}" for number in range(1, 27)]
    for text in ("26 tables, 520 rows", "all tables: dim 8, float32", "--table NAME", "adam", "sgd", "0.2%"):
        assert text in result.out
    assert "scores:" not in result.out
    assert [entry["table"] for entry in inspected(path)["tables"]] == [f"c{number}" for number in range(1, 27)]
    wide = dynamicemb("inspect", path, columns=200).out
    assert lines_of(wide) == lines_of(result.out) and len(wide.splitlines()) <= len(result.out.splitlines())


def test_the_tables_that_are_asked_for_are_shown_in_full(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {**named(11), "c*": table(seed=9)})
    only = dynamicemb("inspect", path, "--table", "c7").out
    assert "c7 in" in only and "c1 in" not in only and "norms of rows" in only
    both = dynamicemb("inspect", path, "--table", "c10", "--table", "model.embedding_module/c2", "--table", "c10").out
    assert lines_of(both) == ["c10", "c2"] and both.count("scores: ") == 2
    # A name that a table has is no pattern.
    assert [entry["table"] for entry in inspected(path, "--table", "c*")["tables"]] == ["c*"]
    found = inspected(path, "--table", "c1?", "--table", "*/c3")["tables"]
    assert [entry["table"] for entry in found] == ["c10", "c11", "c3"]
    for name in ("nope", "nope*"):
        result = dynamicemb("inspect", path, "--table", name)
        assert (result.code, result.out) == (1, "")
        assert f"no table is called '{name}'; the tables are model.embedding_module/c1, " in result.err


def test_a_table_that_does_not_exist_among_many(tmp_path: Path) -> None:
    path = write(tmp_path / "a", named(60, rows=0))
    for arguments in (("get", path, "c61", "1"), ("inspect", path, "--table", "c61")):
        result = dynamicemb(*arguments)
        assert result.code == 1 and len(result.err) < 700
        assert "model.embedding_module/c2, model.embedding_module/c3, " in result.err
        assert result.err.endswith(" and 49 more\n")


def test_long_names_are_shown_in_full_and_leave_room_for_numbers(tmp_path: Path) -> None:
    name = "a_long_name_" * 8
    path = write(tmp_path / "a", {name: table(), "user": table(kind="sgd", seed=1)})
    out = dynamicemb("inspect", path).out
    assert max(map(len, out.splitlines()[1:])) <= 80
    assert name in re.sub(r"[^a-z_]", "", re.sub(" [0-9,.]+ .*", "", out[out.index("a_long") :]))
    assert "300" in out and "user" in out


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


def pictured(path: Path, picture: Path, *arguments: object) -> tuple[int, int]:
    """Width and height of the picture, which has something on it."""
    from PIL import Image

    result = dynamicemb("inspect", path, "--plot", picture, *arguments)
    assert (result.code, result.err) == (0, "")
    with Image.open(picture) as opened:
        assert opened.format == "PNG"
        assert sum(count > 0 for count in opened.convert("L").histogram()) > 5
        return opened.size


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_a_picture(tmp_path: Path, rows: int) -> None:
    pytest.importorskip("matplotlib")
    record, arrays = table(rows=rows)
    skewed, other = table(strategy="lfu", kind="sgd")
    other["scores"][:] = np.arange(300) ** 4
    path = write(tmp_path / "a", {"item": (record, arrays), "user $1": (skewed, other)})
    assert min(pictured(path, tmp_path / "a.png")) > 300
    assert min(pictured(path, tmp_path / "b.png", "--table", "item")) > 300


@pytest.mark.parametrize("count", [4, 36, 130])
def test_a_picture_of_many_tables_can_be_looked_at(tmp_path: Path, count: int) -> None:
    pytest.importorskip("matplotlib")
    tables = named(count)
    broken, arrays = table(rows=20, kind="sgd", seed=9)
    arrays["values"][:10], arrays["values"][10:] = np.nan, 1e30
    tables["c2"], tables["\u8868" * 40], tables["c3"] = (broken, arrays), tables["c3"], table(rows=0)
    width, height = pictured(write(tmp_path / "a", tables), tmp_path / "a.png")
    assert 1000 <= width <= 2200 and 1000 <= height <= 2000


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
