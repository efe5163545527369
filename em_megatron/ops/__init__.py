"""Operators of the memory. Each lives in its own folder: `naive` is the truth, `batched` the efficient PyTorch path."""
