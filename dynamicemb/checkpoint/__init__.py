"""Checkpoints: dump, load, deltas, merging, conversion, ``torch.distributed.checkpoint``, static tables.

* ``files``: the native format, which ``docs/format.md`` specifies; knows no model.
* ``formats``: those of others.
* ``inspection``: what the command shows of checkpoints, without a model.
* ``dump``, ``incremental``, ``load``: from and to the tables of a model.
* ``chain``, ``merge``, ``convert``: without one.
* ``dcp``, ``static``: from ``torch.distributed.checkpoint``, and from state dicts of static tables.
"""
