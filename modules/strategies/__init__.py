"""Strategies that shard a model among ranks."""
