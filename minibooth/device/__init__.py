"""What a GPU needs: its memory and precision, CUDA graphs, the kernels that are right and faster on
it, and ranks, where a run has several.

May import common and what one reads. It knows nothing of photographs, settings or losses.
"""
