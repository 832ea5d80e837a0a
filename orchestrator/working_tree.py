"""The working tree as one archive that a cluster's job runs in: which files go, which never do, and how large it is."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

MAX_BYTES = 100 * 2**20  # of the archive; Ray holds it in the head's memory and refuses more than 512 MiB
_LARGEST_NAMED = 3

# What is no part of a program, by the name of a file or of any folder above it.
LEFT_OUT = (
    *(".git", ".venv", "venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "build", "node_modules"),
    *("runs", "mlruns", "mlartifacts", "mlflow.db*"),
)
_SECRETS = (".env", ".env.*", "*.pem", "*.key", "id_rsa*", "id_ed25519*", "auth_token", ".netrc", "credentials*")

_FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # the same files give the same bytes, so that Ray sends them once


def pack(folder: Path, archive: Path) -> list[Path]:
    """Write the files of the working tree at `folder` into a zip file; their paths, relative to `folder`.

    Raises:
        ValueError: the archive is larger than 100 MiB.
    """
    files = list(tree_files(folder))
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for path in files:
            entry = zipfile.ZipInfo(path.as_posix(), _FIXED_TIME)
            entry.external_attr = (folder / path).stat().st_mode << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            with (folder / path).open("rb") as source, target.open(entry, "w", force_zip64=True) as packed:
                shutil.copyfileobj(source, packed)
            if archive.stat().st_size > MAX_BYTES:  # said before a data set that lies here is read to its end
                raise ValueError(
                    f"the working tree {folder} has more than the {MAX_BYTES // 2**20} MiB that can be sent packed; "
                    f"the largest files are {_largest(folder, files)}; leave out by .gitignore what the job does not "
                    "need, or start from another folder"
                )
    return files


def tree_files(folder: Path) -> Iterator[Path]:
    """Files of a working tree, sorted: what git tracks or would, else all; without results, caches and secrets."""
    listed = _git_files(folder)
    found = _walk(folder) if listed is None else listed
    for path in sorted(found):
        if not _is_left_out(path) and (folder / path).is_file():
            yield path


def _git_files(folder: Path) -> list[Path] | None:
    """Paths that git tracks or would track, or None where this is no repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [Path(os.fsdecode(name)) for name in done.stdout.split(b"\0") if name]


def _walk(folder: Path) -> Iterator[Path]:
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_left_out(Path(name))]
        yield from ((Path(at) / name).relative_to(folder) for name in names)


def _is_left_out(path: Path) -> bool:
    patterns = (*LEFT_OUT, *_SECRETS)
    return any(fnmatch.fnmatch(part, pattern) for part in path.parts for pattern in patterns)


def _largest(folder: Path, files: Sequence[Path]) -> str:
    by_size = sorted(files, key=lambda path: (folder / path).stat().st_size, reverse=True)[:_LARGEST_NAMED]
    return ", ".join(f"{path} ({(folder / path).stat().st_size / 2**20:.0f} MiB)" for path in by_size)
