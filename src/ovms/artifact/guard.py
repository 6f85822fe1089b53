"""Who is asked whether an artifact may come into the store, and whether it may be used: what a policy stands behind.

Everything that pulls, completes or uses an artifact takes a guard; ``tests/unit/test_hooks.py`` fails where one is not handed on.
None stands for no policy, as for what only looks. The guard itself is :class:`ovms.trust.guard.Guard`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from ovms.artifact.model import check_documents
from ovms.oci.descriptor import Descriptor, ImageManifest
from ovms.oci.layout import Layout
from ovms.oci.platform import Platform
from ovms.oci.reference import Reference
from ovms.oci.transport import Place
from ovms.spec.digest import Digest
from ovms.spec.manifest import Manifest

if TYPE_CHECKING:
    from ovms.artifact.ram import Gate
    from ovms.oci.registry import RegistryClient
    from ovms.spec.ramsnap import Control


class Guard(Protocol):
    """Lets artifacts pass, or raises. What is asked about is a digest, and the same digest is what is used then."""

    def admit(
        self,
        image: ImageManifest,
        top: Descriptor,
        where: Reference | Place,
        client: RegistryClient | None,
        *,
        ram: bool,
    ) -> None:
        """Whether an artifact may come in, asked before its bulk does; *ram*: with its RAM snapshot. It is noted where it came from.

        *top* is what it was asked for by: its manifest, or an index that lists it. *client* asks its registry, where it is in one.

        Raises:
            Untrusted: and its kinds: it may not.
            RegistryError: and its kinds: the registry's signatures can't be read.
        """
        ...

    def allow(
        self,
        digest: Digest,
        name: str,
        *,
        asked: str | None = None,
        connect: Callable[[str], RegistryClient] | None = None,
        ram: bool = False,
    ) -> None:
        """Whether an artifact in the store may be used; *ram*: its RAM snapshot, too.

        *name* is what messages call it, *asked* what the user called it by. With *connect*, signatures that are not here are
        looked for where it came from.

        Raises:
            Untrusted: and its kinds: it may not.
        """
        ...


class Admission:
    """Asks a guard on behalf of one transfer: of the artifact when its manifests are here, of its RAM snapshot when that is needed."""

    def __init__(self, guard: Guard | None, where: Reference | Place, client: RegistryClient | None = None) -> None:
        self._guard = guard
        self._where = where
        self._client = client
        self._coming: tuple[ImageManifest, Descriptor] | None = None

    def admit(self, image: ImageManifest, top: Descriptor, *, ram: bool) -> None:
        """Raises like :meth:`Guard.admit`."""
        self._coming = image, top
        if self._guard is not None:
            self._guard.admit(image, top, self._where, self._client, ram=ram)

    def checking(
        self, layout: Layout, platform: Platform | None, *, ram: bool
    ) -> Callable[[ImageManifest, Descriptor], None]:
        """What a transfer calls when the manifests are here: whether they are an artifact's, and whether that may come in."""

        def check(image: ImageManifest, top: Descriptor) -> None:
            check_documents(layout, image, platform)
            self.admit(image, top, ram=ram)

        return check

    def gate(self, gate: Gate) -> Gate:
        """*gate*, after which the guard is asked where a RAM snapshot is needed."""

        def ask(manifest: Manifest, read: Callable[[], Control]) -> str | None:
            reason = gate(manifest, read)
            if reason is None and manifest.ram_snapshot is not None and self._guard is not None:
                assert self._coming is not None
                self._guard.admit(*self._coming, self._where, self._client, ram=True)
            return reason

        return ask
