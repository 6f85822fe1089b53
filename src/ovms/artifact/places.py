"""Artifacts between the local store and places on disk (``oci:DIR``, ``oci-archive:FILE``): what they are called there."""

from __future__ import annotations

from typing import Final

from ovms.artifact import ram
from ovms.artifact.guard import Admission, Guard
from ovms.artifact.model import load
from ovms.artifact.resolve import Found, allow, find, lookup, top
from ovms.errors import Conflict, InputError, ReferenceNotFound
from ovms.oci import exporting, importing, source
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.oci.platform import Platform
from ovms.oci.source import Entry
from ovms.oci.transport import Place, name_in
from ovms.progress import NULL, Progress

_NAME_HINT: Final = "say what to call it here, with -t NAME:TAG"


def pull(
    layout: Layout,
    place: Place,
    progress: Progress = NULL,
    *,
    name: str | None = None,
    platform: Platform | None = None,
    gate: ram.Gate | None = None,
    guard: Guard | None = None,
) -> Found:
    """Copies an artifact into the store as *name*, else as what it is called at *place*.

    Raises:
        InputError: it has no whole name there.
        Conflict: that name is another artifact's here.
    """

    def chosen(entry: Entry) -> str:
        if name is not None:
            return name
        own = name_in(entry.tag)
        if own is None:
            said = "has no name" if entry.tag is None else f"is called {entry.tag[:80]!a}, which is no whole name"
            raise InputError(f"what {place} holds {said}", hint=_NAME_HINT)
        known = layout.find(own)
        if known is not None and known.digest != entry.descriptor.digest:
            raise Conflict(
                f"what {place} holds is called {own}, but that is another artifact here ({known.digest})",
                hint=f"say that it shall be this one, with -t {own}, or give another name",
                name=own,
            )
        return own

    given: list[str] = []

    def noted(entry: Entry) -> str:
        given.append(chosen(entry))
        return given[-1]

    leave = _fetch(layout, place, progress, noted, platform, gate, guard)[1]
    return ram.marked(find(layout, given[-1], platform), leave)


def resolve(
    layout: Layout,
    place: Place,
    progress: Progress = NULL,
    *,
    copy: bool = True,
    platform: Platform | None = None,
    gate: ram.Gate | None = None,
    guard: Guard | None = None,
) -> Found:
    """The artifact at *place*, copied into the store where it is not yet (and *copy* allows).

    Raises:
        ReferenceNotFound: it is not in the store, and not to be copied.
    """

    def chosen(entry: Entry) -> str | None:
        own = name_in(entry.tag)
        return own if own is not None and layout.find(own) is None else None

    leave = None
    if copy:
        fetched, leave = _fetch(layout, place, progress, chosen, platform, gate, guard)
        digest = fetched.digest
    else:
        with source.opened(place) as files:
            digest = files.select(place).descriptor.digest
        if layout.size(digest) is None:
            raise ReferenceNotFound(
                f"what {place} holds is not in the local store", hint="'ovm pull' copies it", digest=digest
            )
    artifact = load(layout, digest, platform)
    names = [entry.name for entry in layout.entries() if entry.name and entry.descriptor.digest == digest]
    found = ram.marked(Found(next(iter(names), digest), artifact), leave)
    if guard is not None and not copy:
        allow(guard, found, None, None)
    return found


def push(layout: Layout, text: str, place: Place, progress: Progress = NULL) -> Descriptor:
    """Writes the artifact that is called *text* here to *place*, under the tag there, else under its own name."""
    with layout.using():
        descriptor = top(layout, text)
        known = lookup(layout, text)
        name = None if known is None else known[0]
        if name is None:
            name = next((e.name for e in layout.entries() if e.name and e.descriptor.digest == descriptor.digest), None)
        exporting.export(layout, descriptor.digest, place, name, progress)
        return descriptor


def _fetch(
    layout: Layout,
    place: Place,
    progress: Progress,
    name: importing.Naming,
    platform: Platform | None,
    gate: ram.Gate | None,
    guard: Guard | None,
) -> tuple[Descriptor, ram.Choice | None]:
    admission = Admission(guard, place)
    leave = None if gate is None else ram.Choice(layout, admission.gate(gate), platform)
    top = importing.fetch(
        layout,
        place,
        progress,
        name=name,
        check=admission.checking(layout, platform, ram=gate is None),
        leave=leave,
        platform=platform,
    )
    return top, leave
