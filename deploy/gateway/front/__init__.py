"""The front door: all parts put together as an ASGI app, its port, what it shows of itself.

May import dialects, life, hooks, keeping and the ground.
"""
