"""The tables of a model as torchrec's sharders see them, and those of them that are dynamic, checked and sized."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.planner.utils import sharder_name
from torchrec.distributed.types import ModuleSharder
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
    EmbeddingCollectionInterface,
)

from dynamicemb.errors import ConfigError, DynamicEmbWarning
from dynamicemb.kernels.layout import METADATA_BYTES_PER_SLOT, RowLayout, table_bytes
from dynamicemb.names import MAX_COLLECTION_BYTES, MAX_TABLE_BYTES, unstorable
from dynamicemb.options import DynamicEmbTableOptions
from dynamicemb.planner.capacity import resolve_options
from dynamicemb.planner.constraints import check_constraint, dynamic_options
from dynamicemb.table.optimizers import OptimizerConfig, optimizer_from_fused_params

__all__ = [
    "DynamicTable",
    "TableSite",
    "check_eb_configs",
    "dynamic_tables",
    "table_sites",
    "warn_about_what_has_no_effect",
]

# Names listed in a message before it says how many more there are.
_LISTED_NAMES = 50
# Constraints that say nothing about a dynamic table.
_OF_STATIC_KERNELS = ("min_partition", "cache_params", "enforce_hbm", "bounds_check_mode")


@dataclass(frozen=True)
class TableSite:
    """One table of the model: the module at ``path`` that holds it, and what of the rest is known.

    Attributes:
        path: fully qualified name of the module, "" for the root.
        name: of the table, unique in its module.
        module: the collection.
        config: torchrec's config; None where the module has none that we can ask for.
        param: the parameter that torchrec would shard; None if no sharder takes the module.
        sharder: takes the module; None: none of those given.
    """

    path: str
    name: str
    module: nn.Module
    config: Optional[BaseEmbeddingConfig]
    param: Optional[torch.Tensor]
    sharder: Optional[ModuleSharder[nn.Module]]


@dataclass(frozen=True)
class DynamicTable:
    """A dynamic table with resolved options, and its memory on each rank. All ranks hold equally much.

    Attributes:
        path, name, config: as in :class:`TableSite`.
        options: resolved (see :func:`~dynamicemb.planner.capacity.resolve_options`).
        layout: of its rows.
    """

    path: str
    name: str
    config: BaseEmbeddingConfig
    options: DynamicEmbTableOptions
    layout: RowLayout

    @property
    def fqn(self) -> str:
        """Named as torchrec's plan does."""
        return f"{self.path}.{self.name}"

    @property
    def slots(self) -> int:
        """Rows that a rank holds at full size."""
        assert self.options.max_capacity is not None  # resolved
        return self.options.max_capacity

    @property
    def metadata_bytes(self) -> int:
        """Digests, keys and scores."""
        return self.slots * METADATA_BYTES_PER_SLOT

    @property
    def row_bytes(self) -> int:
        """Rows with their optimizer state and padding."""
        return self.total_bytes - self.metadata_bytes

    @property
    def total_bytes(self) -> int:
        return table_bytes(self.slots, self.options.bucket_capacity, self.layout)


def table_sites(module: nn.Module, sharders: Sequence[ModuleSharder[nn.Module]]) -> list[TableSite]:
    """Every table that torchrec's enumerator would find in ``module``, and those of collections without a sharder."""
    return list(_sites("", module, {sharder_name(sharder.module_type): sharder for sharder in sharders}))


def _sites(path: str, module: nn.Module, sharders: Mapping[str, ModuleSharder[nn.Module]]) -> Iterator[TableSite]:
    sharder = sharders.get(sharder_name(type(module)))
    configs = {config.name: config for config in _configs(module)}
    if sharder is not None:
        for name, param in sharder.shardable_parameters(module).items():
            yield TableSite(path, name, module, configs.get(name), param, sharder)
    elif configs:
        for name, config in configs.items():
            yield TableSite(path, name, module, config, None, None)
    else:
        for child_name, child in module.named_children():
            yield from _sites(f"{path}.{child_name}" if path else child_name, child, sharders)


