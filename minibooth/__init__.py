"""DreamBooth for Stable Diffusion from scratch. Read schedule.py first."""

from .common.errors import UserError
from .formats import hub
from .pipeline import StableDiffusion, load
from .training import data, photos
from .upscaler import Upscaler
