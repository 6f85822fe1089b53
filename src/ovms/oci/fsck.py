"""Checks a store: every blob against its name, every name against what it stands for, and what else lies there.

Nothing is believed that can be looked at. What is found is told with the artifacts that it hits, and with how to get them
back. ``repair.py`` puts right what can be put right without losing anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from ovms import fsutil
from ovms.errors import Locked, OvmsError, StoreCorrupt
from ovms.lazy import dataclass, field, regex
from ovms.oci import absent, collector, origins, workers
from ovms.oci.collector import Item, Needs
from ovms.oci.descriptor import ImageManifest
from ovms.oci.layout import Entry, Layout
from ovms.oci.reference import Reference
from ovms.progress import NULL, Progress
from ovms.spec import ramsnap, strictjson
from ovms.spec.digest import Digest, from_hasher

_HEX: Final = regex(r"[0-9a-f]{64}")
#: Missing blobs that a message names; JSON has all of them.
_NAMED_MAX: Final = 3
_ORIGIN_HINT: Final = "pull or build the artifact again: until then policies go by all of its names"


class Fault(StrEnum):
    """What can be wrong with a store; stable, for programs."""

    LAYOUT = "layout-damaged"
    INDEX = "index-damaged"
    ENTRY = "entry-invalid"
    NAME_TWICE = "name-twice"
    BLOB = "blob-corrupt"
    NO_FILE = "not-a-file"
    MODE = "permissions"
    DERIVED = "derived-damaged"
    ARTIFACT = "artifact-incomplete"
    RECORD = "record-damaged"
    ORIGIN = "origin-damaged"
    #: Harmless: what killed commands left, and what is none of ours.
    STALE = "stale"
    FOREIGN = "foreign"

    @property
    def harmless(self) -> bool:
        """Whether the store is sound all the same."""
        return self in (Fault.STALE, Fault.FOREIGN)

    @property
    def mendable(self) -> bool:
        """Whether ``repair.py`` can put it right by itself."""
        return not self.harmless and self not in (Fault.ARTIFACT, Fault.RECORD)


@dataclass(frozen=True)
class Finding:
    """Something that is wrong. ``repaired`` says what was done about it; ``names`` are the artifacts that it hits."""

    fault: Fault
    message: str
    path: Path | None = None
    digest: Digest | None = None
    names: tuple[str, ...] = ()
    missing: tuple[Digest, ...] = ()
    hint: str | None = None
    repaired: str | None = None
    item: Item | None = None

    @property
    def left(self) -> bool:
        """Whether the store is not sound because of it."""
        return self.repaired is None and not self.fault.harmless

    def to_json(self) -> dict[str, Any]:
        """As ``ovm fsck --json`` lists it."""
        answer: dict[str, Any] = {"fault": self.fault, "message": self.message}
        if self.path is not None:
            answer["path"] = str(self.path)
        for key in ("digest", "names", "missing", "hint", "repaired"):
            if value := getattr(self, key):
                answer[key] = list(value) if isinstance(value, tuple) else value
        return answer


@dataclass(frozen=True)
class User:
    """An instance, and what its artifact was called when it was started."""

    name: str
    reference: str


@dataclass(frozen=True)
class Uses:
    """What instances need; ``damaged`` are the records that can't be read."""

    needs: Needs = field(default_factory=Needs)
    users: Mapping[Digest, Sequence[User]] = field(default_factory=dict)
    damaged: tuple[OvmsError, ...] = ()


@dataclass()
class Report:
    """What was looked at, and what is wrong. ``busy``: others worked, so stale work was not looked for."""

    findings: list[Finding] = field(default_factory=list)
    blobs: int = 0
    hashed: int = 0
    artifacts: int = 0
    busy: bool = False

    @property
    def sound(self) -> bool:
        """Whether nothing is left that harms."""
        return not any(finding.left for finding in self.findings)

    def add(self, fault: Fault, message: str, **more: Any) -> None:
        """Notes a finding."""
        self.findings.append(Finding(fault, message, **more))


