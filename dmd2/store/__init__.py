"""What lies on disk: the manifest, and fetching, converting and verifying what it names.

May import loras, request and the ground.
"""
