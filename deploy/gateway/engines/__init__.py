"""The engines, as a gateway sees them: one in this process, or many on Ray.

May import the ground alone.
"""
