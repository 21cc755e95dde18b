"""What a model is, read off its program: axes, and the factors that keep its function."""
