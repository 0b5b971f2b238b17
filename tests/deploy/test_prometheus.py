"""The dashboard and the alerts, by Prometheus itself on what the server really tells."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
import yaml
from cog_server import CogServer, free_port
from servers import images_of

from dmd2.engine.tally import EngineTally
from dmd2.models import device_work
from dmd2.server.metrics import MetricsPort
from dmd2.server.output_space import OutputSpace
from dmd2.server.request_tally import RequestTally
from dmd2.settings import ROOT

pytestmark = pytest.mark.prometheus
BOARD = json.loads((ROOT / "deploy/grafana/dmd2.json").read_text())
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
QUERIES = [
    (panel["title"], target["expr"]) for panel in BOARD["panels"] for target in panel["targets"]
]
Query = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def gpu_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A port that tells of a GPU's memory too, which this machine may not have."""
    number, engine = free_port(), EngineTally(["step", "decode"], torch.device("cuda"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_work, "memory_use", lambda device: (7 * 10**9, 80 * 10**9))
        engine.look_at_memory()
    port = MetricsPort("127.0.0.1", number)
    space = OutputSpace(tmp_path_factory.mktemp("outputs"), 10**9)
    port.serve({"model": "gpu", "version": "0"}, RequestTally(["queue"]), engine, space)
    yield number
    port.close()


@pytest.fixture(scope="module")
def query(
    server: CogServer, metrics_port: int, gpu_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Query]:
    """Asks a Prometheus that has scraped the server before, while and after it made images."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    targets = [f"127.0.0.1:{number}" for number in (metrics_port, gpu_port)]
    configuration = {
        "global": {"scrape_interval": "200ms", "evaluation_interval": "200ms"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "dmd2", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    command = ["prometheus", f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def ask(promql: str) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{port}/api/v1/query"
        answer = httpx.get(url, params={"query": promql}, trust_env=False).json()
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    def wait_for(promql: str) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if ask(promql):
                    return
            except httpx.TransportError:
                assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        raise AssertionError((folder / "log").read_text())

    try:
        wait_for("sum(up) == 2")
        made = 'dmd2_requests_total{status="succeeded"}'
        (before,) = ask(f"sum({made})")
        images_of(server.predict({"prompt": "a red circle"}))
        wait_for(f"sum({made}) > {before['value'][1]}")
        yield ask
    finally:
        process.terminate()
        process.wait(timeout=20)


def test_a_board_of_ten_panels_at_most() -> None:
    assert 0 < len(BOARD["panels"]) <= 10
    variables = {variable["name"] for variable in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD["panels"]))) - {"__rate_interval"}
    assert used == variables
    places = [panel["gridPos"] for panel in BOARD["panels"]]
    cells = [
        (x, y)
        for p in places
        for x in range(p["x"], p["x"] + p["w"])
        for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(cells) == len(set(cells)), "no panel lies on another"


@pytest.mark.parametrize(("title", "promql"), QUERIES)
def test_every_panel_has_something_to_show(title: str, promql: str, query: Query) -> None:
    result = query(promql.replace("$instance", ".*").replace("$__rate_interval", "1m"))
    assert result, title
    assert all(each["value"][1] != "NaN" for each in result)


def test_the_board_finds_the_instances(query: Query) -> None:
    (variable,) = (v for v in BOARD["templating"]["list"] if v["name"] == "instance")
    (metric,) = re.findall(r"^label_values\((\w+), instance\)$", variable["query"]["query"])
    assert len(query(metric)) == 2


def test_every_metric_of_an_alert_is_there(query: Query) -> None:
    rules = [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]
    for rule in rules:
        metrics = set(re.findall(r"\b(?:up|dmd2_\w+|process_\w+)\b", rule["expr"]))
        assert metrics
        for metric in metrics:
            assert query(metric), rule["alert"]
        query(rule["expr"])


def test_each_alert_fires_where_it_should_and_nowhere_else() -> None:
    for command in (["check", "rules", str(ALERTS)], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            ["promtool", *command], cwd=ROOT / "tests" / "data", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_names_are_as_prometheus_would_have_them(metrics_port: int, server: CogServer) -> None:
    text = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics", trust_env=False).text
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
