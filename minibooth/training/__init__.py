"""What surrounds the step: settings, photographs, class images, latents, optimizer, memory, CUDA
graphs, the state to resume from, and what a run tells.

May import common, formats and what one reads; never a program.
"""
