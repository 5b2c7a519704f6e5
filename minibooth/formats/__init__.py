"""Public weight files in and out: diffusers' folder, LDM's single file, .ckpt, adapters, and the
hub; what their configs say; and the parts of a model that they make.

May import common and the networks that the weights are for, their schedule and tokenizer.
"""
