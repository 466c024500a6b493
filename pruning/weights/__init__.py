"""Weight pruning: allocation x score x refinement x compensation in one loop over blocks."""
