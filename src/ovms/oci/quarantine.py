"""Where a repair puts what is not what it should be, so that nothing is lost.

::

    store/ovms.quarantine/
    ├── <hex>.<time>            what lay under a blob's name and was not that blob; a record of an origin that could not be read
    └── index.json.<time>       an index that could not be read, or not all of it

Nothing looks for anything there: it stays until ``ovm prune --quarantine``.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from ovms import fsutil


def set_aside(directory: Path, path: Path, *, replaced: bool = False) -> Path:
    """Moves *path* into the quarantine *directory*, and returns where it is there.

    What is *replaced* next stays where it is until then, wherever the file system has links (and has them for such a file).
    """
    # A VM that has the file open keeps it: a rename does not touch what is open.
    directory.mkdir(mode=0o700, exist_ok=True)
    stem = f"{path.name}.{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    target = directory / stem
    number = 1
    while os.path.lexists(target):
        number += 1
        target = directory / f"{stem}-{number}"
    if not (replaced and _linked(path, target)):
        path.rename(target)
    fsutil.fsync_dir(directory)
    fsutil.fsync_dir(path.parent)
    return target


def _linked(path: Path, target: Path) -> bool:
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError:
        return False
    return True
