"""The dtype in which rows leave the dynamic tables of a collection."""

from __future__ import annotations

from typing import Optional

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import nn
from torchrec.optim import SGD
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from dynamicemb import ConfigError
from tests.distributed import run_on_ranks
from tests.shard.models import ZEROS, collection, distribute, dynamic, evaluated, features_of, rows, table


def build(dtypes: dict[str, Optional[SparseType]]) -> nn.Module:
    module = collection(*(table(name) for name in dtypes))
    for name, dtype in dtypes.items():
        arguments = {"lr": 1.0} if dtype is None else {"lr": 1.0, "output_dtype": dtype}
        apply_optimizer_in_backward(SGD, module.embeddings[name].parameters(), arguments)
    return distribute(module, {name: dynamic(initializer_args=ZEROS) for name in dtypes})


def half_rows(rank: int, world_size: int) -> None:
    model = build({"item": SparseType.FP16, "user": SparseType.FP16})
    output = rows(model, features_of({"item": [[1, 2]], "user": [[1]]}))
    assert {name: values.dtype for name, values in output.items()} == dict.fromkeys(("item", "user"), torch.float16)
    (output["item"].float() * 0.25).sum().backward()
    stored = evaluated(model, {"item": torch.tensor([1, 2]), "user": torch.tensor([1])})
    assert stored["item"].tolist() == [[-0.25] * 8] * 2 and stored["user"].tolist() == [[0.0] * 8]


@pytest.mark.parametrize("world_size", [1, 2])
def test_half_precision(world_size: int) -> None:
    run_on_ranks(world_size, half_rows)


def conflicts(rank: int, world_size: int) -> list[str]:
    messages = []
    for dtypes in (
        {"item": SparseType.FP16, "user": SparseType.FP32},
        {"item": None, "user": SparseType.FP16},  # float32 if nothing is said
        {"item": SparseType.BF16, "user": SparseType.BF16, "country": SparseType.FP16},
    ):
        with pytest.raises(ConfigError) as caught:
            build(dtypes)
        messages.append(str(caught.value))
    build({"item": None, "user": SparseType.FP32})
    return messages


def test_tables_of_one_collection_must_agree() -> None:
    (messages,) = run_on_ranks(1, conflicts)
    for message in messages:
        assert "different output_dtypes" in message and "'user'" in message and "torch.float16" in message
