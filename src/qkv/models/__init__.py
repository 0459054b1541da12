"""Whole models, made of the parts in `qkv.nn`."""
