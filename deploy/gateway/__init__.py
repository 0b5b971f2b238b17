"""The gateway: requests in Cog's and Replicate's dialects, before one engine or many.

Its ground: the `settings`, a `prediction`, and the `work` that engines are asked for. Above it are
wings, each of which says what it may import. Only `engines` loads torch, and only `many` and
`engines.ray_engines` import Ray. The container imports nothing of all this.
"""
