"""One training run on several models side by side: dynamic tables, and what they must equal. Runs on every rank.

Two collections, four dynamic tables in several groups, one static table between them, two features on one table,
features in another order than the tables, one that no table uses, empty features, empty batches, ranks without samples,
and a table so small that some ranks hold no row of it. The dynamic tables are fed 64-bit ids of both signs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb import DynamicEmbEvictStrategy
from dynamicemb.shard import DynamicEmbeddingCollectionSharder
from tests.shard.models import CPU, NORMAL, STATIC, collection, distribute, dynamic, evaluated, rank_device, table

STEPS = 50
LEARNING_RATE = 0.1
SIZES = {"item": 500, "user": 700, "few": 3, "country": 300, "tag": 400}
FEATURES = {"item": ["clicked", "bought"], "user": ["viewed"], "few": ["few"], "country": ["country"], "tag": ["tag"]}
DYNAMIC = ("item", "user", "few", "tag")
TABLE_OF = {feature: name for name, features in FEATURES.items() for feature in features}
#: Order of the features in a batch; no table has the feature "unused".
BATCH_ORDER = ("country", "tag", "viewed", "bought", "unused", "few", "clicked")

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}, {"optimizer": EmbOptimType.EXACT_SGD}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-6}, {"optimizer": EmbOptimType.EXACT_ADAGRAD, "eps": 1e-6}),
    "rowwise_adagrad": (
        RowWiseAdagrad, {"eps": 1e-6}, {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "eps": 1e-6}
    ),
    "adam": (
        # SparseAdam, the reference, does not correct eps for bias as Adam does; here the difference is nothing.
        torch.optim.Adam, {"betas": (0.8, 0.99), "eps": 1e-10},
        {"optimizer": EmbOptimType.ADAM, "beta1": 0.8, "beta2": 0.99, "eps": 1e-10},
    ),
}  # fmt: skip


class TwoCollections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        wide = [name for name in SIZES if name != "tag"]
        self.wide = collection(*(table(name, SIZES[name], 16, FEATURES[name]) for name in wide))
        self.narrow = collection(table("tag", SIZES["tag"], 8, FEATURES["tag"]))

    def forward(self, features: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        wide, narrow = self.wide(features), self.narrow(features)
        return {**wide.wait(), **narrow.wait()}


def dynamic_model(optimizer: str, through_fused_params: bool) -> nn.Module:
    """With the optimizer in the backward pass and no index deduplication, or with fused parameters and with it."""
    shared = {"initializer_args": NORMAL, "eval_initializer_args": NORMAL, "max_capacity": 6000}
    constraints = {
        "item": dynamic(**shared),
        "user": dynamic(bucket_capacity=64, evict_strategy=DynamicEmbEvictStrategy.LFU, **shared),
        "few": dynamic(**shared),
        "tag": dynamic(**shared),
        "country": STATIC,
    }
    model = TwoCollections()
    in_backward, arguments, fused_params = OPTIMIZERS[optimizer]
    parameters = {name.split(".")[-2]: parameter for name, parameter in model.named_parameters()}
    if not has_static_model(optimizer):  # the static table has another optimizer than the dynamic ones
        apply_optimizer_in_backward(torch.optim.SGD, [parameters.pop("country")], {"lr": LEARNING_RATE})
    if not through_fused_params:
        apply_optimizer_in_backward(in_backward, parameters.values(), {"lr": LEARNING_RATE, **arguments})
    sharder = DynamicEmbeddingCollectionSharder(
        fused_params={"learning_rate": LEARNING_RATE, **fused_params} if through_fused_params else None,
        use_index_dedup=through_fused_params,
    )
    return distribute(model, constraints, sharder=sharder)


def has_static_model(optimizer: str) -> bool:
    """Whether torchrec's tables have the optimizer where this rank's tables are: fbgemm has no Adam on the CPU."""
    return optimizer != "adam" or rank_device() != CPU


def static_model(optimizer: str) -> nn.Module:
    in_backward, arguments, _ = OPTIMIZERS[optimizer]
    constraints = dict.fromkeys(SIZES, STATIC)
    return distribute(TwoCollections(), constraints, (in_backward, {"lr": LEARNING_RATE, **arguments}), plain=True)


def raw_ids(ids: torch.Tensor) -> torch.Tensor:
    """Scatters small ids over all 64-bit integers: an odd factor is a bijection modulo 2**64."""
    return ids * -7046029254386353131 + 7


@dataclass(frozen=True)
class Batch:
    """Small ids (from 0) and lengths by feature."""

    values: dict[str, torch.Tensor]
    lengths: dict[str, torch.Tensor]

    def for_dynamic(self) -> KeyedJaggedTensor:
        """With 64-bit ids for the dynamic tables; those of the static one stay as they are."""
        values = [ids if feature == "country" else raw_ids(ids) for feature, ids in self.values.items()]
        lengths = torch.cat(list(self.lengths.values()))
        return KeyedJaggedTensor(keys=list(self.values), values=torch.cat(values), lengths=lengths)

    def for_torchrec(self) -> KeyedJaggedTensor:
        """torchrec cannot shard a batch without samples; one sample without ids stands for it."""
        lengths = torch.cat(list(self.lengths.values()))
        return KeyedJaggedTensor(
            keys=list(self.values),
            values=torch.cat(list(self.values.values())),
            lengths=lengths if lengths.numel() else torch.zeros(len(self.values), dtype=torch.int64),
        )


def make_batch(rank: int, step: int) -> Batch:
    """Ids are skewed, so that many repeat. In turns there are no samples, and no ids of one feature."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    samples = 0 if (step + rank) % 4 == 3 else 6 + 2 * rank
    batch = Batch({}, {})
    for feature in BATCH_ORDER:
        lengths = torch.randint(0, 4, (samples,), generator=generator)
        if feature == "bought" and step % 2 == 0:
            lengths.zero_()
        size = SIZES[TABLE_OF[feature]] if feature in TABLE_OF else 10**9
        uniform = torch.rand(int(lengths.sum()), generator=generator, dtype=torch.float64)
        batch.values[feature], batch.lengths[feature] = (uniform**3 * size).long(), lengths
    return batch


