"""What the user of the demo can choose: the command line, checked before anything else happens."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Optional

from rows import CATEGORICAL

from dynamicemb.errors import ConfigError

#: Long enough that most ids of a generated log are replaced once.
GENERATED_ROWS = 200_000
#: Learning rate of the tables that did best in one epoch over 60,000 Criteo rows, for each optimizer.
LEARNING_RATES = {"rowwise_adagrad": 0.02, "adagrad": 0.02, "adam": 0.002, "sgd": 5.0}


@dataclass(frozen=True)
class DemoOptions:
    """The command line. See ``--help`` for what each one means."""

    data: tuple[Path, ...]
    eval_data: tuple[Path, ...]
    rows: int
    epochs: int
    batch_size: int
    embedding_dim: int
    optimizer: str
    lr: float
    dense_lr: float
    capacity: int
    score: str
    dynamic: frozenset[str]
    seed: int
    summary: Optional[Path]
    save: Optional[Path]
    save_every: Optional[int]
    load: Optional[Path]
    ranks: Optional[int] = None


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing: every rank parses, one rank reports."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists the options)")

    def print_help(self, file: Any = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            super().print_help(file)


def parse(arguments: Sequence[str]) -> DemoOptions:
    """The options that ``arguments`` give.

    Raises:
        ConfigError: an option that does not exist or has a value that it cannot take; the message says which.
    """
    given = _parser().parse_args(arguments)
    if given.data and given.rows is not None:
        raise ConfigError("--rows is the length of the generated log; leave it out when --data names a real one")
    if given.eval_data and not given.data:
        raise ConfigError("--eval-data needs --data: ids of a generated log mean nothing in another one")
    if given.summary is not None:
        _check_writable(given.summary)
    if given.save_every is not None and given.save is None:
        raise ConfigError("--save-every needs --save: the place where the run is kept")
    dynamic = _dynamic_tables(given.dynamic)
    if (given.save is not None or given.load is not None) and not dynamic:
        raise ConfigError("--dynamic none: --save and --load keep dynamic tables, of which this run has none")
    if len(dynamic) < len(CATEGORICAL) and given.embedding_dim % 4:
        raise ConfigError(
            f"--embedding-dim {given.embedding_dim}: static tables need a multiple of 4; use "
            f"{-(-given.embedding_dim // 4) * 4}, or --dynamic all"
        )
    return DemoOptions(
        data=tuple(given.data),
        eval_data=tuple(given.eval_data),
        rows=GENERATED_ROWS if given.rows is None else given.rows,
        epochs=given.epochs,
        batch_size=given.batch_size,
        embedding_dim=given.embedding_dim,
        optimizer=given.optimizer,
        lr=LEARNING_RATES[given.optimizer] if given.lr is None else given.lr,
        dense_lr=given.dense_lr,
        capacity=given.capacity,
        score=given.score,
        dynamic=dynamic,
        seed=given.seed,
        summary=given.summary,
        save=given.save,
        save_every=given.save_every,
        load=given.load,
        ranks=_ranks(given.ranks),
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train_criteo.py",
        description="Trains a DLRM-style model on click logs with dynamic embedding tables.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="Criteo files, Parquet or tab-separated, or folders of them; a log is generated without",
    )
    add(
        "--eval-data",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="files to evaluate on; the last tenth of the rows without",
    )
    add("--rows", type=_positive, default=None, help=f"length of the generated log (default: {GENERATED_ROWS})")
    add("--epochs", type=_positive, default=1, help="passes over the training rows (default: %(default)s)")
    add("--batch-size", type=_positive, default=256, help="rows of a step on all ranks together (default: %(default)s)")
    add("--embedding-dim", type=_positive, default=16, help="columns of every embedding table (default: %(default)s)")
    add(
        "--optimizer",
        choices=sorted(LEARNING_RATES),
        default="rowwise_adagrad",
        help="optimizer of the embedding tables; the rest of the model has Adam (default: %(default)s)",
    )
    add(
        "--lr",
        type=_positive_number,
        default=None,
        help="learning rate of the embedding tables (default: depends on the optimizer)",
    )
    add(
        "--dense-lr",
        type=_positive_number,
        default=0.002,
        help="learning rate of the rest of the model (default: %(default)s)",
    )
    add(
        "--capacity",
        type=_positive,
        default=16_384,
        help="rows of each embedding table on all ranks together (default: %(default)s)",
    )
    add(
        "--score",
        choices=("lru", "lfu"),
        default="lru",
        help="what a full table evicts: what was trained longest ago, or least often (default: %(default)s)",
    )
    add(
        "--dynamic",
        default="all",
        metavar="TABLES",
        help="all, none, or names such as c1,c5; others are static, ids modulo the capacity (default: %(default)s)",
    )
    add("--ranks", type=_positive, default=None, metavar="N", help="start so many processes, as torchrun does")
    add("--seed", type=_seed, default=0, help="of the model, the new rows and the generated log (default: %(default)s)")
    add("--summary", type=Path, default=None, metavar="FILE", help="write the results to this file as JSON")
    add("--save", type=Path, default=None, metavar="DIR", help="save the run there when it has been trained")
    add("--save-every", type=_positive, default=None, metavar="STEPS", help="also save it every so many steps")
    add("--load", type=Path, default=None, metavar="DIR", help="go on with the run that was saved there")
    return parser


def _ranks(given: Optional[int]) -> Optional[int]:
    started = os.environ.get("WORLD_SIZE") if "RANK" in os.environ else None
    if given is not None and started not in (None, str(given)):
        raise ConfigError(f"--ranks {given}: torchrun has started {started} processes; leave the option out")
    return given


def _dynamic_tables(text: str) -> frozenset[str]:
    if text in ("all", "none"):
        return frozenset(CATEGORICAL if text == "all" else ())
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in CATEGORICAL]
    if unknown:
        raise ConfigError(
            f"--dynamic {text}: no table {', '.join(map(repr, unknown))}; use all, none, or names out of "
            f"{CATEGORICAL[0]} to {CATEGORICAL[-1]}, separated by commas"
        )
    return frozenset(names)


def _check_writable(summary: Path) -> None:
    folder = summary.absolute().parent
    if summary.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--summary {summary}: no file can be written there; name one in a folder that exists")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**63 - 1")
    return int(text)