def open_damaged(root: Path) -> Layout:
    """The store at *root*, also when its ``oci-layout`` is damaged.

    Raises:
        StoreCorrupt: it is of another version, or was none of ours.
    """
    try:
        return Layout(root)
    except StoreCorrupt:
        version = None
        with contextlib.suppress(OvmsError, AttributeError):
            data = fsutil.read_input(root / "oci-layout", "oci-layout", max_size=4096)
            version = strictjson.parse(data, "oci-layout", max_size=4096).get("imageLayoutVersion")
        if version is not None or not (root / "ovms.lock").exists():
            raise
    return Layout(root, marked=False)


def check(
    layout: Layout,
    uses: Callable[[], Uses],
    *,
    quick: bool = False,
    progress: Progress = NULL,
) -> Report:
    """Checks everything. *quick*: of the blobs only sizes and manifests.

    Others may work meanwhile: nothing is removed while we look, and what is being added has no name yet.
    """
    with layout.using():
        report = look(layout, uses(), None if not quick else (), progress)
    try:
        # for a moment only: what is stale can be told when nobody works
        with collector.alone(layout, wait=0):
            _note_stale(report, layout, uses().needs)
    except Locked:
        report.busy = True
    return report


def look(layout: Layout, uses: Uses, hashed: Collection[Digest] | None, progress: Progress = NULL) -> Report:
    """All checks but that for stale work, under a lock of the caller's. *hashed*: blobs to be hashed; None: all."""
    report = Report()
    _check_marker(report, layout)
    entries = _check_index(report, layout)
    corrupt = _check_blobs(report, layout, hashed, progress)
    _check_derived(report, layout, uses.needs)
    _check_origins(report, layout)
    for error in uses.damaged:
        report.add(Fault.RECORD, error.message, hint=error.hint)
    artifacts = _check_artifacts(report, layout, entries, uses, corrupt)
    report.artifacts = len(artifacts)
    return report


# --- oci-layout and index.json ---------------------------------------------------------------------------------------


def _check_marker(report: Report, layout: Layout) -> None:
    try:
        Layout(layout.root)
    except StoreCorrupt as exc:
        report.add(Fault.LAYOUT, exc.message, path=layout.marker)


def _check_index(report: Report, layout: Layout) -> list[Entry]:
    entries: list[Entry] = []
    try:
        items = layout.read_index()["manifests"]
    except StoreCorrupt as exc:
        report.add(Fault.INDEX, exc.message, path=layout.index)
        return [entry for entry, _ in copied_entries(layout)]
    names: set[str] = set()
    for i, item in enumerate(items):
        try:
            entry = layout.entry(item, i)
        except StoreCorrupt as exc:
            report.add(Fault.ENTRY, exc.message, path=layout.index)
            continue
        if entry.name and entry.name in names:
            message = f"{entry.name} stands in the index twice; commands take the first"
            report.add(
                Fault.NAME_TWICE, message, path=layout.index, digest=entry.descriptor.digest, names=(entry.name,)
            )
        names.add(entry.name)
        entries.append(entry)
    return entries


def copied_entries(layout: Layout) -> list[tuple[Entry, Any]]:
    """What our copy of the index says, as far as the manifests are here: entries, and their JSON."""
    answer = []
    with contextlib.suppress(StoreCorrupt):
        for i, item in enumerate(layout.read_index(layout.index_copy)["manifests"]):
            with contextlib.suppress(StoreCorrupt):
                entry = layout.entry(item, i)
                if layout.size(entry.descriptor.digest) is not None:
                    answer.append((entry, item))
    return answer


# --- blobs -----------------------------------------------------------------------------------------------------------


