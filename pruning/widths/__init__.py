"""Width pruning: score x search x budget x compensation over the gates of a model."""
