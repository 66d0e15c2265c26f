"""Checkpoints: the on-disk format, dump, load, conversion, state dicts. ``docs/format.md`` specifies the files."""
