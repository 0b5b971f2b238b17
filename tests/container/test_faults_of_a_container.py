"""What the container does when it is killed, stopped, or out of disk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from containers import tight
from servers import assert_alike, images_of

from dmd2.server.janitor import COGLET_PREDICTIONS

pytestmark = pytest.mark.docker
INPUTS = {"prompt": "a red circle on a blue background", "seed": 7}
SMALL = "size=96m,mode=1777"
MB = 1_000_000
# What the health check wants free.
FLOOR = 64 * MB


def test_a_killed_worker_is_brought_back() -> None:
    with tight("demo") as container:
        before = images_of(container.ready().predict(INPUTS))
        container.kill_worker()
        assert_alike(images_of(container.restarted().predict(INPUTS)), before)


def test_a_stop_under_load_answers_all_that_was_accepted() -> None:
    with tight("demo") as container:
        server = container.ready()
        inputs = {**INPUTS, "num_outputs": 4, "width": 256, "height": 256}
        with ThreadPoolExecutor(8) as clients:
            answers = [clients.submit(server.predict, {**inputs, "seed": s}) for s in range(8)]
            # Cog's server makes a folder for each prediction that it has accepted.
            while len(container.run(f"ls {COGLET_PREDICTIONS} 2>/dev/null || true").split()) < 8:
                assert not any(answer.done() for answer in answers)
            container.stop()
            assert all(len(images_of(answer.result())) == 4 for answer in answers)
        state = container.state()
        assert (state["State"]["ExitCode"], state["RestartCount"]) == (0, 0)
        assert not state["State"]["Running"]


def test_a_full_disk_is_unhealthy_until_it_is_not() -> None:
    with tight("demo", tmp=SMALL) as container:
        server = container.ready()
        container.run("dd if=/dev/zero of=/tmp/fill bs=1M 2>/dev/null || true")
        assert server.health()["status"] == "UNHEALTHY"
        answer = server.predict(INPUTS)
        assert answer["status"] == "failed"
        assert "could not be saved" in answer["error"]
        container.run("rm /tmp/fill")
        assert server.health()["status"] == "READY"
        assert len(images_of(server.predict(INPUTS))) == 1


def test_three_times_what_a_small_disk_holds_arrives(model_folder: Path) -> None:
    """The random model draws noise: 3 MB a megapixel."""
    inside = "/src/weights/random"
    with tight(inside, tmp=SMALL, mounts=[(model_folder, inside)]) as container:
        server = container.ready()
        free = int(container.run("df -B1 --output=avail /tmp | tail -n 1"))
        inputs = {"prompt": "noise", "width": 1024, "height": 512, "num_outputs": 2}
        made, number = 0, 0
        with ThreadPoolExecutor(4) as clients:
            while made < 3 * (free - FLOOR):
                requests = [{**inputs, "seed": number + i} for i in range(4)]
                for answer in clients.map(server.predict, requests):
                    made += sum(map(len, images_of(answer)))
                number += 4
                assert server.health()["status"] == "READY"
