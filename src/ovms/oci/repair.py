"""Puts a store right without losing anything: what is wrong is taken out of the way, into ``ovms.quarantine``.

Each step is one rename or one file that is replaced whole, so a repair that is killed is gone on with by the next.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ovms.errors import StoreCorrupt
from ovms.lazy import replace
from ovms.oci import collector
from ovms.oci.collector import WAIT, Needs
from ovms.oci.descriptor import ImageIndex, ImageManifest
from ovms.oci.fsck import Fault, Finding, Report, Uses, check, copied_entries, damage, look
from ovms.oci.layout import Layout, empty_index
from ovms.oci.quarantine import set_aside
from ovms.oci.whole import lacks
from ovms.progress import NULL, Progress
from ovms.spec import mediatypes
from ovms.spec.digest import Digest, is_digest


def repair(
    layout: Layout,
    uses: Callable[[], Uses],
    *,
    quick: bool = False,
    progress: Progress = NULL,
    wait: float = WAIT,
) -> Report:
    """Checks everything, and repairs what can be repaired. The long part runs beside others, the repair alone.

    Raises:
        Locked: another process adds or uses blobs just now; nothing was changed.
    """
    first = check(layout, uses, quick=quick, progress=progress)
    suspects = {finding.digest for finding in first.findings if finding.fault is Fault.BLOB and finding.digest}
    with collector.alone(layout, wait=wait):
        now = uses()
        # seen again: others may have worked since
        found = look(layout, now, suspects)
        steps = [_repair(layout, finding, now.needs) for finding in found.findings]
        if any(finding.fault in (Fault.INDEX, Fault.ENTRY, Fault.NAME_TWICE) for finding in found.findings):
            _repair_index(layout)
        stale = collector.stale(layout, now.needs)
        collector.remove(stale)
        # What artifacts lack is told as it is now.
        after = look(layout, now, ())
    report = Report(blobs=first.blobs, hashed=first.hashed, artifacts=after.artifacts)
    report.findings += [finding for finding in steps if finding.repaired is not None]
    report.findings += after.findings
    for item in stale:
        report.add(Fault.STALE, f"{item.path} is of no use any more", path=item.path, repaired="removed")
    if any(finding.fault is Fault.INDEX for finding in report.findings):
        report.findings += _nameless(layout)
    return report


def _repair(layout: Layout, finding: Finding, needs: Needs) -> Finding:
    path = finding.path
    match finding.fault:
        case Fault.LAYOUT:
            layout.write_marker()
            return replace(finding, repaired="written anew")
        case Fault.BLOB | Fault.NO_FILE if path is not None:
            kept = set_aside(layout.quarantine_dir, path)
            for derived in layout.derived_dir.glob(f"{path.name}.*"):
                if derived.suffix != ".lock" and derived.name not in needs.files:
                    derived.unlink(missing_ok=True)
            (layout.absent_dir / path.name).unlink(missing_ok=True)  # what is lost was not left out
            return replace(finding, repaired=f"moved to {kept}")
        case Fault.MODE if path is not None:
            path.chmod(0o444)
            if finding.digest is not None and (why := damage(layout, finding.digest)) is not None:
                return _repair(layout, replace(finding, fault=Fault.BLOB, message=why), needs)
            return replace(finding, repaired="set to 0444")
        case Fault.ORIGIN if path is not None:
            return replace(finding, repaired=f"moved to {set_aside(layout.quarantine_dir, path)}")
        case Fault.DERIVED if path is not None:
            path.unlink(missing_ok=True)
            return replace(finding, repaired="removed; the next start makes it anew")
        case Fault.INDEX:
            return replace(finding, repaired="rebuilt from ovms.index.json and from what is there")
        case Fault.ENTRY:
            return replace(finding, repaired="taken out")
        case Fault.NAME_TWICE:
            return replace(finding, repaired="the second has no name any more")
        case _:
            return finding


def _repair_index(layout: Layout) -> None:
    with layout.index_lock():
        try:
            index = _mended(layout, layout.read_index())
        except StoreCorrupt:
            index = _rebuilt(layout)
        if os.path.lexists(layout.index):
            set_aside(layout.quarantine_dir, layout.index, replaced=True)
        layout.write_index(index)


def _mended(layout: Layout, index: dict[str, Any]) -> dict[str, Any]:
    kept: list[Any] = []
    names: set[str] = set()
    for i, item in enumerate(index["manifests"]):
        try:
            name = layout.entry(item, i).name
        except StoreCorrupt:
            continue
        kept.append(_without_name(item) if name in names else item)
        names |= {name} - {""}
    return {**index, "manifests": kept}


def _without_name(item: dict[str, Any]) -> dict[str, Any]:
    others = {k: v for k, v in item["annotations"].items() if k != mediatypes.REF_NAME_ANNOTATION}
    return {**item, "annotations": others}


def _rebuilt(layout: Layout) -> dict[str, Any]:
    # The names of our copy; and the artifacts that these do not reach, without a name: they are kept, and listed.
    known = copied_entries(layout)
    reached = collector.reach(layout, [entry.descriptor.digest for entry, _ in known])
    names = (f"sha256:{path.name}" for path in sorted(layout.blob_dir.iterdir()))
    blobs = [Digest(name) for name in names if is_digest(name)]
    found = collector.unnamed_manifests(layout, [digest for digest in blobs if digest not in reached.digests])
    children = {child.digest for index in found.values() if isinstance(index, ImageIndex) for child in index.manifests}
    more = [
        {"mediaType": _media_type(manifest), "digest": digest, "size": len(manifest.raw)}
        for digest, manifest in found.items()
        if digest not in children and _is_whole(layout, manifest)
    ]
    return {**empty_index(), "manifests": [*(item for _, item in known), *more]}


def _media_type(manifest: ImageManifest | ImageIndex) -> str:
    return mediatypes.OCI_INDEX if isinstance(manifest, ImageIndex) else mediatypes.OCI_MANIFEST


def _is_whole(layout: Layout, manifest: ImageManifest | ImageIndex) -> bool:
    if isinstance(manifest, ImageIndex):
        return any(layout.size(child.digest) is not None for child in manifest.manifests)
    return not lacks(layout, manifest.blobs)


def _nameless(layout: Layout) -> list[Finding]:
    return [
        Finding(
            Fault.INDEX,
            f"the artifact {entry.descriptor.digest} has lost its name",
            digest=entry.descriptor.digest,
            hint=f"'ovm inspect {entry.descriptor.digest}' shows it, 'ovm tag {entry.descriptor.digest} NAME' names it",
            repaired="kept without a name",
        )
        for entry in layout.entries()
        if not entry.name
    ]
