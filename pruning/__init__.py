"""Pruning methods in plain PyTorch and transformers, usable without Lightning."""

if __name__ == "pruning":
    raise ImportError("This package is secateur.pruning now; see `python -m secateur --help`.")
