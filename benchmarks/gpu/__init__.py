"""Benchmarks on a GPU, one module for each topic; ``run_gpu.py`` runs them."""
