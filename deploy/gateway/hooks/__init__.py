"""Webhooks: who may be told, in which order, signed how.

May import keeping and the ground.
"""
