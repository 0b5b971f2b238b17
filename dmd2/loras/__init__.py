"""LoRAs: where they come from, and what they add to a model's weights.

May import request and the ground.
"""
