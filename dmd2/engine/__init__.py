"""Who runs when: accepts requests, gives the device its work, hands over the files.

May import sampling, fast, models, store, loras, request and the ground.
"""
