"""What is signed or verified: an artifact in a registry, or in the local store."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ovms.cli.context import Context
from ovms.lazy import dataclass, replace

if TYPE_CHECKING:
    from ovms.oci.descriptor import ImageIndex, ImageManifest
    from ovms.oci.reference import Reference
    from ovms.oci.registry import RegistryClient
    from ovms.spec.digest import Digest


@dataclass(frozen=True)
class Subject:
    """An artifact or an index, as it stands at this moment.

    *client* is None in the local store. *reference* is None there for what has no name.
    """

    manifest: ImageManifest | ImageIndex
    reference: Reference | None
    client: RegistryClient | None

    @property
    def digests(self) -> list[Digest]:
        """Its digest, and those of the manifests of an index."""
        from ovms.oci.referrers import roots

        return roots(self.manifest)

    def pinned(self, digest: Digest | None = None) -> str:
        """What names exactly this, wherever its tag goes: ``NAME@DIGEST``, or the digest of what has no name."""
        digest = digest or self.manifest.digest
        return digest if self.reference is None else str(self.pin(self.reference, digest))

    @staticmethod
    def pin(reference: Reference, digest: Digest) -> Reference:
        """*reference* without its tag, and with this digest."""
        return replace(reference, tag=None, digest=digest)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds REF and ``--local``."""
    parser.add_argument("reference", metavar="REF", help="the artifact")
    parser.add_argument("--local", action="store_true", help="in the local store, also where REF names a registry")


def find(args: argparse.Namespace, context: Context) -> Subject:
    """What REF stands for now.

    Raises:
        ReferenceNotFound: nothing of that name there.
        RegistryError: and its kinds: as the registry met us.
    """
    from ovms.artifact import attach, resolve
    from ovms.oci.reference import Reference

    reference = Reference.parse(args.reference)
    if reference.registry is not None and not args.local:
        client = context.connect(reference.registry)
        return Subject(attach.remote_manifest(client, reference), reference, client)
    manifest = attach.local_manifest(context.layout, args.reference)
    # by the name that was given; a digest by any that it has
    name, _ = resolve.lookup(context.layout, args.reference) or (None, None)
    others = (e.name for e in context.layout.entries() if e.name and e.descriptor.digest == manifest.digest)
    name = name or next(others, None)
    return Subject(manifest, None if name is None else Reference.parse(name), None)
