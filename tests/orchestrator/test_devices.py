"""GPUs that fail: which are left out, which come back, and when it is the trial that is to blame."""

import pytest

from orchestrator.devices import Devices

A, B, C = "GPU 0", "GPU 1", "GPU 2"


@pytest.fixture
def devices() -> Devices:
    found = Devices()
    found.needs(1.0)
    return found


def test_a_gpu_that_fails_twice_is_left_out(devices: Devices) -> None:
    devices.failed(A, "one", held=1, total=3)
    assert devices.suspects() == {A: False}
    devices.failed(A, "one", held=1, total=3)
    assert devices.suspects() == {A: True}


def test_failures_of_two_trials_count_together_and_one_that_works_between_them_clears_it(devices: Devices) -> None:
    devices.failed(A, "one", held=1, total=3)
    devices.works(A)
    devices.failed(A, "two", held=1, total=3)
    assert devices.suspects() == {A: False}
    devices.failed(A, "three", held=1, total=3)
    assert devices.suspects() == {A: True}


def test_a_trial_that_fails_on_two_gpus_is_to_blame_itself(devices: Devices) -> None:
    for device in (A, A, B, B, C, C):
        devices.failed(device, "one", held=1, total=3)
    assert devices.suspects() == {}
    devices.failed(A, "two", held=1, total=3)
    assert devices.suspects() == {A: False}, "what it did before is forgotten"


def test_the_failures_of_others_stay_when_a_trial_is_to_blame(devices: Devices) -> None:
    for trial in ("one", "two", "three"):
        devices.failed(A, trial, held=1, total=3)
    devices.failed(B, "one", held=1, total=3)
    assert devices.suspects() == {A: True}


def test_the_last_gpu_is_never_left_out(devices: Devices) -> None:
    for _ in range(5):
        devices.failed(A, "one", held=1, total=1)
    assert devices.suspects() == {A: False}


def test_as_many_gpus_stay_as_the_largest_trial_needs(devices: Devices) -> None:
    for device, trial in ((A, "one"), (B, "two")):
        devices.failed(device, trial, held=1, total=3)
        devices.failed(device, trial, held=1, total=3)
    assert devices.suspects() == {A: True, B: True}
    devices.needs(2.0)
    assert devices.suspects() == {A: True, B: False}
    devices.needs(3.0)
    devices.needs(1.0)  # a smaller one changes nothing
    assert devices.suspects() == {A: False, B: False}


def test_a_gpu_counts_whole_where_trials_have_shares_of_it(devices: Devices) -> None:
    for device in (A, B):
        for trial in ("x", "y"):
            devices.failed(device, f"{trial} on {device}", held=0.5, total=2.0)
    assert devices.suspects() == {A: True, B: False}, "B is the last one"


def test_a_trial_of_several_gpus_is_left_out_as_a_whole(devices: Devices) -> None:
    devices.needs(2.0)
    for device, held in ((A, 2.0), (B, 0.5)):
        for trial in ("x", "y"):
            devices.failed(device, f"{trial} on {device}", held, total=4.0)
    assert devices.suspects() == {A: True, B: False}, "one and a half are left, and two are needed"
