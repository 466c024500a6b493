"""The science of pruning: plain PyTorch and transformers, usable without Lightning."""

__version__ = "0.1.0"
