"""Measurements of models: quality, size and speed, side by side."""
