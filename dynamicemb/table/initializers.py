"""From initializer arguments to the tensors that the fill kernels read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from statistics import NormalDist

import torch

from dynamicemb.kernels.fill import FillMode
from dynamicemb.kernels.views import InitializerView
from dynamicemb.options import DynamicEmbInitializerArgs, DynamicEmbInitializerMode

__all__ = ["initializer_view", "philox_key"]


def philox_key(seed: int, table: str) -> int:
    """The 64-bit Philox key of a table, as a signed integer: the first eight bytes of BLAKE2b over seed and name."""
    message = (seed & (2**64 - 1)).to_bytes(8, "little") + table.encode()
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little", signed=True)


def _mode_and_parameters(arguments: DynamicEmbInitializerArgs) -> tuple[FillMode, tuple[float, float, float, float]]:
    mode = arguments.mode
    if mode is DynamicEmbInitializerMode.DEBUG:
        return FillMode.DEBUG, (0.0, 0.0, 0.0, 0.0)
    if mode is DynamicEmbInitializerMode.CONSTANT:
        return FillMode.CONSTANT, (arguments.value, 0.0, 0.0, 0.0)
    if mode is DynamicEmbInitializerMode.NORMAL:
        return FillMode.NORMAL, (arguments.mean, arguments.std_dev, 0.0, 0.0)
    assert arguments.lower is not None and arguments.upper is not None, "bounds are resolved by the planner"
    if mode is DynamicEmbInitializerMode.UNIFORM:
        return FillMode.UNIFORM, (arguments.lower, arguments.upper, 0.0, 0.0)
    if arguments.std_dev == 0.0:
        return FillMode.CONSTANT, (min(max(arguments.mean, arguments.lower), arguments.upper), 0.0, 0.0, 0.0)
    distribution = NormalDist(arguments.mean, arguments.std_dev)
    bounds = distribution.cdf(arguments.lower), distribution.cdf(arguments.upper)
    return FillMode.TRUNCATED_NORMAL, (arguments.mean, arguments.std_dev, *bounds)


def initializer_view(
    names: Sequence[str],
    seeds: Sequence[int],
    arguments: Sequence[DynamicEmbInitializerArgs],
    initial_states: Sequence[float],
    device: torch.device,
) -> InitializerView:
    """One row for each table of a group, each with its own initializer, whatever the others have."""
    modes_and_parameters = [_mode_and_parameters(argument) for argument in arguments]
    return InitializerView(
        seeds=torch.tensor(
            [philox_key(seed, name) for seed, name in zip(seeds, names, strict=True)], dtype=torch.int64, device=device
        ),
        modes=torch.tensor([mode for mode, _ in modes_and_parameters], dtype=torch.int32, device=device),
        parameters=torch.tensor(
            [parameters for _, parameters in modes_and_parameters], dtype=torch.float64, device=device
        ).view(len(names), 4),
        states=torch.tensor(list(initial_states), dtype=torch.float32, device=device),
        any_normal=any(mode in (FillMode.NORMAL, FillMode.TRUNCATED_NORMAL) for mode, _ in modes_and_parameters),
    )
