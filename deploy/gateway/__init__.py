"""The gateway: requests in Cog's and Replicate's dialects, before one engine or many.

In the order of a request's way: `settings`, the bodies (`cog_dialect`, `replicate_dialect`, with
`contract` below both), a `prediction` and what becomes of it (`predictions`, `journal`,
`webhooks`), the `work` that an engine is given, and the engines (`local_engine`, `ray_engines`).
`app` has the routes. Only the engines import torch, only `ray_engines` imports Ray, and the
container imports nothing of this.
"""
