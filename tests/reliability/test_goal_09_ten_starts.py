"""Goal 9: of ten starts of one sweep at once one runs, and the others leave at once and say who does."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.orchestrator.sweeps import Small, environment
from tests.reliability import drivers
from tests.reliability.paced import wait_for

pytestmark = pytest.mark.slow

NUM_STARTS = 10

# The command line, which also says how long it took from the moment when it came to the hold until it left: ten
# processes at once need longer than that for their imports alone.
_TIMED = """
import atexit, json, sys, time
from orchestrator import cli, ledger_file

class Timed(ledger_file.Hold):
    def __init__(self, path):
        start = time.monotonic()
        atexit.register(lambda: print(json.dumps({"seconds": time.monotonic() - start}), file=sys.stderr))
        super().__init__(path)

ledger_file.Hold = Timed
cli.main()
"""


def test_of_ten_starts_at_once_one_runs_and_the_others_name_it(template: Small, tmp_path: Path) -> None:
    small = drivers.prepared(tmp_path, template)
    command = [sys.executable, "-c", _TIMED, *small.command("--in-process", "--set", "optim.steps=100000")[3:]]
    starts = [
        subprocess.Popen([*command, "--name", "small"], stderr=subprocess.PIPE, text=True, env=environment())
        for _ in range(NUM_STARTS)
    ]
    try:
        wait_for(lambda: sum(start.poll() is not None for start in starts) >= NUM_STARTS - 1, 120)
        (winner,) = [start for start in starts if start.poll() is None]
        losers = [start for start in starts if start is not winner]
        for loser in losers:
            assert loser.stderr is not None
            message, said = loser.stderr.read().strip().splitlines()
            assert loser.returncode == 2
            assert message.startswith("error: small is being run by process ")
            assert f"process {winner.pid} on {os.uname().nodename}, since " in message
            assert json.loads(said)["seconds"] < 2
        winner.send_signal(signal.SIGTERM)
        winner.communicate(timeout=60)
        assert winner.returncode == 143
    finally:
        for start in starts:
            start.kill()
            start.communicate()