def _configs(module: nn.Module) -> Sequence[BaseEmbeddingConfig]:
    if isinstance(module, EmbeddingCollectionInterface):
        return module.embedding_configs()
    if isinstance(module, EmbeddingBagCollectionInterface):
        return module.embedding_bag_configs()
    return ()


def dynamic_tables(
    sites: Sequence[TableSite],
    constraints: Optional[Mapping[str, ParameterConstraints]],
    world_size: int,
) -> dict[tuple[str, str], DynamicTable]:
    """The dynamic tables among ``sites`` by (path, name), after every check that needs no memory.

    Raises:
        ConfigError: constraints for tables that the model does not have (checked first); a constraint, an option, an
            optimizer or a kind of module that dynamic tables do not support.
    """
    constraints = constraints or {}
    _check_names(constraints, sites)
    for name, constraint in constraints.items():
        check_constraint(name, constraint)
    options = dynamic_options(constraints)
    return {
        (site.path, site.name): _dynamic_table(site, options[site.name], world_size)
        for site in sites
        if site.name in options
    }


def _check_names(constraints: Mapping[str, ParameterConstraints], sites: Sequence[TableSite]) -> None:
    known = list(dict.fromkeys(site.name for site in sites))
    unknown = [name for name in constraints if name not in set(known)]
    if not unknown:
        return
    described = []
    for name in unknown:
        close = difflib.get_close_matches(name, known, n=1)
        described.append(f"'{name}' (did you mean '{close[0]}'?)" if close else f"'{name}'")
    raise ConfigError(
        f"constraints name tables that the model does not have: {_listed(described)}; "
        f"its tables are {_listed([repr(name) for name in known]) or 'none'}. Correct the names, or remove them"
    )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _LISTED_NAMES
    return ", ".join(names[:_LISTED_NAMES]) + (f" and {more} more" if more > 0 else "")


def _check_storable(site: TableSite) -> None:
    """Raises for names that no checkpoint can hold, since names are parts of names of files there."""
    collection = f"model.{site.path}" if site.path else "model"
    for what, name, limit in (
        ("its name", site.name, MAX_TABLE_BYTES),
        ("its collection", collection, MAX_COLLECTION_BYTES),
    ):
        if reason := unstorable(name, limit):
            raise ConfigError(
                f"table {site.name!r}: {what}, {name!r}, cannot be stored in a checkpoint: {reason}; rename it"
            )


def _dynamic_table(site: TableSite, options: Optional[DynamicEmbTableOptions], world_size: int) -> DynamicTable:
    _check_storable(site)
    where = f"table '{site.name}': its module '{site.path}' is of type {type(site.module).__name__}"
    if isinstance(site.module, EmbeddingBagCollectionInterface):
        raise ConfigError(
            f"{where}, and pooled bags are not supported by dynamic tables yet; use an EmbeddingCollection and pool "
            "its output, or remove use_dynamicemb"
        )
    if site.config is None or not isinstance(site.module, EmbeddingCollection):
        raise ConfigError(f"{where}; dynamic tables need an EmbeddingCollection: use one, or remove use_dynamicemb")
    if site.sharder is None or site.param is None:
        raise ConfigError(
            f"{where}, which no sharder takes; add dynamicemb.shard.DynamicEmbeddingCollectionSharder() to the sharders"
        )
    for name in ("use_virtual_table", "enable_embedding_update", "stash_weights"):  # not in every torchrec
        if getattr(site.config, name, False):
            raise ConfigError(
                f"table '{site.name}': {name}=True of its config belongs to torchrec's own tables and cannot be "
                "combined with use_dynamicemb=True; remove one of the two"
            )
    resolved = resolve_options(site.name, site.config, options, world_size)
    assert resolved.dim is not None and resolved.embedding_dtype is not None
    optimizer = _optimizer(site.name, site.param, site.sharder)
    layout = RowLayout(resolved.dim, resolved.embedding_dtype, optimizer.kind)
    return DynamicTable(site.path, site.name, site.config, resolved, layout)


