"""Goal 6, a partition: the trial of a node that is cut off goes on elsewhere, and what it still says is not heard."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from orchestrator.attempt import Job, Outcome, Report
from orchestrator.control import Ask
from orchestrator.layout import TrialLayout
from orchestrator.ledger import Ledger
from orchestrator.ray_token import ray_token
from tests.orchestrator.sweeps import Small, environment
from tests.reliability import drivers
from tests.reliability.paced import query, wait_for

pytestmark = pytest.mark.slow

SECONDS = 45
NOTICED_SECONDS = 15.0
ELSEWHERE_SECONDS = 30.0

# Four checks of two seconds, one second apart, fail until a node is taken for lost; Ray's own settings take a minute.
HEALTH = {"initial_delay_ms": 1_000, "period_ms": 1_000, "timeout_ms": 2_000, "failure_threshold": 4}


def talks(job: Job, layout: TrialLayout, number: int, report: Report, asked: Ask) -> Outcome:
    """A trial that reports its attempt's number every second, and writes it into its folder."""
    for step in range(1, SECONDS + 1):
        time.sleep(1)
        report(step, dict.fromkeys(("train/loss", "test/linear/top1", "tokens/last/outlier_fraction"), float(number)))
        (layout.attempt(number) / "step.txt").write_text(str(step))
    return Outcome("finished", steps=SECONDS)


@dataclass(frozen=True)
class Net:
    """A bridge on this machine with one namespace for each node behind it."""

    name: str
    subnet: str
    namespaces: Sequence[str]

    @property
    def head(self) -> str:
        return f"{self.subnet}.1"

    def address(self, namespace: str) -> str:
        return f"{self.subnet}.{2 + self.namespaces.index(namespace)}"

    def of(self, pid: int) -> str:
        """The namespace that a process is in."""
        return _ip("netns", "identify", str(pid)).strip()

    def set(self, namespace: str, state: str) -> None:
        """Cut a namespace off (`down`) or let it back (`up`)."""
        _ip("link", "set", _outer(namespace), state)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20).stdout


def _outer(namespace: str) -> str:
    return f"v{namespace}"


@contextmanager
def network(nodes: int) -> Iterator[Net]:
    """A network of this test alone, taken away at the end with everything that runs in it."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    name = f"oc{os.getpid()}"
    net = Net(name, f"10.77.{os.getpid() % 250}", [f"{name}{letter}" for letter in "abcd"[:nodes]])
    with ExitStack() as undo:
        try:
            _ip("link", "add", net.name, "type", "bridge")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine allows no bridge: {error.stderr}")
        undo.callback(_ip, "link", "delete", net.name)
        _ip("address", "add", f"{net.head}/24", "dev", net.name)
        _ip("link", "set", net.name, "up")
        for namespace in net.namespaces:
            outer, inner = _outer(namespace), f"w{namespace}"
            _ip("netns", "add", namespace)
            undo.callback(_ip, "netns", "delete", namespace)
            undo.callback(_end_all, namespace)
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", namespace)
            _ip("link", "set", outer, "master", net.name, "up")
            _ip("-n", namespace, "address", "add", f"{net.address(namespace)}/24", "dev", inner)
            for device in ("lo", inner):
                _ip("-n", namespace, "link", "set", device, "up")
        yield net


def _end_all(namespace: str) -> None:
    for pid in _ip("netns", "pids", namespace).split():
        with suppress(psutil.NoSuchProcess):
            psutil.Process(int(pid)).kill()


@contextmanager
def node(*arguments: str, namespace: str | None = None) -> Iterator[None]:
    """A node of a Ray cluster, ended with all its processes."""
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats", *arguments]
    command = ray if namespace is None else ["ip", "netns", "exec", namespace, *ray]
    health = {f"RAY_health_check_{name}": str(value) for name, value in HEALTH.items()}
    ours = {"RAY_AUTH_MODE": "token", "PYTHONPATH": str(Path(__file__).resolve().parents[2]), **health}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env={**environment(), **ours})
        try:

            def is_up() -> bool:
                said.seek(0)
                text = said.read()
                assert process.poll() is None, text
                return "will now block" in text

            wait_for(is_up, 60)
            yield
        finally:
            ended = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            for each in ended:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.kill()
            process.wait()


def test_the_trial_of_a_node_that_is_cut_off_goes_on_elsewhere(tmp_path: Path) -> None:
    ray_token()
    small = Small(tmp_path / "sweep", registers=(0,))
    small.write(seeds=[0], baseline=None)
    with network(nodes=2) as net, ExitStack() as nodes:
        port = 20_000 + os.getpid() % 10_000
        own_folder = nodes.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        head = ["--head", f"--temp-dir={own_folder}", f"--port={port}", f"--node-ip-address={net.head}", "--num-cpus=0"]
        nodes.enter_context(node(*head, "--include-dashboard=false"))
        for namespace in net.namespaces:
            own = f"--node-ip-address={net.address(namespace)}"
            nodes.enter_context(node(f"--address={net.head}:{port}", own, "--num-cpus=1", namespace=namespace))
        driver = drivers.begin(small, train=f"{__name__}:talks", in_process=False, address=f"{net.head}:{port}")
        nodes.callback(driver.kill)  # where a check below fails
        wait_for(lambda: query(small.root, "SELECT count(*) >= 3 FROM metrics") == [(1,)], 90)
        ((pid,),) = query(small.root, "SELECT pid FROM attempts")
        cut = net.of(pid)
        assert cut in net.namespaces
        net.set(cut, "down")
        cut_at = time.time()
        wait_for(lambda: query(small.root, "SELECT count(*) FROM attempts") == [(2,)], 90)
        (first,) = small.root.glob("trials/*/attempts/1/step.txt")
        step = int(first.read_text())
        net.set(cut, "up")
        driver.join(180)
        assert driver.exitcode == 0, drivers.output(small)
        assert int(first.read_text()) > step, "the process that was cut off wrote on"
    (ended, started) = query(
        small.root,
        "SELECT ended_ms / 1000.0, (SELECT started_ms / 1000.0 FROM attempts WHERE number = 2) "
        "FROM attempts WHERE number = 1",
    )[0]
    print(f"noticed {ended - cut_at:.1f} s after the cut, goes on {started - cut_at:.1f} s after it")  # pytest -rP
    assert ended - cut_at < NOTICED_SECONDS
    assert started - ended < ELSEWHERE_SECONDS
    with Ledger.open(small.root / "ledger.db", writer=False) as ledger:
        (row,) = ledger.rows()
        assert (row.state, row.attempts, row.stalled) == ("finished", 2, 0)
        assert {value for _, _, value in ledger.metrics(row.trial_id)} == {2.0}, "only the new attempt's are left"
