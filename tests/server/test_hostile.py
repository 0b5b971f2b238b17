"""Hostile inputs, by hand, through the real server: a definite answer, and no harm done.

After every test, and every value that reaches the worker, the next valid request gives the same
pixels as before, from the same worker. The inputs themselves are in tests/hostile_inputs.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from cog_schema import build_schema
from cog_server import CogServer
from hostile_inputs import (
    BODIES,
    HEADERS,
    IDS,
    INVISIBLE,
    JSON,
    MALFORMED,
    NOT_JSON,
    OK,
    OVERSIZED,
    PROMPTS,
    VALUES,
)  # fmt: skip
from jsonschema import Draft7Validator
from PIL import ExifTags, Image
from servers import assert_alike, images_of, worker_of

from dmd2.settings import ROOT

COGLET = Path("/tmp/coglet/predictions")
LONGEST_S = 20.0
SCHEMA = build_schema((ROOT / "predict.py").read_text(encoding="utf-8"))
FIELDS: dict[str, Any] = SCHEMA["components"]["schemas"]["Input"]["properties"]


class Site:
    """A server, and how it was before anything hostile came.

    Attributes:
        server: what is attacked.
        folder: holds the server's log, and the folders that it takes for home, tmp and outputs.
    """

    def __init__(self, server: CogServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self._client = httpx.Client(base_url=server.url, trust_env=False, timeout=LONGEST_S)
        self._worker, self._before = worker_of(server), self._pixels()

    def post(self, body: bytes, headers: dict[str, str] = JSON) -> httpx.Response:
        """The answer to a body."""
        return self._client.post("/predictions", content=body, headers=headers)

    def put(self, path_id: str, body: bytes = OK) -> httpx.Response:
        """The answer to a body under an id, which is given as it is to stand in the address."""
        return self._client.put(f"/predictions/{path_id}", content=body, headers=JSON)

    def serves_as_before(self) -> None:
        """Fail unless a valid request gives the pixels that it gave at first."""
        assert np.array_equal(self._pixels(), self._before)

    def is_unharmed(self) -> None:
        """Fail unless everything is as it was."""
        self.serves_as_before()
        assert worker_of(self.server) == self._worker
        assert self.server.health()["status"] == "READY"
        for name in ("home", "tmp"):
            assert list((self.folder / name).iterdir()) == []

    def _pixels(self) -> Any:
        body = {"input": {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2}}
        (image,) = images_of(self.post(json.dumps(body).encode()).json())
        return np.asarray(Image.open(io.BytesIO(image)))


@pytest.fixture(scope="module")
def site(server: CogServer, server_folder: Path) -> Site:
    return Site(server, server_folder)


@pytest.fixture(autouse=True)
def _unharmed(site: Site) -> Iterator[None]:
    yield
    site.is_unharmed()


def check(response: httpx.Response, status: int, said: str) -> None:
    """An answer is as expected: a refusal says why, and anything else is images."""
    assert response.status_code == status, response.text[:300]
    if status != 200:
        assert said in response.text[-100_000:]
    elif said:
        answer = response.json()
        assert answer["status"] == "failed", answer
        assert said in answer["error"]
    else:
        assert images_of(response.json())


@pytest.mark.parametrize("name", BODIES)
def test_bodies(name: str, site: Site) -> None:
    body, status, said = BODIES[name]
    check(site.post(body), status, said)


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name: str, site: Site) -> None:
    headers, status, said = HEADERS[name]
    check(site.post(OK, headers), status, said)


@pytest.mark.parametrize("name", OVERSIZED)
def test_oversized(name: str, site: Site) -> None:
    body, headers, statuses = OVERSIZED[name]
    with contextlib.suppress(httpx.NetworkError):  # closed before all was sent
        assert site.post(body, headers).status_code in statuses


@pytest.mark.parametrize("field", FIELDS)
def test_values(field: str, site: Site) -> None:
    """What is no JSON is a 400, and what the field's schema forbids a 422: both name the field.

    Neither reaches the worker, so that it serves as before is seen once, after all of them.
    """
    for value in NOT_JSON + VALUES:
        response = site.post(b'{"input":{"prompt":"x","%s":%s}}' % (field.encode(), value.encode()))
        if value in NOT_JSON:
            check(response, 400, "Failed to parse the request body as JSON: input.")
            assert field in response.text or value in ("", "0x10"), value[:50]
        elif not is_allowed(field, json.loads(value)):
            check(response, 422, "detail")
            assert {each["loc"][-1] for each in response.json()["detail"]} == {field}, value
        else:
            is_refused = response.json()["status"] == "failed"
            check(response, 200, f"InvalidRequestError: {field}: " if is_refused else "")
            site.serves_as_before()


def is_allowed(field: str, value: Any) -> bool:
    """Whether the schema allows a field to have a value."""
    return Draft7Validator(SCHEMA | FIELDS[field]).is_valid(value)


@pytest.mark.parametrize("output_format", ["png", "jpg", "webp"])
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str, output_format: str, site: Site) -> None:
    """A prompt is refused by name, or stands in the file as it was given."""
    prompt, said = PROMPTS[name]
    inputs = {"prompt": prompt, "output_format": output_format, "num_inference_steps": 2}
    response = site.post(json.dumps({"input": inputs}).encode())
    check(response, 200, said and "InvalidRequestError: prompt: ")
    check(response, 200, said)
    if not said:
        (image,) = images_of(response.json())
        assert stored_text(image).startswith(f"{prompt}\nSteps: 2, Sampler: LCM")


def stored_text(data: bytes) -> str:
    """The parameters inside an image's file."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "PNG":
            return str(image.text["parameters"])
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    return str(comment.removeprefix(b"UNICODE\0").decode("utf-16-be"))


