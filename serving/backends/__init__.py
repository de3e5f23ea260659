"""Triton backends of our own; each folder here is one python-based backend."""
