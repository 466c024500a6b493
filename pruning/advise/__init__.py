"""What a model can be pruned to here, asked before it is pruned: measured, scaled, and said so."""
