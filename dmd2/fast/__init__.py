"""The models' calls done faster: exact rewrites, and a table of ways measured beside plain.

May import models, store, loras, request and the ground.
"""
