"""An honest process: its log, its health, its numbers, its old files, and its end.

May import the ground alone.
"""
