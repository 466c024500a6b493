"""The widths of blocks: gates, budget, scores, search, and the closed-form refit."""
