"""Attention and Transformers, from the formula to a model that you can train, look inside and exchange."""
