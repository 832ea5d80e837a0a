"""The command that changes how many trials of a running sweep run at a time."""

import json
from pathlib import Path

import pytest

from orchestrator.concurrency import set_concurrency
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger


def test_the_driver_of_a_running_sweep_finds_what_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = SweepLayout(tmp_path, tmp_path, "small")
    with pytest.raises(ValueError, match="there is no sweep 'small'"):
        set_concurrency("small", 2, tmp_path, tmp_path)
    with Ledger.open(layout.ledger):
        set_concurrency("small", 2, tmp_path, tmp_path)
        assert json.loads(layout.settings.read_text()) == {"max_concurrent": 2}
        assert "at most 2 trials at a time" in capsys.readouterr().out
    with pytest.raises(ValueError, match="small is not running; give --max-concurrent to orchestrate sweep"):
        set_concurrency("small", 2, tmp_path, tmp_path)