@pytest.mark.parametrize("prompt", INVISIBLE, ids=ascii)
def test_invisible_prompts_are_refused(prompt: str, site: Site) -> None:
    check(site.post(json.dumps({"input": {"prompt": prompt}}).encode()), 200, "visible character")


def test_nothing_that_an_input_names_is_fetched(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        for field in (*FIELDS, "image", "file"):
            site.post(json.dumps({"input": {"prompt": url, field: url}}).encode())
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("way", ["body", "address"])
@pytest.mark.parametrize("name", IDS)
def test_ids(name: str, way: str, site: Site, token: str) -> None:
    form, said, leads_out = IDS[name]
    prediction_id = form.format(token=token)
    if way == "body":
        response = site.post(OK[:-1] + b',"id":%s}' % json.dumps(prediction_id).encode())
    else:
        response = site.put(quote(prediction_id, safe="").replace(".", "%2E"))
    if way == "address" and not prediction_id:
        check(response, 404, "")
        return
    check(response, 200, said)
    assert response.json()["id"] == prediction_id
    made = list(Path("/tmp", token).rglob("*"))
    assert bool(made) == leads_out
    assert all(path.is_dir() for path in made), "folders, and not one file"


@pytest.fixture
def token() -> Iterator[str]:
    """A name for folders, which are deleted wherever a test's id has let them be made."""
    token = f"dmd2-hostile-{os.getpid()}"
    yield token
    for folder in (Path("/tmp", token), *COGLET.glob(f"{token}*")):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (COGLET, COGLET.parent):  # of the ids that are "", "." and ".."
        for name in ("inputs", "outputs"):
            with contextlib.suppress(OSError):  # where it holds something, it is somebody else's
                (folder / name).rmdir()


def test_an_id_that_is_no_utf8(site: Site) -> None:
    check(site.put("%ff%fe"), 400, "UTF-8")


def test_ids_that_repeat(site: Site) -> None:
    """Cog: one that is running may begin again by POST; by PUT it reports the running one."""
    body = {"prompt": "x", "seed": 1, "width": 256, "height": 256, "num_outputs": 4}
    asked = json.dumps({"input": body, "id": "repeated"}).encode()
    with ThreadPoolExecutor() as pool:
        posts = [pool.submit(site.post, asked) for _ in range(3)]
        answers = [site.put("repeated", asked), *(post.result() for post in posts)]
    finished = [answer for answer in answers if answer.status_code == 200]
    assert len(finished) >= 3
    assert all(answer.status_code in (200, 202) for answer in answers)
    finished += [site.post(asked), site.put("repeated", asked)]
    images = [images_of(answer.json()) for answer in finished]
    for each in images:
        assert_alike(each, images[0])
    check(site.put("another", asked), 422, "must match")


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_http(name: str, site: Site) -> None:
    data, status = MALFORMED[name]
    url, answer = httpx.URL(site.server.url), b""
    with (
        socket.create_connection((url.host, url.port), timeout=LONGEST_S) as connection,
        contextlib.suppress(ConnectionError),  # closed before all was sent
    ):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(1000)
    assert answer[:13] in (b"", b"HTTP/1.1 %d " % (status or 0))


def log_of(site: Site) -> str:
    return (site.folder / "log").read_text(encoding="utf-8")


def test_an_id_forges_no_line_of_the_log(site: Site) -> None:
    site.post(OK[:-1] + b',"id":"x\\nforged"}')
    assert '"message":"forged' not in log_of(site)


def test_a_refused_prompt_is_not_logged(site: Site) -> None:
    """Cog's server logs every error."""
    site.post(b'{"input":{"prompt":"secret\\u0000"}}')
    site.post(b'{"input":{"prompt":"x","negative_prompt":"secret"}}')
    assert "secret" not in log_of(site)
