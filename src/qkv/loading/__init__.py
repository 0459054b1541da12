"""Trained models, in and out: what `qkv.load` reads, what it hands out, and what `qkv.save` writes.

`layouts.py` has the door, and a row for each layout of a checkpoint. What is handed out stands in `loaded.py`,
`translator.py` and `ready.py`.
"""
