"""What outlives a gateway: the journal, and the outputs beside it.

May import the ground alone.
"""
