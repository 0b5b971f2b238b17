"""Faster ways: the models' own calls, rewritten so that a device does them sooner.

May import models, store, loras, request and the ground.
"""
