"""Checks of doctor: versions of packages, free disk, and the kind of file system below the state folder."""

from __future__ import annotations

import contextlib
import re
import shutil
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from orchestrator import estimate
from orchestrator.finding import Finding
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.ledger_schema import OVER
from trainers.config import TrialConfig

_PROJECT = "register-ablations"
_LEAST_SHARE, _LEAST_BYTES = 0.05, 2e9
# File systems whose files another machine may change, so that neither locks nor memory maps can be relied on.
_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "beegfs", "ceph", "glusterfs", "gpfs", "lustre", "ocfs2"}
)
_PAIRED = ("torchvision", "torch")  # the first is built for one version of the second


def requirements() -> list[str]:
    """What this project asks for: of pyproject.toml where this is a working copy, else as it was installed."""
    file = Path(__file__).parents[1] / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text())["project"]
        if project["name"] == _PROJECT:
            return [str(line) for line in project["dependencies"]]
    return metadata.requires(_PROJECT) or []


def check_versions(asked: list[str]) -> Iterator[Finding]:
    """Every package is there in a version that is allowed, and torchvision is the one of the installed torch."""
    needed = dict.fromkeys(asked, f"{_PROJECT} needs")
    by, of = _PAIRED
    with contextlib.suppress(metadata.PackageNotFoundError):  # which is a finding of its own
        needed |= {line: f"{by} needs" for line in metadata.requires(by) or [] if Requirement(line).name == of}
    for line, who in needed.items():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            have = "it is not installed" if version is None else f"{version} is installed"
            text = f"{requirement.name}{requirement.specifier}"
            yield Finding("versions", requirement.name, f"{who} {text}; {have}", f"pip install '{text}'")


def check_disk(folder: Path, needed: float, what: str) -> Iterator[Finding]:
    """There is room below `folder`: 5 % and 2 GB, and the `needed` bytes."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    usage = shutil.disk_usage(place)
    free = f"{usage.free / 1e9:.1f} GB of {usage.total / 1e9:.1f} GB are free"
    if usage.free < _LEAST_BYTES or usage.free < _LEAST_SHARE * usage.total:
        yield Finding("disk", str(place), free, "orchestrate clean frees checkpoints")
    elif usage.free < needed:
        what = f"{free}; {what} needs {needed / 1e9:.1f} GB"
        yield Finding("disk", str(place), what, "orchestrate clean frees checkpoints")


def bytes_left(ledger: Ledger) -> int:
    """Bytes of the checkpoints that the trials of the plan will write that are not over."""
    configs = [row.config for row in ledger.rows() if row.state not in OVER]
    ours = [TrialConfig.model_validate(config) for config in configs if "method" in config]
    return sum(estimate.checkpoint_bytes(config) for config in ours if config.command is None)


def check_file_system(state: Path, mounts: str) -> Iterator[Finding]:
    """SQLite's files lie on a local disk; `mounts` is the content of /proc/mounts."""
    place = next(path for path in (state.absolute(), *state.absolute().parents) if path.is_dir()).resolve()
    kind = file_system(place, mounts)
    if kind in _NETWORK or (kind.startswith("fuse.") and kind != "fuse.fuseblk"):
        what = f"the state folder is on a network file system ({kind}), where SQLite's files get damaged"
        yield Finding("state", str(place), what, "give a folder on a local disk as --state")


def file_system(path: Path, mounts: str) -> str:
    """The kind of file system that `path` lies on; empty where that is not known."""
    found = ("", "")
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mounted = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[1])  # a space is \040
        if path.is_relative_to(mounted) and len(mounted) >= len(found[0]):
            found = (mounted, fields[2])
    return found[1]


def check_room(layout: SweepLayout, ledger: Ledger) -> Iterator[Finding]:
    """The disk of storage holds what the sweep still has to write."""
    yield from check_disk(layout.root, bytes_left(ledger), f"what is left of {layout.name}")
