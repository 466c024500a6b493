"""Zeros in weight matrices: allocation x score x refinement x compensation over one block loop."""
