"""The making of the demo model: its world, its networks, and what they can do, measured.

May import method and the ground.
"""
