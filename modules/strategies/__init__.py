"""Strategies that divide a model among ranks."""
