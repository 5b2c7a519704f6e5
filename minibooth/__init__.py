"""DreamBooth for Stable Diffusion from scratch. Read schedule.py first."""

from .errors import UserError
from .pipeline import StableDiffusion, load
