"""Whether an artifact's RAM snapshot is fetched: asked before the bulk is, and of artifacts in the store that came without it.

See ``docs/adr/0020``, and ``spec/rfc/ramsnap-v1.md``, section 7.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final, TypeVar

from ovms.artifact.model import Artifact, check_documents
from ovms.errors import BlobNotFound, OvmsError, RegistryError
from ovms.lazy import replace
from ovms.oci import absent
from ovms.oci.descriptor import Descriptor, ImageManifest
from ovms.oci.layout import Layout
from ovms.oci.platform import Platform
from ovms.progress import NULL, Progress
from ovms.spec.digest import Digest
from ovms.spec.manifest import Manifest, PartKind

if TYPE_CHECKING:
    from ovms.artifact.guard import Guard
    from ovms.artifact.resolve import Connect, Found
    from ovms.oci.registry import RegistryClient
    from ovms.oci.transfer import ReadControl
    from ovms.spec.ramsnap import Control

T = TypeVar("T")

#: Asked with the OVMS manifest, and with what reads the control part of its RAM snapshot (to be called only where there
#: is one): why that is not needed; None: it is. What it raises ends the pull before the bulk.
Gate = Callable[[Manifest, Callable[[], "Control"]], str | None]

_COLD: Final = "; --cold boots from the disk"


def unwanted(_manifest: Manifest, _control: Callable[[], Control]) -> str:
    """A gate: no RAM snapshot is wanted, whatever it is."""
    return "it was not asked for"


def blobs_of(image: ImageManifest, manifest: Manifest) -> list[Descriptor]:
    """The RAM snapshots of an artifact, base first: what it boots without. What is another part, too, is none of them."""
    others = {part.ref for part in manifest.parts() if part.kind is not PartKind.RAM} | {image.config.digest}
    refs = [part.ref for part in manifest.parts() if part.kind is PartKind.RAM and part.ref not in others]
    by_digest = {layer.digest: layer for layer in image.layers if layer.media_type in absent.RAM_TYPES}
    return [by_digest[Digest(ref)] for ref in dict.fromkeys(refs) if ref in by_digest]


def left_out(layout: Layout, artifact: Artifact) -> list[Descriptor]:
    """The RAM snapshots of an artifact in the store that were left out."""
    return absent.left_out(layout, blobs_of(artifact.image, artifact.manifest))


class Choice:
    """Asks a gate on behalf of a transfer (as its ``leave``), and remembers what it said in ``reason``."""

    def __init__(self, layout: Layout, gate: Gate, platform: Platform | None = None) -> None:
        self.reason: str | None = None
        self._layout = layout
        self._gate = gate
        self._platform = platform

    def __call__(self, image: ImageManifest, read: ReadControl) -> Collection[Digest]:
        """The digests of the RAM snapshots that are not to be fetched."""
        from ovms.spec import ramsnap

        manifest = check_documents(self._layout, image, self._platform)
        blobs = blobs_of(image, manifest)
        if manifest.ram_snapshot is not None and not blobs:
            return ()  # the blob is another part, too
        self.reason = self._gate(
            manifest, lambda: ramsnap.parse_control(_here(self._layout, blobs[-1]) or read(blobs[-1]))
        )
        return () if self.reason is None else [blob.digest for blob in blobs]


def _here(layout: Layout, blob: Descriptor) -> bytes | None:
    # the control part of a blob in the store
    from ovms import fsutil
    from ovms.artifact.parts import read_control

    if layout.size(blob.digest) != blob.size:
        return None
    with fsutil.open_input(layout.path(blob.digest), "the RAM snapshot") as file:
        return read_control(file.fileno(), "the RAM snapshot")


def marked(found: Found, choice: Choice | None) -> Found:
    """*found*, with what the gate said of its RAM snapshot."""
    return found if choice is None or choice.reason is None else replace(found, left_out=choice.reason)


def complete(
    layout: Layout,
    connect: Connect,
    found: Found,
    gate: Gate | None,
    *,
    fetch: bool = True,
    progress: Progress = NULL,
    guard: Guard | None = None,
) -> Found:
    """Fetches the RAM snapshot of an artifact that came without it, where *gate* says that it is needed (None: it is not).

    It is looked for where the artifact's names say. Not *fetch*: no registry is asked. *guard* is asked whether it may come.

    Raises:
        BlobNotFound: it is needed, and can't be fetched.
        RegistryError: and its kinds: as the registry met us.
        whatever *gate* raises.
    """
    missing = [] if gate is None else left_out(layout, found.artifact)
    if gate is None or not missing:
        return found
    from ovms.oci import download, transfer
    from ovms.spec import ramsnap

    artifact = found.artifact
    sources = absent.sources(layout, artifact.digest, [found.name]) if fetch else []
    newest = blobs_of(artifact.image, artifact.manifest)[-1]

    def from_somewhere(work: Callable[[RegistryClient, str], T]) -> T:
        # a name may have been given here, and mean nothing there: the next may
        first: OvmsError = absent.missing(
            layout, artifact.digest, newest.digest, f"{found.name} can't be restored", more=_COLD
        )
        for number, source in enumerate(sources):
            try:
                return work(connect(source.registry or ""), source.repository)
            except (BlobNotFound, RegistryError) as exc:
                first = exc if number == 0 else first
        if isinstance(first, RegistryError):
            first.hint = (first.hint or "try again") + _COLD
        raise first

    def control() -> Control:
        raw = _here(layout, newest) or absent.control_part(layout, newest)
        if raw is None:
            raw = from_somewhere(lambda client, where: download.read_control(client, where, newest, progress))
            absent.note(layout, newest, raw)
        return ramsnap.parse_control(raw)

    reason = gate(artifact.manifest, control)
    if reason is not None:
        return replace(found, left_out=reason)
    if guard is not None:
        guard.allow(artifact.digest, found.name, connect=connect if fetch else None, ram=True)
    from_somewhere(lambda client, where: transfer.complete(layout, client, where, missing, progress))
    return found
