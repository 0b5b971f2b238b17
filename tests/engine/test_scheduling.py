"""Which images run next: together where they may, and fairly where they may not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest

from dmd2.engine.scheduling import FairScheduler, Work
from dmd2.engine.units import DECODE, KINDS, STEP, Kind
from dmd2.request.lane import Lane

# A third kind, that only some images need, and that comes first.
PREPARE = replace(STEP, name="prepare", cost=lambda lane: 1.0)
LARGE, SMALL = Lane(1024, 1024, False), Lane(256, 256, False)
STEPS = 4


class Device:
    """Runs what the scheduler says, and notes it; images are (name, steps left)."""

    def __init__(self, max_batch: int = 4) -> None:
        self.unwanted: set[str] = set()
        self.schedule: FairScheduler[str, Kind] = FairScheduler(
            [PREPARE, *KINDS], self._max_batch, self.unwanted.__contains__
        )
        self.steps_left: dict[str, int] = {}
        self.lanes: dict[str, Lane] = {}
        self.finished: list[str] = []
        self._size = max_batch

    def _max_batch(self, lane: Lane, kind: Kind) -> int:
        return self._size if kind == STEP else 1

    def add(self, lane: Lane, *names: str, steps: int = STEPS) -> None:
        self.steps_left |= dict.fromkeys(names, steps)
        self.lanes |= dict.fromkeys(names, lane)
        for name in names:
            self.schedule.put(lane, name, STEP)

    def run(self) -> Work[str, Kind]:
        work = self.schedule.next_work()
        assert work is not None
        for name in work.images:
            if work.kind == DECODE:
                self.schedule.remove(work.lane, name)
                self.finished.append(name)
                continue
            self.steps_left[name] -= 1
            if self.steps_left[name] == 0:
                self.schedule.put(work.lane, name, DECODE)
        return work

    def run_all(self) -> Iterator[Work[str, Kind]]:
        while self.schedule:
            yield self.run()


def test_one_image_takes_its_steps_and_is_decoded() -> None:
    device = Device()
    assert not device.schedule
    device.add(LARGE, "a")
    assert [work.kind for work in device.run_all()] == [*[STEP] * STEPS, DECODE]
    assert not device.schedule


def test_images_of_different_requests_at_different_steps_share_a_call() -> None:
    device = Device()
    device.add(LARGE, "a")
    assert device.run().images == ["a"]
    device.add(LARGE, "b")
    assert device.run().images == ["a", "b"]
    assert device.run().images == ["a", "b"]
    assert device.run().images == ["a", "b"]
    assert device.run() == Work(DECODE, LARGE, ["a"])
    assert device.run().images == ["b"]


def test_a_batch_has_its_limit_and_those_who_came_first() -> None:
    device = Device(max_batch=2)
    device.add(LARGE, "a", "b", "c")
    assert [device.run().images for _ in range(STEPS)] == [["a", "b"]] * STEPS
    assert [device.run().images for _ in range(2)] == [["a"], ["b"]]
    assert device.run().images == ["c"]


@pytest.mark.parametrize("other", [SMALL, Lane(1024, 1024, True), Lane(1024, 768, False)])
def test_what_is_not_alike_does_not_share(other: Lane) -> None:
    device = Device()
    device.add(LARGE, "a")
    device.add(other, "b")
    assert all(len({device.lanes[name] for name in work.images}) == 1 for work in device.run_all())


def test_a_lone_small_image_waits_for_one_unit_of_large_work() -> None:
    """Wherever it comes in, among an endless supply of large images."""
    for moment in range(1, 30):
        device = Device()
        device.add(LARGE, *(f"large{n}" for n in range(40)))
        for _ in range(moment):
            device.run()
        device.add(SMALL, "small")
        waited = 0
        while "small" not in device.finished:
            waited += device.run().lane == LARGE
        assert waited == 0, "the unit in progress was already given out"


def test_an_endless_stream_of_small_images_does_not_starve_the_large() -> None:
    device = Device()
    device.add(LARGE, "large")
    done = {LARGE: 0.0, SMALL: 0.0}
    number = 0
    while "large" not in device.finished:
        if not any(name.startswith("small") and left for name, left in device.steps_left.items()):
            number += 1
            device.add(SMALL, f"small{number}")
        work = device.run()
        done[work.lane] += work.kind.cost(work.lane) * len(work.images)
    assert done[SMALL] <= done[LARGE] + DECODE.cost(SMALL)


def test_a_lane_that_was_idle_has_saved_up_nothing() -> None:
    device = Device(max_batch=1)
    device.add(LARGE, *(f"large{n}" for n in range(20)))
    for _ in range(50):
        device.run()
    device.add(SMALL, *(f"small{n}" for n in range(400)))
    first = [device.run() for _ in range(40)]
    assert sum(work.lane == LARGE for work in first) >= 1


def test_images_that_are_behind_catch_up_with_those_that_came_before_them() -> None:
    device = Device(max_batch=2)
    for name in ("first", "second", "third"):
        device.schedule.put(LARGE, name, PREPARE)
    seen = []
    for _ in range(6):
        work = device.schedule.next_work()
        assert work is not None
        seen.append((work.kind.name, *work.images))
        for name in work.images:
            device.schedule.put(LARGE, name, STEP)
    assert seen[0] == ("prepare", "first"), "one at a time, as the limit of other kinds is here"
    assert seen[1] == ("prepare", "second")
    assert seen[2:] == [("step", "first", "second")] * 4, "the third waits until there is room"


def test_images_that_need_another_kind_are_not_starved_by_those_that_do_not() -> None:
    device = Device(max_batch=2)
    device.schedule.put(LARGE, "needy", PREPARE)
    device.add(LARGE, "first", "second", "third")
    assert device.schedule.next_work() == Work(PREPARE, LARGE, ["needy"])
    device.schedule.put(LARGE, "needy", STEP)
    assert device.schedule.next_work() == Work(STEP, LARGE, ["needy", "first"])


def test_random_loads_finish_whole_and_in_order() -> None:
    rng = random.Random(5)
    for _ in range(60):
        device = Device(max_batch=rng.randint(1, 5))
        waiting = [f"i{n}" for n in range(rng.randint(1, 40))]
        gone: set[str] = set()
        added: list[str] = []
        while waiting or device.schedule:
            if waiting and (not device.schedule or rng.random() < 0.4):
                name = waiting.pop(0)
                lane = rng.choice([LARGE, SMALL, Lane(256, 256, True)])
                device.add(lane, name, steps=rng.randint(1, 4))
                added.append(name)
                continue
            work = device.run()
            assert 1 <= len(work.images) <= device._size
            if rng.random() < 0.1:
                victim = rng.choice(added)
                if victim not in device.finished:
                    gone.add(victim)
                device.schedule.remove(device.lanes[victim], victim)
        assert sorted(device.finished) == sorted(set(added) - gone)


def test_removing_what_is_gone_changes_nothing() -> None:
    device = Device()
    device.add(LARGE, "a", "b")
    device.schedule.remove(LARGE, "a")
    device.schedule.remove(LARGE, "a")
    device.schedule.remove(SMALL, "a")
    assert device.run().images == ["b"]


@pytest.mark.parametrize("num_cancelled", [0, 1, 300])
def test_a_wait_does_not_depend_on_how_many_were_cancelled_before(num_cancelled: int) -> None:
    """They were charged to their lane, whose next image waited until the others had as much."""
    device = Device()
    device.add(LARGE, *(f"large{n}" for n in range(400)))
    cancelled = [f"cancelled{n}" for n in range(num_cancelled)]
    device.add(SMALL, *cancelled)
    device.unwanted |= set(cancelled)
    for _ in range(20):
        assert device.run().lane == LARGE
    device.add(SMALL, "fresh")
    for _ in range(STEPS + 1):
        assert device.run().images == ["fresh"]


def test_with_all_cancelled_there_is_nothing_to_do() -> None:
    device = Device()
    device.add(LARGE, "a", "b")
    device.unwanted |= {"a", "b"}
    assert device.schedule.next_work() is None
    assert not device.schedule


class DeviceOfOneSet(Device):
    """Has the weights of one set of LoRAs at a time; putting another together costs two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.ready: tuple[object, ...] = ()
        self.num_merges = 0
        self.schedule = FairScheduler(
            [PREPARE, *KINDS], self._max_batch, self.unwanted.__contains__, self._ready_cost
        )

    def run(self) -> Work[str, Kind]:
        work = super().run()
        if self._ready_cost(work):
            self.num_merges += 1
            self.ready = work.lane.loras
        return work

    def _ready_cost(self, work: Work[str, Kind]) -> float:
        assert work.images, "who is to pay"
        is_ready = work.kind != STEP or work.lane.loras in ((), self.ready)
        return 0.0 if is_ready else 2.0 * LARGE.pixels


