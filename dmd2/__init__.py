"""Few-step SDXL (DMD2, arXiv 2405.14867): from a prompt to image files."""

__version__ = "0.1.0"
