"""A model as a sequence of blocks that calibration text runs through, one after the other."""
