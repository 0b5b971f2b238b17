"""Distilling SDXL, or a checkpoint made from it, on a folder of captioned pictures.

May import method and the ground.
"""
