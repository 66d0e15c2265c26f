"""Checkpoints looked at without a model: whether they are sound, what they hold, how two of them differ."""