def _check_blobs(report: Report, layout: Layout, hashed: Collection[Digest] | None, progress: Progress) -> set[Digest]:
    # Gives the blobs that are not to be believed.
    corrupt: set[Digest] = set()
    jobs: list[tuple[Digest, int]] = []
    for path in sorted(layout.blob_dir.iterdir()):
        try:
            info = path.lstat()
        except FileNotFoundError:
            continue
        if not _HEX.fullmatch(path.name):
            report.add(Fault.FOREIGN, f"{path} is no blob; it is left alone", path=path)
            continue
        report.blobs += 1
        digest = Digest(f"sha256:{path.name}")
        if not stat.S_ISREG(info.st_mode):
            kind = "a symbolic link" if stat.S_ISLNK(info.st_mode) else "a directory or a special file"
            report.add(Fault.NO_FILE, f"{path} is {kind}, where a blob belongs", path=path, digest=digest)
            corrupt.add(digest)
            continue
        if info.st_mode & 0o022 or not info.st_mode & 0o400:
            what = "can be written to by other users" if info.st_mode & 0o022 else "may not be read"
            report.add(Fault.MODE, f"the blob {digest} {what}", path=path, digest=digest)
        if hashed is None or digest in hashed:
            jobs.append((digest, info.st_size))
    for digest, why in _hash_all(report, layout, jobs, progress):
        report.add(Fault.BLOB, why, path=layout.path(digest), digest=digest)
        corrupt.add(digest)
    return corrupt


def _hash_all(
    report: Report, layout: Layout, jobs: list[tuple[Digest, int]], progress: Progress
) -> list[tuple[Digest, str]]:
    found: list[tuple[Digest, str]] = []
    with progress.task("checking blobs", sum(size for _, size in jobs)) as task:

        def job(digest: Digest, size: int) -> workers.Job:
            def hash_it(stopped: Callable[[], bool]) -> None:
                def advance(amount: int) -> None:
                    if stopped():
                        raise Locked("another check has failed")
                    task.advance(amount)

                if (why := damage(layout, digest, advance)) is not None:
                    found.append((digest, why))
                report.hashed += size

            return hash_it

        workers.run_all([job(digest, size) for digest, size in sorted(jobs, key=lambda item: -item[1])])
    return sorted(found)


