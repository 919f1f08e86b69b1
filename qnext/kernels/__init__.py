"""Ops: tensors in, tensors out.

One folder per op. ``__init__.py`` is the contract (maths, shapes, checks, choice),
``reference.py`` is readable torch and the CPU runtime, ``triton*.py`` has the same signature
for the GPU. ``select.py`` holds the one rule that chooses between them.
"""
