"""The commands that look at data sets: the catalog, and the check of one on disk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers import catalog

if TYPE_CHECKING:
    from trainers.data.check import Report

IMAGE_SIZE = 224  # px, by which `decode_size: auto` is decided where a data set has no size of its own
_LISTED = 20  # faults and classes that the text names


def list_data(*, as_json: bool) -> None:
    """Print the data sets of the catalog; needs no torch."""
    if as_json:
        print(json.dumps([_entry(name, entry) for name, entry in catalog.DATASETS.items()], indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("provides", no_wrap=True)
    table.add_column("decoded", no_wrap=True)
    table.add_column("licence; how to get", overflow="fold")
    for name, entry in catalog.DATASETS.items():
        size = "as model" if entry.decode_size is None else f"{entry.decode_size} px"
        shown = f"{name}/NAME" if entry.needs_name else name
        table.add_row(*map(Text, (shown, "\n".join(entry.provides), size, f"{entry.licence}; {entry.how_to_get}")))
    Console(soft_wrap=False).print(table)
    print("files are expected under execution.data_root, or in a folder there of that name; --json has the layouts")


def _entry(name: str, entry: catalog.DataEntry) -> dict[str, Any]:
    return {
        "name": name,
        "provides": list(entry.provides),
        "decode_size": entry.decode_size,
        "needs_root": entry.needs_root,
        "needs_name": entry.needs_name,
        "licence": entry.licence,
        "how_to_get": entry.how_to_get,
        "layout": entry.layout,
        "counts": dict(entry.counts),
        "other_counts": dict(entry.other_counts),
    }


def check(name: str, root: Path | None, size: int | None, cache: Path, *, as_json: bool) -> bool:
    """Print what a data set on disk has and what is wrong with it; gives whether it is sound.

    Args:
        name: of the catalog, image_folder/NAME and the like, or a user's own as package.module:build.
        root: folder of its files.
        size: side in px of the decoded images; None for what training takes.
        cache: folder for what is remembered of archives.

    Raises:
        ValueError: there is no such data set, or its files do not lie as they should.
    """
    entry, logical = catalog.evaluation_set(name)
    if entry not in catalog.DATASETS and not catalog.is_dotted_path(name):
        raise ValueError(
            f"{name!r} is no data set; allowed: {', '.join(catalog.DATASETS)}, or package.module:build of your own"
        )
    if root is None and entry in catalog.DATASETS and catalog.DATASETS[entry].needs_root:
        how = catalog.DATASETS[entry].how_to_get
        raise ValueError(f"--root is missing: {name} needs the folder of its files; {how}")
    from trainers.config import DataConfig, ExecutionConfig
    from trainers.data.check import check as check_data

    needs_name = entry in catalog.DATASETS and catalog.DATASETS[entry].needs_name
    given: dict[str, Any] = {
        "train": entry,
        "name": logical or (entry if needs_name else None),
        "decode_size": size or "auto",
    }
    config = DataConfig.model_validate(given if entry == "scenes" else {**given, "scenes": None})
    execution = ExecutionConfig(data_root=None if root is None else str(root))
    with _progress() as told:
        report = check_data(config, execution, IMAGE_SIZE, cache, told)
    if as_json:
        print(json.dumps(_as_json(report), indent=1))
    else:
        print("\n".join(_shown(line) for line in _lines(report)))
    return not report.faults


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "name": report.name,
        "sound": not report.faults,
        "images": dict(report.images),
        "classes": {name: dict(counts) for name, counts in report.classes.items()},
        "kinds": dict(Counter(fault.kind for fault in report.faults)),
        "faults": [{**fault._asdict(), "file": _shown(fault.file)} for fault in report.faults],
        "notes": list(report.notes),
        "fingerprint": report.fingerprint,
    }


def _lines(report: Report) -> Iterator[str]:
    images = ", ".join(f"{count:,} {split}" for split, count in report.images.items())
    yield f"{report.name}: {images}"
    if report.classes:
        yield f"{len(report.classes):,} classes, images of each in {_range(report)}"
    for name, counts in report.classes.items() if len(report.classes) <= _LISTED else ():
        yield f"  {name}: {', '.join(f'{count:,} {split}' for split, count in counts.items())}"
    for note in report.notes:
        yield f"note: {note}"
    for kind, count in Counter(fault.kind for fault in report.faults).most_common():
        yield f"{kind}: {count:,}"
        for fault in [fault for fault in report.faults if fault.kind == kind][:_LISTED]:
            yield f"  {fault.file}: {fault.reason}"
        if count > _LISTED:
            yield f"  … and {count - _LISTED:,} more; --json names all"
    yield f"fingerprint: {report.fingerprint or 'none'}"
    yield f"{len(report.faults):,} faults" if report.faults else "sound"


def _range(report: Report) -> str:
    parts = []
    for split in report.images:
        counts = [of_class[split] for of_class in report.classes.values()]
        parts.append(f"{split} {min(counts):,} to {max(counts):,}")
    return ", ".join(parts)


def _shown(text: str) -> str:
    """A text on one line: what cannot be printed (line breaks and undecodable bytes in names of files) is escaped."""
    return text if text.isprintable() else ascii(text)[1:-1]


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not Console(stderr=True).is_terminal) as bar:
        task = bar.add_task("looking for files", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None)
