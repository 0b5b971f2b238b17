"""DMD2 itself: the losses, the networks that they need, and the loop.

May import the ground alone.
"""
