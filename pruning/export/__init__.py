"""Pruned models as folders that load anywhere: modelling file, verification, model card."""
