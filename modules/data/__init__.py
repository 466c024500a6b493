"""Text data as windows of tokens."""
