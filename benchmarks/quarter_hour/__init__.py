"""The first fifteen minutes on a GPU, as three commands that need no pip and no make: docs/gpu-run.md."""
