"""From what the user calls an artifact to the artifact in the local store, pulling it where needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from ovms.artifact.guard import Admission, Guard
from ovms.artifact.model import Artifact, load
from ovms.errors import InputError, ReferenceInvalid, ReferenceNotFound
from ovms.lazy import dataclass
from ovms.oci import transport
from ovms.oci.descriptor import Descriptor, ImageIndex
from ovms.oci.layout import Layout
from ovms.oci.platform import Platform
from ovms.oci.reference import Reference
from ovms.progress import NULL, Progress
from ovms.spec import mediatypes
from ovms.spec.digest import Digest, is_digest

if TYPE_CHECKING:
    from ovms.artifact.ram import Gate
    from ovms.oci.download import Tally
    from ovms.oci.registry import RegistryClient
    from ovms.oci.small import Pool

#: Opens a client for a registry's ``host[:port]``.
Connect = Callable[[str], "RegistryClient"]

PullPolicy = Literal["missing", "always", "never"]


@dataclass(frozen=True)
class Found:
    """An artifact in the store, and the name that it was found by (a digest where it has none).

    *left_out*: why its RAM snapshot was not fetched, where somebody was asked just now whether it is needed.
    """

    name: str
    artifact: Artifact
    left_out: str | None = None


def find(layout: Layout, text: str, platform: Platform | None = None) -> Found:
    """The artifact in the local store that *text* names: a reference, a digest, or the first digits of one.

    *platform* is the one to take of an index (None: this host's); what stands alone must be for it.

    Raises:
        ReferenceNotFound: nothing of that name here, or not for the platform.
        Unsupported: it is for other platforms only.
        InputError: a short digest that fits several artifacts.
        ReferenceInvalid: no reference at all.
    """
    known = lookup(layout, text)
    if known is not None:
        name, digest = known
        return Found(name or _name_of(layout, digest) or digest, load(layout, digest, platform))
    reference = Reference.parse(text)
    descriptor = _find_descriptor(layout, reference)
    if descriptor is None:
        raise ReferenceNotFound(
            f"there is no artifact {reference} in the local store",
            hint="'ovm ls' lists what is there; 'ovm pull' fetches from a registry",
            reference=str(reference),
        )
    return Found(str(reference), load(layout, descriptor.digest, platform))


def lookup(layout: Layout, text: str) -> tuple[str | None, Digest] | None:
    """What *text* names in the store, without reading the artifact: its name (None for a digest) and its digest.

    None when there is nothing of that name. Raises like :func:`find` on what is no reference at all. A name comes
    before the first digits of a digest: an artifact called ``decade`` is found, whatever else is in the store.
    """
    whole = f"sha256:{text.removeprefix('sha256:')}"
    if is_digest(whole):
        return (None, Digest(whole)) if layout.size(Digest(whole)) is not None else None
    try:
        reference = Reference.parse(text)
    except ReferenceInvalid:
        if transport.parse_place(text) is None:
            raise
        raise InputError(
            f"{text[:120]!a} is a place on disk, where a name is needed",
            hint="'ovm pull' copies what is there into the store",
        ) from None
    descriptor = layout.find(str(reference))
    if descriptor is not None:
        return str(reference), descriptor.digest
    if reference.digest is not None:
        # NAME@DIGEST of what was built or pulled by a tag
        for entry in layout.entries():
            same = entry.name.startswith((f"{reference.name}:", f"{reference.name}@"))
            if same and entry.descriptor.digest == reference.digest:
                return entry.name, reference.digest
        return None
    digest = _by_first_digits(layout, text)
    return None if digest is None else (None, digest)


def _find_descriptor(layout: Layout, reference: Reference) -> Descriptor | None:
    descriptor = layout.find(str(reference))
    if descriptor is None and reference.digest is not None:
        # The same name under a tag, or pulled by another name: a digest means the same everywhere.
        for entry in layout.entries():
            if entry.descriptor.digest == reference.digest:
                return entry.descriptor
    return descriptor


def _name_of(layout: Layout, digest: Digest) -> str | None:
    return next((e.name for e in layout.entries() if e.descriptor.digest == digest and e.name), None)


def _by_first_digits(layout: Layout, text: str) -> Digest | None:
    digits = text.removeprefix("sha256:")
    if not 6 <= len(digits) < 64 or any(c not in "0123456789abcdef" for c in digits):
        return None
    fitting = {e.descriptor.digest for e in layout.entries() if e.descriptor.digest[7:].startswith(digits)}
    if len(fitting) > 1:
        raise InputError(f"{text} fits {len(fitting)} artifacts; give more digits")
    return next(iter(fitting), None)


def pull(
    layout: Layout,
    connect: Connect,
    text: str,
    progress: Progress = NULL,
    *,
    name: str | None = None,
    platform: Platform | None = None,
    gate: Gate | None = None,
    tally: Tally | None = None,
    guard: Guard | None = None,
    pool: Pool | None = None,
) -> Found:
    """Fetches an artifact from its registry or a place on disk, checks it, and names it in the store.

    *name* is what it is called there, else what it is called where it comes from. *gate* is asked before the bulk whether
    its RAM snapshot is needed (None: it is). *tally* is counted up. *guard* is asked whether it may come at all. *pool* are
    the connections that it shares with others that are pulled with it (None: it has the usual number to itself).

    Raises:
        Untrusted: and its kinds: *guard* does not let it pass.
        InputError: the reference names no registry, or what is on disk has no whole name.
        Conflict: it has the name of another artifact in the store, and *name* does not say that this is meant.
        RegistryError, ReferenceNotFound, DigestMismatch, DiskFull: as the transfer met them.
        Unsupported, ManifestInvalid: what came is no OVMS artifact, or none for the platform.
    """
    source = transport.parse(text)
    named = None if name is None else str(transport.new_name(name))
    if isinstance(source, transport.Place):
        from ovms.artifact import places

        return places.pull(layout, source, progress, name=named, platform=platform, gate=gate, guard=guard)
    if source.registry is None:
        raise InputError(
            f"{source} names no registry",
            hint=f"write the registry's host before it, such as registry.example/{source}",
        )
    from ovms.artifact import ram
    from ovms.oci import transfer

    client = connect(source.registry)
    admission = Admission(guard, source, client)
    leave = None if gate is None else ram.Choice(layout, admission.gate(gate), platform)
    transfer.pull(
        layout,
        client,
        source,
        progress,
        check=admission.checking(layout, platform, ram=gate is None),
        leave=leave,
        name=named,
        platform=platform,
        tally=tally,
        pool=pool,
    )
    return ram.marked(find(layout, named or str(source), platform), leave)


def push(
    layout: Layout, connect: Connect, text: str, progress: Progress = NULL, *, destination: str | None = None
) -> Descriptor:
    """Uploads the artifact that is called *text* here: to *destination*, else to the registry that its name says.

    Raises:
        InputError: the name has no registry.
        ReferenceNotFound: nothing of that name here.
        RegistryError: as the transfer met it.
    """
    from ovms.artifact import places
    from ovms.oci import transfer

    target = transport.parse(text if destination is None else destination)
    if isinstance(target, transport.Place):
        return places.push(layout, text, target, progress)
    if target.registry is None:
        raise _no_registry(text, target)
    with layout.using():
        descriptor = top(layout, text)
        if target.digest not in (None, descriptor.digest):
            raise InputError(f"{target} is not what is pushed: {descriptor.digest}", hint="leave out what follows '@'")
        transfer.push(layout, connect(target.registry), target, descriptor.digest, progress)
        return descriptor


def pushable(text: str) -> Reference:
    """A reference with a registry. Raises :class:`InputError` where it has none."""
    reference = Reference.parse(text)
    if reference.registry is None:
        raise _no_registry(text, reference)
    return reference


def _no_registry(text: str, target: Reference) -> InputError:
    return InputError(
        f"{target} names no registry to push to",
        hint=f"say where to: 'ovm push {text} registry.example/{target}'",
    )


def top(layout: Layout, text: str) -> Descriptor:
    """What an index says of the artifact in the store, or of the index, that *text* names. Raises like :func:`find`."""
    known = lookup(layout, text)
    digest = find(layout, text).artifact.digest if known is None else known[1]
    if known is None and (descriptor := _find_descriptor(layout, Reference.parse(text))) is not None:
        digest = descriptor.digest
    manifest = layout.manifest(digest)
    if isinstance(manifest, ImageIndex):
        return Descriptor(mediatypes.OCI_INDEX, digest, len(manifest.raw))
    return manifest.descriptor()


def resolve(
    layout: Layout,
    connect: Connect,
    text: str | transport.Place,
    *,
    policy: PullPolicy = "missing",
    progress: Progress = NULL,
    platform: Platform | None = None,
    gate: Gate | None = None,
    guard: Guard | None = None,
) -> Found:
    """The artifact that *text* names, pulled from its registry, or copied from its place on disk, as *policy* says.

    *gate* says whether its RAM snapshot is needed (None: it is fetched with the rest). One that was left out of what is
    here is fetched when *gate* says so. *guard* is asked whether it may come, and whether it may be used.

    What comes from disk gets its name only where that is free: nobody said that another artifact should lose it. It may
    have none, and stays then as long as the caller is :meth:`~ovms.oci.layout.Layout.using` the store.

    Raises:
        ReferenceNotFound: neither here nor there (or not here, and not to be pulled).
        BlobNotFound: the RAM snapshot is needed, was left out, and nobody knows where it is (or it is not to be pulled).
        Untrusted: and its kinds: *guard* does not let it pass.
    """
    from ovms.artifact import ram

    place = text if isinstance(text, transport.Place) else transport.parse_place(text)
    if place is not None:
        from ovms.artifact import places

        return places.resolve(
            layout, place, progress, copy=policy != "never", platform=platform, gate=gate, guard=guard
        )
    text = str(text)
    if policy != "always":
        try:
            found = find(layout, text, platform)
        except ReferenceNotFound:
            if policy == "never" or Reference.parse(text).registry is None:
                raise
        else:
            fetch = policy != "never"
            if guard is not None:
                allow(guard, found, text, connect if fetch else None)
            return ram.complete(layout, connect, found, gate, fetch=fetch, progress=progress, guard=guard)
    return pull(layout, connect, text, progress, platform=platform, gate=gate, guard=guard)


def allow(guard: Guard, found: Found, asked: str | None, connect: Connect | None, *, ram: bool = False) -> None:
    """Asks *guard* whether what was found may be used, its RAM snapshot too where *ram* says so. Raises as that does."""
    guard.allow(found.artifact.digest, found.name, asked=asked, connect=connect, ram=ram)