def loss(rows: Mapping[str, torch.Tensor], rank: int, step: int) -> torch.Tensor:
    """Not linear in the rows, different at every place of the batch, and with gradients that never cancel: a row's sum
    of gradients keeps the relative accuracy of its terms, so that rows can be compared tightly."""
    generator = torch.Generator().manual_seed(10**6 + 1000 * rank + step)
    terms = []
    for feature in sorted(rows):
        values = rows[feature]
        factors = 0.5 + torch.rand(values.shape, generator=generator)
        factors[:, ::2] *= -1.0
        factors = factors.to(values.device)
        terms.append((factors * (values + 0.1 * values.sin())).sum())
    return torch.stack(terms).sum()


def all_ids(raw: bool) -> dict[str, torch.Tensor]:
    """Every id of every table, through one feature of each; nothing for the others."""
    ids = {feature: torch.empty(0, dtype=torch.int64) for feature in BATCH_ORDER}
    for name, size in SIZES.items():
        table_ids = torch.arange(size)
        ids[FEATURES[name][0]] = raw_ids(table_ids) if raw and name in DYNAMIC else table_ids
    return ids


def all_rows(model: nn.Module, raw: bool) -> dict[str, torch.Tensor]:
    """[size, dim] by table, on the host."""
    values = evaluated(model, all_ids(raw))
    return {name: values[FEATURES[name][0]].to(CPU, copy=True) for name in SIZES}


