"""A real server under load: requests with known answers, clients that judge every answer."""

from __future__ import annotations

import base64
import io
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dmd2.engine.batch_limits import BatchLimits
from dmd2.engine.engine import Engine
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline

# Of every random choice in this folder; another one repeats another run.
SEED = int(os.environ.get("SOAK_SEED", "20"))
TIMEOUT_S = 60.0
BACK_OFF_S = 0.05
# The largest and the mean difference of 255. Alone or in company an image differs by 1 at most, to
# which jpg and webp add their own rounding; two different images differ by 30 in the mean.
TOLERANCE = {"PNG": (1.0, 1.0), "JPEG": (12.0, 0.2), "WEBP": (24.0, 1.0)}
BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"prompt": "  "}, "visible character"),
    ({"prompt": "x", "width": 64}, "height is missing"),
    ({"prompt": "x", "num_inference_steps": 3}, "use 2 or 4"),
    ({"prompt": "x", "negative_prompt": "y"}, "raise guidance_scale"),
    ({"prompt": "x", "seed": -1}, "minimum of 0"),
    ({"seed": 1}, "prompt"),
)


@dataclass(frozen=True)
class KnownRequest:
    """A request whose right answer is known.

    Attributes:
        inputs: of the prediction.
        files: that it makes when it is alone.
        error: words of the error that it must end with, where it has no files.
    """

    inputs: dict[str, Any]
    files: tuple[bytes, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a client got.

    Attributes:
        prediction_id: that it asked with.
        kind: a prediction's status; "full" (409), "refused" (422), "unready" (503), "closed" (the
            connection was, or there was none) or "silent" (nothing came in time).
        seconds: that it waited.
        body: of the response.
    """

    prediction_id: str
    kind: str
    seconds: float
    body: dict[str, Any]


def draw_inputs(rng: random.Random) -> dict[str, Any]:
    """One request's inputs, a small one more often than not."""
    width, height = rng.choice(((64, 64), (64, 64), (64, 64), (128, 64), (72, 104)))
    guidance = rng.choice((0, 0, 0, 3.0))
    return {
        "prompt": rng.choice(("a red circle", "a blue square", "one " * 90)),
        "guidance_scale": guidance,
        "negative_prompt": rng.choice(("", "blurry")) if guidance else "",
        "width": width,
        "height": height,
        "num_outputs": rng.choice((1, 1, 1, 1, 1, 1, 2, 4)),
        "num_inference_steps": rng.choice((2, 2, 2, 4)),
        "output_format": rng.choice(("png", "png", "jpg", "webp")),
        "embed_metadata": rng.random() < 0.5,
        "seed": rng.randrange(2**32 - 4),
    }


def known_requests(
    pipeline: Pipeline, folder: Path, num_requests: int, **fixed: Any
) -> list[KnownRequest]:
    """Requests and their files, which an engine of this process makes, one image at a time.

    Args:
        pipeline: of the engine.
        folder: for its files.
        num_requests: how many.
        fixed: inputs that all of them have.
    """
    engine, rng = Engine(pipeline, folder, BatchLimits(step=1)), random.Random(SEED)
    known = []
    for _ in range(num_requests):
        inputs = draw_inputs(rng) | fixed
        request = GenerationRequest.resolve(engine.card, **inputs)
        paths = engine.submit(request).result().paths
        known.append(KnownRequest(inputs, tuple(path.read_bytes() for path in paths)))
    engine.close()
    assert_none_passes_for_another(known)
    return known


def assert_none_passes_for_another(known: Sequence[KnownRequest]) -> None:
    """Images that were mixed up can be told only if no two are alike."""
    files = [file for request in known for file in request.files]
    for number, file in enumerate(files):
        assert not any(is_alike(file, other) for other in files[:number]), f"seed {SEED}"


def bad_requests() -> list[KnownRequest]:
    return [KnownRequest(inputs, error=error) for inputs, error in BAD]


def fault_of(known: KnownRequest, answer: Answer) -> str | None:
    """What is wrong with an answer that should be the right one; None if it is."""
    name = f"{answer.prediction_id} (seed {SEED}, {known.inputs})"
    if known.error is not None:
        refused = answer.kind in ("failed", "refused") and known.error in str(answer.body)
        return None if refused else f"{name} was not refused: {answer}"
    if answer.kind != "succeeded":
        return f"{name} was lost: {answer}"
    files, first = files_of(answer), known.inputs["seed"]
    if answer.body["metrics"]["seeds"] != list(range(first, first + len(known.files))):
        return f"{name} has another's seeds: {answer.body['metrics']}"
    if len(files) != len(known.files) or not all(map(is_alike, files, known.files)):
        return f"{name} has other images than alone"
    return None


def files_of(answer: Answer) -> list[bytes]:
    return [base64.b64decode(output.partition(",")[2]) for output in answer.body["output"]]


