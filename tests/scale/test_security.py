"""Who has no token reaches nothing but the gateway's port, and no log tells a prompt."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from many import RECOVERY_S, Many, attempts_of, running, wait_for, whole_tree
from promises import DIALECTS
from soak.server_under_load import ask

pytestmark = pytest.mark.scale
grpc = pytest.importorskip("grpc")
TOKEN, PROMPT = "a-token-of-the-tests", "wohlbehuetetes geheimnis"
# Methods of Ray's services, of each process one: the first tells all nodes to whoever may ask.
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/NumPendingTasks",
    "/ray.rpc.ReporterService/HealthCheck",
    "/ray.serve.ASGIService/HandleRequest",
)
ROUTES = (
    ("GET", "/"),
    ("GET", "/metrics"),
    ("GET", "/nodes"),
    ("GET", "/api/version"),
    ("POST", "/api/job_agent/jobs/"),
    ("POST", "/get_or_create_runtime_env"),
)
# What is asked beside the prompt, after how it ends.
ASKED: tuple[tuple[str, dict[str, int]], ...] = (
    ("succeeded", {}),
    ("failed", {"width": 64}),
    ("succeeded", {"num_outputs": 4}),
)
LARGE = {"width": 512, "height": 512, "num_outputs": 4}
CLOSED = {"UNAUTHENTICATED", "401"}


@pytest.fixture(scope="module")
def many(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Many, Path]]:
    """One engine, on Ray, and the folder of all logs."""
    folder = tmp_path_factory.mktemp("many")
    rays = Path(os.environ.get("RAY_TMPDIR", "/tmp/ray")).resolve()
    with running(model_folder, folder, "1", DMD2_API_TOKEN=TOKEN) as many:
        many.http.timeout = RECOVERY_S
        many.http.headers["Authorization"] = f"Bearer {TOKEN}"
        many.wait_until_ready(1)
        yield many, rays


def test_only_the_gateway_answers_without_the_token(many: tuple[Many, Path]) -> None:
    gateway, _ = many
    own = int(gateway.url.rpartition(":")[2])
    ports = listening(gateway.process.pid)
    assert own in {port for _, port in ports}
    assert httpx.post(f"{gateway.url}/predictions", json={}, trust_env=False).status_code == 401
    told = {port: what_is_told(port) for _, port in ports if port != own}
    print({f"{address}:{port}": told.get(port) for address, port in sorted(ports)})
    assert all(each <= {*CLOSED, "numbers"} for each in told.values())
    for address, port in ports:
        if not is_loopback(address):
            assert told[port] == {"UNAUTHENTICATED"}, f"{address}:{port} is open to others"
    assert sum("UNAUTHENTICATED" in each for each in told.values()) > 5, "Ray was not found"


def listening(pid: int) -> set[tuple[str, int]]:
    """Where a process and all below it listen."""
    found = set()
    for process in whole_tree(pid):
        for each in process.net_connections("inet"):
            if each.status == psutil.CONN_LISTEN:
                found.add((each.laddr.ip, each.laddr.port))
    return found


def is_loopback(address: str) -> bool:
    return address.removeprefix("::ffff:").startswith("127.") or address == "::1"


def what_is_told(port: int, token: str | None = None) -> set[str]:
    """What a port of this machine tells, by what it calls it; nothing of what it does not know."""
    bearer = None if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        told = {over_grpc(channel, method, bearer) for method in METHODS}
    told |= {over_http(port, *route) for route in ROUTES}
    return told - {"UNAVAILABLE", "UNIMPLEMENTED", "404", "405", "nothing"}


def over_grpc(channel: Any, method: str, bearer: Any) -> str:
    try:
        channel.unary_unary(method)(b"", timeout=5, metadata=bearer)
    except grpc.RpcError as error:
        return str(error.code().name)
    return f"all of {method}"


def over_http(port: int, method: str, path: str) -> str:
    try:
        url = f"http://127.0.0.1:{port}{path}"
        response = httpx.request(method, url, timeout=5, trust_env=False)
    except httpx.HTTPError:
        return "nothing"
    if response.status_code >= 400:
        return str(response.status_code)
    return "numbers" if response.text.startswith("# HELP") else f"{path}: {response.text[:80]}"


def test_the_token_opens_what_is_closed_without_it(many: tuple[Many, Path]) -> None:
    """Else the test above would pass for a method that nobody has."""
    gateway, _ = many
    environ = psutil.Process(gateway.pids("ServeController")[0]).environ()
    token = Path(environ["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o077 == 0 or token.parent.stat().st_mode & 0o077 == 0
    told = [what_is_told(port, token.read_text()) for _, port in listening(gateway.process.pid)]
    assert any(f"all of {METHODS[0]}" in each for each in told), told


def test_no_log_tells_a_prompt_or_a_token(many: tuple[Many, Path]) -> None:
    """Whatever is asked, in either dialect, done, refused, or done again."""
    gateway, rays = many
    for number, (kind, inputs) in enumerate(ASKED):
        answer = ask(gateway.http, f"secret-{number}", {"prompt": PROMPT, **inputs})
        assert answer.kind == kind, answer
    promised = [later(gateway.http, "secret-later", {"prompt": PROMPT}) for later in DIALECTS]
    for id in promised:
        wait_for(lambda id=id: gateway.ended(id) is not None, RECOVERY_S, id)
        answer = gateway.ended(id)
        assert answer is not None
        assert answer.kind == "succeeded", answer
    assert_done_again(gateway)
    logs = [gateway.folder / "log", *(path for path in rays.rglob("*") if path.is_file())]
    assert any("ServeReplica" in str(path) or "replica_" in path.name for path in logs), logs
    for path in logs:
        text = path.read_bytes()
        assert PROMPT.encode() not in text, path
        assert TOKEN.encode() not in text, path


def assert_done_again(gateway: Many) -> None:
    """Kill the engine at work."""
    with ThreadPoolExecutor(1) as asking:
        answer = asking.submit(ask, gateway.http, "secret-again", {"prompt": PROMPT, **LARGE})
        wait_for(lambda: "secret-again" in gateway.ids("began"), RECOVERY_S, "its turn")
        os.kill(gateway.engines()[0], signal.SIGKILL)
        assert answer.result().kind == "succeeded", answer.result()
        assert attempts_of(answer.result()) == 2


def test_only_engines_load_torch(many: tuple[Many, Path]) -> None:
    gateway, _ = many
    assert "torch" in maps_of(gateway.engines()[0])
    assert "torch" not in maps_of(gateway.gateway())


def maps_of(pid: int) -> str:
    return " ".join(each.path for each in psutil.Process(pid).memory_maps())


def test_the_gateway_listens_on_loopback_unless_told_otherwise(many: tuple[Many, Path]) -> None:
    gateway, _ = many
    own = int(gateway.url.rpartition(":")[2])
    outer = socket.gethostbyname(socket.gethostname())
    addresses = {address for address, port in listening(gateway.process.pid) if port == own}
    assert addresses == {"127.0.0.1"}, f"{outer} reaches it"
