"""Dumps of NVIDIA's dynamicemb: raw arrays without header, one file for each table, or one for each table and rank."""

from dynamicemb.checkpoint.formats.nvidia.files import looks_like_dump
from dynamicemb.checkpoint.formats.nvidia.reader import NvidiaSource, nvidia_sources
from dynamicemb.checkpoint.formats.nvidia.writer import NvidiaTableWriter

__all__ = ["NvidiaSource", "NvidiaTableWriter", "looks_like_dump", "nvidia_sources"]
