"""Triton kernels compiled for GPUs that need not be there: which ways there are to launch them, and what they need."""
