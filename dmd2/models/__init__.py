"""What is on the device: the networks themselves, loaded strictly, and what a device is asked.

May import store, loras, request and the ground.
"""
