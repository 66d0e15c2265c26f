"""The command line of the demo: defaults, and one error for each value that it cannot take."""

from __future__ import annotations

import re

import demo_options
import pytest
from rows import CATEGORICAL

from dynamicemb import ConfigError


def test_defaults():
    options = demo_options.parse([])
    assert options.data == options.eval_data == ()
    assert options.dynamic == frozenset(CATEGORICAL)
    assert options.lr == demo_options.LEARNING_RATES[options.optimizer]
    assert options.rows == demo_options.GENERATED_ROWS
    assert options.summary is None


@pytest.mark.parametrize(
    ("text", "tables"),
    [("all", set(CATEGORICAL)), ("none", set()), ("c1,c26", {"c1", "c26"}), ("c5, c7", {"c5", "c7"})],
)
def test_dynamic_tables(text, tables):
    assert demo_options.parse(["--dynamic", text]).dynamic == tables


def test_every_optimizer_has_a_learning_rate():
    for optimizer, learning_rate in demo_options.LEARNING_RATES.items():
        assert demo_options.parse(["--optimizer", optimizer]).lr == learning_rate
        assert demo_options.parse(["--optimizer", optimizer, "--lr", "0.25"]).lr == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dynamic c1,c27", "--dynamic c1,c27: no table 'c27'; use all, none, or names out of c1 to c26"),
        ("--dynamic c1,", "--dynamic c1,: no table ''"),
        ("--batch-size 0", "argument --batch-size: '0' is not a whole number of at least 1"),
        ("--epochs 1.5", "argument --epochs: '1.5' is not a whole number of at least 1"),
        ("--capacity -5", "argument --capacity: '-5' is not a whole number of at least 1"),
        ("--embedding-dim x", "argument --embedding-dim: 'x' is not a whole number of at least 1"),
        ("--embedding-dim 6 --dynamic c1", "--embedding-dim 6: static tables need a multiple of 4; use 8"),
        ("--lr 0", "argument --lr: '0' is not a number above 0"),
        ("--lr nan", "argument --lr: 'nan' is not a number above 0"),
        ("--dense-lr inf", "argument --dense-lr: 'inf' is not a number above 0"),
        ("--seed -1", "argument --seed: '-1' is not a whole number from 0 to 2**63 - 1"),
        (f"--seed {2**63}", "is not a whole number from 0 to 2**63 - 1"),
        ("--optimizer adamax", "argument --optimizer: invalid choice: 'adamax'"),
        ("--score fifo", "argument --score: invalid choice: 'fifo'"),
        ("--rows 5 --data x", "--rows is the length of the generated log"),
        ("--eval-data x", "--eval-data needs --data"),
        ("--summary /absent/folder/s.json", "--summary /absent/folder/s.json: no file can be written there"),
        ("--summary /", "--summary /: no file can be written there"),
        ("--batch 5", "unrecognized arguments: --batch 5"),
        ("--data", "argument --data: expected at least one argument"),
    ],
)
def test_one_error(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        demo_options.parse(arguments.split())
    assert len(str(caught.value).splitlines()) == 1
