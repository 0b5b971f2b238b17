"""The models' calls done faster: a table of ways, each measured and judged beside the plain one.

May import models, store, loras, request and the ground.
"""
