"""Kernels of both engines, one folder for each operation: contract and dispatch, ``cpu.py`` (Numba), ``triton.py``."""
