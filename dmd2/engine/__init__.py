"""Who runs when: accepts requests, gives the device its work, hands over the files.

May import sampling, models, store, loras, request and the ground.
"""
