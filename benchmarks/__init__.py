"""Measurements against named opponents; each script has --help and --json FILE."""
