"""Many engines: Ray, the engines and the gateway on it, their start and end.

May import front, dialects, life, hooks, keeping, engines and the ground.
"""
