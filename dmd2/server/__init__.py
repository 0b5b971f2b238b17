"""An honest process: its log, its health, its old files, and its end.

May import the ground alone.
"""
