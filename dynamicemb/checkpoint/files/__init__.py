"""The native format: what the files hold, reading and writing them, and how a checkpoint takes its place."""
