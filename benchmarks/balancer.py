"""A least-busy balancer before Cog servers, as one writes it in an afternoon: to measure against.

    balancer.py PORT LIMIT URL...

Each server gets LIMIT requests at a time; more wait here. One that has just answered may refuse.
"""

from __future__ import annotations

import asyncio
import sys

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

JSON = {"Content-Type": "application/json"}


def main() -> None:
    """Serve until killed."""
    port, limit, *urls = sys.argv[1:]
    app = make_app(urls, int(limit))
    uvicorn.run(app, port=int(port), log_level="warning", access_log=False, backlog=2048)


def make_app(urls: list[str], limit: int) -> Starlette:
    """Forwards predictions to whoever has the fewest."""
    busy = dict.fromkeys(urls, 0)
    room = asyncio.Semaphore(limit * len(urls))
    pool = httpx.Limits(max_connections=None)
    client = httpx.AsyncClient(timeout=None, limits=pool, trust_env=False)

    async def forward(request: Request) -> Response:
        body = await request.body()
        async with room:
            url = min(busy, key=lambda each: busy[each])
            busy[url] += 1
            try:
                answer = await client.post(f"{url}/predictions", content=body, headers=JSON)
                while answer.status_code == 409:
                    await asyncio.sleep(0.01)
                    answer = await client.post(f"{url}/predictions", content=body, headers=JSON)
            finally:
                busy[url] -= 1
        return Response(answer.content, answer.status_code, media_type="application/json")

    return Starlette(routes=[Route("/predictions", forward, methods=["POST"])])


if __name__ == "__main__":
    main()
