"""What a model costs and how good it is: quality, size, speed, and all of it side by side."""
