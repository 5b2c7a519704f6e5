"""Attention and GroupNorm in Triton. Read kernels/README.md, then attention.py."""
