"""What surrounds the step: settings, photographs, class images, latents, optimizer, the memory that
a run will need, the state to resume from, and what a run tells.

May import common, formats, device and what one reads; never a program.
"""
