"""Hash tables: groups of them, their rows, scores, optimizers and the autograd function. Knows nothing of torchrec."""
