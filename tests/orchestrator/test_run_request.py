"""What a trial asks for, cut to what a cluster has."""

from orchestrator.run_request import Request, clip


def test_requests_are_cut_to_the_node_that_fits_them() -> None:
    nodes = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 64.0}]
    assert clip(Request(cpus=32, gpus=0), nodes) == Request(32, 0)
    assert clip(Request(cpus=16, gpus=8), nodes) == Request(8, 4)
    assert clip(Request(cpus=1, gpus=0.5), [{"CPU": 2.0}]) == Request(1, 0)