def set_static_rows(model: nn.Module, rows_by_table: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    for key, value in state.items():
        table_key, _, entry = key.rpartition(".")
        if entry != "weight" or f"{table_key}.keys" in state:  # not of a dynamic table
            continue
        for shard in value.local_shards():
            first = shard.metadata.shard_offsets[0]
            shard.tensor.copy_(rows_by_table[table_key.split(".")[-1]][first : first + shard.tensor.shape[0]])


class TorchTables:
    """The same tables in plain PyTorch on one process: the reference for an optimizer that fbgemm lacks on the CPU."""

    def __init__(self, rows_by_table: Mapping[str, torch.Tensor]) -> None:
        self.tables = {
            name: nn.Embedding.from_pretrained(rows, freeze=False, sparse=True) for name, rows in rows_by_table.items()
        }
        weights = [module.weight for module in self.tables.values()]
        self.optimizer = torch.optim.SparseAdam(weights, LEARNING_RATE, **OPTIMIZERS["adam"][1])

    def rows(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {feature: self.tables[name](batch.values[feature]) for feature, name in TABLE_OF.items()}

    def train(self, batches: Sequence[Batch], step: int) -> None:
        """One step on the batches of all ranks; as torchrec does, the gradient is the mean over the ranks."""
        losses = [loss(self.rows(batch), rank, step) for rank, batch in enumerate(batches)]
        (torch.stack(losses).sum() / len(batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Greatest difference in a row, relative to the greatest value of that row."""
    difference = (actual - expected).abs().amax(1)
    return float((difference / expected.abs().amax(1)).max())


def outputs(model: nn.Module, features: KeyedJaggedTensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Values and (on the host) lengths by feature."""
    output = model(features.to(rank_device()))
    assert set(output) == set(TABLE_OF)
    values = {feature: jagged.values() for feature, jagged in output.items()}
    return values, {feature: jagged.lengths().cpu() for feature, jagged in output.items()}


def equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in second)


def run(rank: int, world_size: int, optimizer: str) -> dict[str, Any]:
    """Trains two dynamic models beside their reference.

    Returns:
        ``forward_equal``, ``lengths_equal``: whether the first outputs and all lengths are, in both dynamic models;
        by table ``errors`` (of the rows afterwards, the greater of both models), ``models_equal`` (whether the rows of
        both are), ``changed`` (share of rows that training changed).
    """
    models = [dynamic_model(optimizer, through_fused_params) for through_fused_params in (False, True)]
    before = all_rows(models[0], raw=True)
    set_static_rows(models[1], before)
    copies = {name: rows.clone() for name, rows in before.items()}
    tables, static = TorchTables(copies), None
    if has_static_model(optimizer):
        static = static_model(optimizer)
        set_static_rows(static, before)
    result: dict[str, Any] = {"forward_equal": True, "lengths_equal": True}
    for step in range(STEPS):
        batch = make_batch(rank, step)
        expected = tables.rows(batch) if static is None else outputs(static, batch.for_torchrec())[0]
        for model in models:
            values, lengths = outputs(model, batch.for_dynamic())
            result["lengths_equal"] &= equal(batch.lengths, lengths)
            result["forward_equal"] &= step > 0 or equal(expected, values)
            loss(values, rank, step).backward()
        if static is None:
            tables.train([make_batch(other, step) for other in range(world_size)], step)
        else:
            loss(expected, rank, step).backward()
    after = [all_rows(model, raw=True) for model in models]
    if static is None:
        # The static table of the dynamic model had another optimizer.
        last = {name: tables.tables[name].weight.detach() for name in DYNAMIC}
    else:
        last = all_rows(static, raw=False)
    result["errors"] = {name: max(relative_error(own[name], rows) for own in after) for name, rows in last.items()}
    result["models_equal"] = {name: torch.equal(after[0][name], after[1][name]) for name in SIZES}
    result["changed"] = {name: float((after[0][name] != before[name]).any(1).float().mean()) for name in SIZES}
    return result
