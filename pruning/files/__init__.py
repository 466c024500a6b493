"""Folders and files: model folders, checkpoints, fingerprints, shards."""
