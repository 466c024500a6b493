"""The science of pruning: plain PyTorch and transformers, usable without Lightning."""