def damage(layout: Layout, digest: Digest, advance: Callable[[int], None] | None = None) -> str | None:
    """What is wrong with a blob that is here, byte by byte; None when nothing is."""
    hasher = hashlib.sha256()
    try:
        fd = os.open(layout.path(digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except PermissionError:  # told as such
        return None
    except OSError as exc:
        return f"the blob {digest} cannot be opened: {exc.strerror}"
    try:
        size = fsutil.hash_file(fd, hasher, advance=advance)
    except OSError as exc:
        return f"the blob {digest} cannot be read: {exc.strerror}"
    except OvmsError as exc:
        return f"the blob {digest} cannot be read: {exc.message}"
    finally:
        os.close(fd)
    if from_hasher(hasher) == digest:
        return None
    return f"the blob {digest} is damaged: its {size} bytes have the digest {from_hasher(hasher)}"


def _check_derived(report: Report, layout: Layout, needs: Needs) -> None:
    for path in sorted(layout.derived_dir.glob("*.ram")):
        digits = path.name.partition(".")[0]
        if path.is_symlink() or not path.is_file():
            report.add(Fault.FOREIGN, f"{path} is none of ours; it is left alone", path=path)
        elif _HEX.fullmatch(digits) and path.name not in needs.files:
            wanted = _memory_size(layout.blob_dir / digits)
            if wanted is not None and (size := path.stat().st_size) != wanted:
                report.add(Fault.DERIVED, f"{path} has {size} bytes, not the {wanted} of the memory", path=path)


def _check_origins(report: Report, layout: Layout) -> None:
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(layout.origin_dir.iterdir()):
            if not _HEX.fullmatch(path.name):
                continue
            try:
                origins.read(layout, Digest(f"sha256:{path.name}"))
            except StoreCorrupt as exc:
                report.add(
                    Fault.ORIGIN, exc.message, path=path, digest=Digest(f"sha256:{path.name}"), hint=_ORIGIN_HINT
                )


def _memory_size(blob: Path) -> int | None:
    try:
        with fsutil.open_input(blob, "the RAM snapshot") as file:
            return ramsnap.parse_prefix(os.pread(file.fileno(), ramsnap.PREFIX_SIZE, 0)).memory_size
    except (OSError, OvmsError):
        return None


# --- artifacts -------------------------------------------------------------------------------------------------------


def _check_artifacts(
    report: Report, layout: Layout, entries: Iterable[Entry], uses: Uses, corrupt: set[Digest]
) -> set[Digest]:
    names: dict[Digest, list[str]] = {}
    for entry in entries:
        names.setdefault(entry.descriptor.digest, []).append(entry.name)
    roots = set(names) | set(uses.needs.artifacts)
    for root in sorted(roots):
        reached = collector.reach(layout, [root])
        for digest in reached.broken:
            # a manifest that was not hashed: --quick
            if digest not in corrupt and (why := damage(layout, digest)) is not None:
                report.add(Fault.BLOB, why, path=layout.path(digest), digest=digest)
                corrupt.add(digest)
        missing = set(reached.broken)
        wrong: list[str] = []
        for image in reached.images.values():
            missing |= set(_missing(report, layout, image, corrupt, wrong))
        calls = tuple(dict.fromkeys(name for name in names.get(root, ()) if name))
        users = uses.users.get(root, ())
        if missing or wrong:
            report.add(
                Fault.ARTIFACT,
                _incomplete(layout, root, calls, users, reached.broken, missing, wrong),
                digest=root,
                names=calls,
                missing=tuple(sorted(missing)),
                hint=how_back(calls, users),
            )
    return roots


def _missing(
    report: Report, layout: Layout, image: ImageManifest, corrupt: set[Digest], wrong: list[str]
) -> Iterator[Digest]:
    for blob in image.blobs:
        size = None if blob.digest in corrupt else layout.size(blob.digest)
        if size is None:
            if not absent.left_out(layout, [blob]):
                yield blob.digest
        elif size != blob.size:
            if (why := damage(layout, blob.digest)) is not None:
                report.add(Fault.BLOB, why, path=layout.path(blob.digest), digest=blob.digest)
                corrupt.add(blob.digest)
                yield blob.digest
            else:
                wrong.append(f"its manifest says that {blob.digest} has {blob.size} bytes; it has {size}")


def _incomplete(
    layout: Layout,
    root: Digest,
    names: Sequence[str],
    users: Sequence[User],
    broken: Mapping[Digest, OvmsError],
    missing: Collection[Digest],
    wrong: Sequence[str],
) -> str:
    what = " and ".join(names) or f"the artifact {root}"
    if users:
        what += f" (which the instance {users[0].name} needs)"
    if root in broken:
        lost = layout.size(root) is None
        return f"{what} has no manifest: {root} is {'missing' if lost else 'damaged'}"
    parts = [*wrong]
    if missing:
        shown = ", ".join(sorted(missing)[:_NAMED_MAX])
        more = f" and {len(missing) - _NAMED_MAX} more" if len(missing) > _NAMED_MAX else ""
        parts.insert(0, f"{'lacks' if len(names) < 2 else 'lack'} {shown}{more}")
    return f"{what}: {'; '.join(parts)}" if wrong else f"{what} {parts[0]}"


def how_back(names: Sequence[str], users: Sequence[User]) -> str:
    """What brings an artifact back: a pull where it has a registry."""
    known = [*names, *(user.reference for user in users)]
    for name in known:
        with contextlib.suppress(OvmsError):
            if Reference.parse(name).registry is not None:
                return f"'ovm pull {name}' fetches what is missing"
    again = f"'ovm build … -t {known[0]}'" if known else "'ovm build'"
    return f"it is in no registry that its name tells: build it again ({again}), or give it up with 'ovm rmi'"


def _note_stale(report: Report, layout: Layout, needs: Needs) -> None:
    for item in collector.stale(layout, needs):
        report.add(Fault.STALE, f"{item.path} is of no use any more", path=item.path, item=item)
