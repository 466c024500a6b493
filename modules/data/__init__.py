"""Text, as windows of tokens."""
