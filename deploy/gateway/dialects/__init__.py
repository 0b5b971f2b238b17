"""What a gateway hears and says: bodies and routes of Cog's and of Replicate's HTTP.

May import life, hooks, keeping and the ground.
"""
