"""What the tests of reliability share: a storage that is ready to use, and a sweep that nothing disturbed."""

import pytest

from tests.orchestrator.sweeps import Small
from tests.reliability import drivers


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A storage in which data are decoded and MLflow has its tables, which takes longer than a small sweep."""
    return drivers.template(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="session")
def undisturbed(template: Small, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Two trials of 8 steps, with a checkpoint after each step, that ran from begin to end."""
    small = drivers.prepared(tmp_path_factory.mktemp("undisturbed"), template)
    assert drivers.drive(small) == 0, drivers.output(small)
    return small
