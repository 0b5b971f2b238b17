"""The Deployment: that Kubernetes would take it, and that its probe and its times are right."""

from __future__ import annotations

import copy
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cog_server import CogServer
from container.containers import tight_command

from dmd2.settings import ROOT, Settings

KUBERNETES = "1.37"
DOCUMENTS = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/dmd2.yaml").read_text()))
DEPLOYMENT, SERVICE, BUDGET, POLICY = DOCUMENTS
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENVIRONMENT = {each["name"]: each["value"] for each in CONTAINER["env"]}
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
PROBE = CONTAINER["readinessProbe"]["exec"]["command"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
def test_kubernetes_takes_it_and_would_not_take_a_word_more(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)
    wrong = copy.deepcopy(document)
    wrong["spec"]["selectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_everything_selects_the_pods() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert labels
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    assert SERVICE["spec"]["selector"] == labels
    assert BUDGET["spec"]["selector"]["matchLabels"] == labels
    assert POLICY["spec"]["podSelector"]["matchLabels"] == labels


def test_the_ports_are_the_server_s_and_those_of_its_metrics() -> None:
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    settings = Settings.from_environment({"DMD2_MODEL": "m", **ENVIRONMENT})
    assert ports == {"http": 5000, "metrics": settings.metrics_port}
    assert settings.metrics_host == "0.0.0.0", "on the loopback address nobody could scrape"
    annotations = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(settings.metrics_port)
    asked_for = [port["port"] for rule in POLICY["spec"]["ingress"] for port in rule["ports"]]
    assert asked_for == ["http", "metrics"]
    assert all(rule["from"] for rule in POLICY["spec"]["ingress"])
    assert POLICY["spec"]["egress"] == []


def test_it_is_as_tight_as_security_md_says() -> None:
    docker = tight_command()
    said = dict(pairwise(docker))
    user, group = said["--user"].split(":")
    pod, own = POD["securityContext"], CONTAINER["securityContext"]
    assert (pod["runAsUser"], pod["runAsGroup"]) == (int(user), int(group))
    assert pod["runAsNonRoot"] is True
    assert ("--read-only" in docker) == own["readOnlyRootFilesystem"]
    assert own["capabilities"] == {"drop": [said["--cap-drop"]]}
    assert said["--security-opt"] == "no-new-privileges"
    assert own["allowPrivilegeEscalation"] is False
    assert said["-e"] == f"HOME={ENVIRONMENT['HOME']}"
    (volume,) = POD["volumes"]
    (mount,) = CONTAINER["volumeMounts"]
    size = volume["emptyDir"]["sizeLimit"].removesuffix("Gi")
    assert said["--tmpfs"] == f"{mount['mountPath']}:size={size}g,mode=1777"
    assert volume["emptyDir"]["medium"] == "Memory"
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_what_was_accepted_has_the_time_that_it_may_take() -> None:
    settings = Settings.from_environment({"DMD2_MODEL": "m", **ENVIRONMENT})
    pause = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    longest = pause + settings.queue_timeout_s + settings.run_timeout_s
    assert longest <= POD["terminationGracePeriodSeconds"] <= longest + 60


class Server:
    """Answers every GET with a body, or with nothing until the client leaves.

    Attributes:
        body: of the next answer; None for none.
        port: where it listens.
    """

    def __init__(self) -> None:
        self.body: bytes | None = b""
        self.left = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                if self.body is None:
                    self.left.wait(20)
                    return
                handler.send_response(200)
                handler.end_headers()
                handler.wfile.write(self.body)

            def log_message(handler, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.left.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def health() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def probe(port: int) -> subprocess.CompletedProcess[str]:
    """What the probe does, on another port than 5000, and with less patience."""
    flag, option, program = PROBE[1:]
    program = program.replace("5000", str(port)).replace("timeout=4", "timeout=0.5")
    command = [sys.executable, flag, option, program]
    return subprocess.run(command, capture_output=True, text=True, timeout=20)


def test_all_probes_are_this_one() -> None:
    assert PROBE[0] == "python"
    assert "127.0.0.1" in PROBE[-1]
    assert "5000, timeout=4)" in PROBE[-1]
    assert all(CONTAINER[name]["timeoutSeconds"] > 4 for name in PROBES), "it says why it fails"
    assert all(CONTAINER[name]["exec"]["command"] == PROBE for name in PROBES)


@pytest.mark.parametrize(
    ("status", "ready"),
    [
        ("READY", True),
        ("BUSY", True),
        ("STARTING", False),
        ("SETUP_FAILED", False),
        ("UNHEALTHY", False),
        ("DEFUNCT", False),
    ],
)
def test_the_probe_reads_the_body(status: str, ready: bool, health: Server) -> None:
    health.body = f'{{"status": "{status}"}}'.encode()
    done = probe(health.port)
    assert (done.returncode == 0) == ready
    assert (status in done.stderr) != ready


def test_the_probe_fails_where_nothing_sensible_answers(health: Server) -> None:
    for body in (b"", b"<html>", b"{}"):
        health.body = body
        assert probe(health.port).returncode != 0
    assert probe(1).returncode != 0
    health.body = None
    assert "timed out" in probe(health.port).stderr


def test_the_probe_finds_the_real_server_ready(server: CogServer) -> None:
    done = probe(int(server.url.rpartition(":")[2]))
    assert (done.returncode, done.stderr) == (0, "")
