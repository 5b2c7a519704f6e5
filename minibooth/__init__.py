"""DreamBooth for Stable Diffusion from scratch. Read schedule.py first."""
