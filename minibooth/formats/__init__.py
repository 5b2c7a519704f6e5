"""Public weight files in and out: diffusers' folder, LDM's single file, .ckpt, and the hub.

May import common and the networks that the weights are for.
"""
