"""Noise to pixels: the few-step sampler, and one checkpoint's models composed in one place.

May import fast, models, store, loras, request and the ground.
"""
