"""Time and memory measured: the Triton kernels, and this project beside its peers.

A program: may import everything but evaluate. Nothing imports it.
"""