def test_lanes_with_loras_take_turns_and_starve_nobody() -> None:
    device = DeviceOfOneSet()
    lanes = [replace(LARGE, loras=((f"lora{n}", 1.0),)) for n in range(4)]
    for n, lane in enumerate(lanes):
        device.add(lane, *(f"lora{n}.{image}" for image in range(40)), steps=1000)
    device.add(LARGE, *(f"plain{image}" for image in range(40)), steps=1000)
    works = [device.run() for _ in range(200)]
    turns = [work.lane for work in works]
    assert all(10 <= turns.count(lane) <= 60 for lane in lanes)
    assert turns.count(LARGE) > 200 / 5, "it needs no merging, and so has more of the steps"
    merging = 2 * device.num_merges
    assert merging / (merging + 4 * len(works)) < 1 / 5, "a set that was merged is used for a while"
    gaps = [i for i, lane in enumerate(turns) if lane == LARGE]
    assert max(b - a for a, b in pairwise(gaps)) <= 4 * len(lanes)


def test_a_lora_is_run_though_images_of_ever_new_sizes_keep_coming() -> None:
    device = DeviceOfOneSet()
    device.add(replace(LARGE, loras=(("lora", 1.0),)), "asked", steps=1)
    for n in range(40):
        device.add(Lane(1024, 1024 + 8 * n, False), f"fresh{n}")
        for _ in range(STEPS + 1):
            if device.run().images == ["asked"]:
                return
    pytest.fail("it was never run")


def test_a_first_image_with_a_lora_is_run_though_others_never_end() -> None:
    device = DeviceOfOneSet()
    device.add(LARGE, *(f"plain{image}" for image in range(40)), steps=1000)
    for _ in range(10):
        device.run()
    device.add(replace(LARGE, loras=(("lora", 1.0),)), "asked", steps=1)
    assert "asked" in [name for _ in range(4) for name in device.run().images]