def is_alike(file: bytes, twin: bytes) -> bool:
    """Whether two files may be the same image, made in different company."""
    if file == twin:
        return True
    (kind, pixels), (other_kind, other_pixels) = opened(file), opened(twin)
    if kind != other_kind or pixels.shape != other_pixels.shape:
        return False
    difference, (largest, mean) = np.abs(pixels - other_pixels), TOLERANCE[kind]
    return bool(difference.max() <= largest and difference.mean() <= mean)


def opened(file: bytes) -> tuple[str, NDArray[np.int16]]:
    """A file's format and its pixels [H, W, 3], signed so that they can be subtracted."""
    with Image.open(io.BytesIO(file)) as image:
        return str(image.format), np.asarray(image.convert("RGB")).astype(np.int16)


def http_client(url: str, timeout_s: float = TIMEOUT_S) -> httpx.Client:
    # It speaks no TLS, and to load the certificates takes 17 ms of CPU.
    return httpx.Client(base_url=url, timeout=timeout_s, trust_env=False, verify=False)


def ask(http: httpx.Client, prediction_id: str, inputs: dict[str, Any]) -> Answer:
    """Ask once, and wait for whatever comes."""
    began = time.monotonic()
    body: dict[str, Any]
    try:
        response = http.post("/predictions", json={"id": prediction_id, "input": inputs})
    except httpx.TimeoutException as error:
        kind, body = "silent", {"error": repr(error)}
    except httpx.TransportError as error:
        kind, body = "closed", {"error": repr(error)}
    else:
        kind, body = kind_of(response), response.json()
    return Answer(prediction_id, kind, time.monotonic() - began, body)


def kind_of(response: httpx.Response) -> str:
    """As in Answer."""
    if response.status_code in (409, 422, 503):
        return {409: "full", 422: "refused", 503: "unready"}[response.status_code]
    return str(response.json().get("status", response.status_code))


class Clients:
    """Clients that each ask for one known request after another, from threads of their own.

    They go on until they are stopped, have asked often enough, or find the server gone. A server
    that is full is asked again.

    Args:
        url: the server's.
        known: what they draw from.
        num_clients: that ask at once.
        name: of this load; the prediction ids begin with it.
        limit: how many requests they make together; as many as there is time for, if None.
        timeout_s: that each waits for its answer.
        ask: how each asks once.

    Attributes:
        answers: all that came, without their images, each with its fault if it has one.
        asking: the ids of the requests that no answer has come for.
        num_full: how often the server was full.
    """

    def __init__(
        self,
        url: str,
        known: Sequence[KnownRequest],
        num_clients: int,
        name: str,
        limit: int | None = None,
        timeout_s: float = TIMEOUT_S,
        ask: Callable[[httpx.Client, str, dict[str, Any]], Answer] = ask,
    ) -> None:
        self._url, self._known, self._name, self._timeout_s = url, known, name, timeout_s
        self._ask = ask
        self._rng, self._lock = random.Random(f"{SEED} {name}"), threading.Lock()
        self._stopped, self._limit, self._num_drawn = threading.Event(), limit, 0
        self.answers: list[tuple[Answer, str | None]] = []
        self.asking: set[str] = set()
        self.num_full = 0
        self._threads = [threading.Thread(target=self._run) for _ in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask for nothing more, and wait for what was asked for."""
        self._stopped.set()
        self.wait()

    def wait(self) -> None:
        """Until every client has come to its end."""
        for thread in self._threads:
            thread.join()

    def __bool__(self) -> bool:
        """Whether any client is still at work."""
        return any(thread.is_alive() for thread in self._threads)

    @property
    def kinds(self) -> Counter[str]:
        """How many answers there are of each kind."""
        return Counter(answer.kind for answer, _ in list(self.answers))

    @property
    def faults(self) -> list[str]:
        """What is wrong with the answers, where each should be the right one."""
        return [fault for _, fault in list(self.answers) if fault]

    def _draw(self) -> tuple[str, KnownRequest] | None:
        with self._lock:
            if self._stopped.is_set() or self._num_drawn == self._limit:
                return None
            self._num_drawn += 1
            return f"{self._name}-{self._num_drawn}", self._rng.choice(self._known)

    def _run(self) -> None:
        with http_client(self._url, self._timeout_s) as http:
            while drawn := self._draw():
                prediction_id, known = drawn
                self.asking.add(prediction_id)
                answer = self._ask_until_taken(http, prediction_id, known)
                if answer.kind != "full":
                    fault = fault_of(known, answer)
                    answer.body.pop("output", None)
                    self.answers.append((answer, fault))
                self.asking.discard(prediction_id)
                if answer.kind == "closed":
                    return
                if answer.kind == "unready":
                    time.sleep(BACK_OFF_S)

    def _ask_until_taken(
        self, http: httpx.Client, prediction_id: str, known: KnownRequest
    ) -> Answer:
        """The answer, which is "full" only where the clients were stopped meanwhile."""
        while True:
            answer = self._ask(http, prediction_id, known.inputs)
            if answer.kind != "full" or self._stopped.is_set():
                return answer
            self.num_full += 1
            time.sleep(BACK_OFF_S)
