"""Read and write model folders, checkpoints, fingerprints and shards."""