def _optimizer(table: str, param: torch.Tensor, sharder: ModuleSharder[nn.Module]) -> OptimizerConfig:
    """The optimizer that torchrec would give the table: that of the parameter over that of the sharder."""
    kwargs = getattr(param, "_optimizer_kwargs", [{}])
    classes = getattr(param, "_optimizer_classes", [None])
    if len(kwargs) != 1 or len(classes) != 1:
        names = ", ".join(getattr(entry, "__name__", str(entry)) for entry in classes)
        raise ConfigError(f"table '{table}': it has {len(classes)} optimizers in backward ({names}); apply one")
    # New dictionaries throughout: torchrec reads the user's own later.
    own: dict[str, Any] = dict(kwargs[0])
    if "lr" in own:
        own["learning_rate"] = own.pop("lr")
    if classes[0] is not None:
        try:
            own["optimizer"] = optimizer_type_to_emb_opt_type(classes[0])
        except ValueError:
            own["optimizer"] = classes[0].__name__
    return optimizer_from_fused_params(table, {**(getattr(sharder, "fused_params", None) or {}), **own})


def check_eb_configs(eb_configs: Iterable[BaseEmbeddingConfig], sites: Sequence[TableSite]) -> None:
    """Check that the configs a user repeated are those of the model.

    Raises:
        ConfigError: something that is not a config, a table that the model does not have, or another size, width, data
            type or list of features than the model's.
    """
    configs_by_name: dict[str, list[BaseEmbeddingConfig]] = {}
    for site in sites:
        if site.config is not None:
            configs_by_name.setdefault(site.name, []).append(site.config)
    for config in eb_configs:
        candidates = configs_by_name.get(config.name)
        if candidates is None:
            raise ConfigError(
                f"eb_configs: table '{config.name}' is not in the model, whose tables are "
                f"{_listed([repr(name) for name in configs_by_name]) or 'none'}; remove it, or leave eb_configs out"
            )
        differences = [_difference(config, candidate) for candidate in candidates]
        if all(differences):
            raise ConfigError(
                f"eb_configs: table '{config.name}' has {differences[0]}; give the configs that the model was built "
                "from, or leave eb_configs out"
            )


def _difference(config: BaseEmbeddingConfig, model: BaseEmbeddingConfig) -> str:
    for name in ("num_embeddings", "embedding_dim", "data_type", "feature_names"):
        given, own = getattr(config, name), getattr(model, name)
        if given != own:
            return f"{name}={given}, but the model's is {own}"
    return ""


def warn_about_what_has_no_effect(table: DynamicTable, constraint: Optional[ParameterConstraints]) -> None:
    """Warn of a config's ``init_fn``, which cannot initialise rows that do not exist yet and is not called, of numbers
    that its initializer does not look at, and of constraints that tune torchrec's static kernels."""
    if _has_own_init_fn(table.config):
        _warn(
            f"table '{table.name}': init_fn of its config has no effect on a dynamic table, whose rows are initialised "
            "one by one when their id is first seen; use dynamicemb_options.initializer_args"
        )
    for name in ("initializer_args", "eval_initializer_args"):
        initializer = getattr(table.options, name)
        if initializer is not None and initializer.without_effect:
            _warn(
                f"table '{table.name}': {', '.join(initializer.without_effect)} of its {name} have no effect with mode "
                f"{initializer.mode.name}; set the mode that they belong to, or remove them"
            )
    unused = [name for name in _OF_STATIC_KERNELS if getattr(constraint, name, None) is not None]
    if unused:
        _warn(
            f"table '{table.name}': {', '.join(unused)} of its constraints have no effect on a dynamic table, as they "
            "tune torchrec's static tables; remove them"
        )


def _has_own_init_fn(config: BaseEmbeddingConfig) -> bool:
    """A config without ``init_fn`` has torchrec's default, which draws between the bounds that we use, too."""
    init_fn = config.init_fn
    if not isinstance(init_fn, functools.partial):
        return init_fn is not None
    bounds = {"a": config.get_weight_init_min(), "b": config.get_weight_init_max()}
    return init_fn.func is not torch.nn.init.uniform_ or init_fn.args != () or init_fn.keywords != bounds


def _warn(message: str) -> None:
    warnings.warn(message, DynamicEmbWarning, stacklevel=5)
