"""Export pruned models as folders: modelling file, verification, model card."""
