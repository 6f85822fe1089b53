"""Attaching a file to an artifact: a small artifact of its own, whose ``subject`` is the other.

Its form is that of the OCI image specification 1.1 for what needs no config: the empty config, the file as the only
layer.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Final

from ovms import fsutil
from ovms.artifact import kinds
from ovms.artifact.resolve import Connect, find, lookup, pushable
from ovms.errors import (
    BlobNotFound,
    InputError,
    IntegrityError,
    JsonInvalid,
    ReferenceNotFound,
    RegistryProtocol,
    UsageError,
)
from ovms.lazy import dataclass, regex, replace
from ovms.oci import origins
from ovms.oci.descriptor import (
    EMPTY_CONFIG,
    Descriptor,
    ImageIndex,
    ImageManifest,
    build_file_manifest,
    created_now,
    parse_manifest,
    with_subject,
)
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.referrers import lister, local_lister, roots, tree
from ovms.oci.registry import RegistryClient
from ovms.progress import NULL, Progress
from ovms.spec import limits, mediatypes
from ovms.spec.digest import Digest, from_hasher, is_digest

#: RFC 6838, section 4.2.
_MEDIA_TYPE: Final = regex(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")
#: What the referrers of one artifact that are fetched with it may have, all together.
PULLED_BYTES_MAX: Final = 1 * limits.GIB


@dataclass(frozen=True)
class Attachment:
    """What is to be attached: a file, its media type, the type of the artifact around it, annotations of that.

    *subjects*: the artifacts that it says it is about, one of which it has to be attached to (None: it says nothing).
    """

    path: Path
    media_type: str
    artifact_type: str
    annotations: Mapping[str, str]
    subjects: frozenset[Digest] | None = None

    @classmethod
    def of(cls, path: Path, said: str | None, artifact_type: str | None, annotations: Mapping[str, str]) -> Attachment:
        """What *path* is: of the media type or :class:`~ovms.artifact.kinds.Kind` that was *said*, else as it says itself.

        Raises:
            FileProblem: it is no file that can be read.
            UsageError: what it is can't be told.
            InputError: it is something else than the kind that was said; or a type or annotation is none.
        """
        if said is not None and "/" in said:
            return cls(path, said, artifact_type or said, annotations)
        if said is not None and said not in kinds.ATTACHED:
            raise UsageError(
                f"{said[:60]!a} is neither a media type nor one of {', '.join(kinds.ATTACHED)}",
                hint="write it as TYPE/SUBTYPE, such as application/spdx+json",
            )
        found = _recognised(path)
        if found is None or said not in (None, found.kind):
            named = "something that is not known" if found is None else found.kind.text
            if said is not None:
                raise InputError(
                    f"{path} is {named}, not {kinds.Kind(said).text}", hint="leave out --type, or say another"
                )
            raise UsageError(
                f"{path} is {named}", hint=f"say what it is with --type: {', '.join(kinds.ATTACHED)}, or a media type"
            )
        notes = {} if found.predicate is None else {mediatypes.PREDICATE_ANNOTATION: found.predicate}
        subjects = None if found.predicate is None else found.subjects
        return cls(path, found.media_type, artifact_type or found.media_type, {**notes, **annotations}, subjects)

    def __post_init__(self) -> None:
        """Raises :class:`InputError` where a type or an annotation is none."""
        for text in (self.media_type, self.artifact_type):
            if not _MEDIA_TYPE.fullmatch(text):
                raise InputError(
                    f"{text[:100]!a} is no media type", hint="write it as TYPE/SUBTYPE, such as application/spdx+json"
                )
        if self.artifact_type == mediatypes.OCI_EMPTY:
            raise InputError(f"{self.artifact_type} says nothing of an artifact", hint="name what the file is")
        for key, value in self.annotations.items():
            if not key or len(key) > limits.NAME_MAX or len(value) > limits.STRING_MAX:
                raise InputError(
                    f"the annotation {key[:60]!a} is out of range: a key of 1 to {limits.NAME_MAX} characters and a value "
                    f"of at most {limits.STRING_MAX} are allowed"
                )

    def manifest(self, digest: Digest, size: int, subject: Descriptor) -> ImageManifest:
        """The manifest around the file, whose content has this digest and size.

        Raises:
            InputError: it says that it is about other artifacts than *subject*.
        """
        if self.subjects is not None and subject.digest not in self.subjects:
            raise InputError(
                f"{self.path} is a statement about other artifacts than {subject.digest}",
                hint=f"to attach it all the same, say --type {self.media_type}",
            )
        created = created_now()
        title = {mediatypes.TITLE_ANNOTATION: self.path.name}
        layer = Descriptor(self.media_type, digest, size, title)
        annotations = {mediatypes.CREATED_ANNOTATION: created, **self.annotations}
        return build_file_manifest(self.artifact_type, layer, subject, annotations)


def attach_remote(
    layout: Layout, client: RegistryClient, reference: Reference, attachment: Attachment, progress: Progress = NULL
) -> tuple[Descriptor, Descriptor]:
    """Pushes the file to the registry of *reference*, whose artifact is its subject. Nothing comes into the store.

    Returns the descriptors of the new artifact and of the subject.

    Raises:
        FileProblem: it is no file that can be read.
        ReferenceNotFound: the registry has no such artifact.
        RegistryError: and its kinds: as the registry met us.
    """
    from ovms.oci import transfer

    with ExitStack() as stack:
        file = stack.enter_context(_open(attachment))
        subject = remote_manifest(client, reference).descriptor()
        hasher = hashlib.sha256()
        with progress.task("reading", os.fstat(file.fileno()).st_size) as task:
            size = fsutil.hash_file(file.fileno(), hasher, advance=task.advance)
        image = attachment.manifest(from_hasher(hasher), size, subject)
        config = stack.enter_context(fsutil.staging_dir(layout.staging_root)) / "config"
        config.write_bytes(EMPTY_CONFIG)
        # The open file, not its name, which may stand for another file by now.
        files = {image.layers[0].digest: Path(f"/proc/self/fd/{file.fileno()}"), image.config.digest: config}
        transfer.push_files(layout, client, reference.repository, image, files, progress)
        return image.as_referrer(), subject


def attach_local(
    layout: Layout, text: str, attachment: Attachment, progress: Progress = NULL
) -> tuple[Descriptor, Descriptor]:
    """Keeps the file in the local store, as a referrer of what *text* names there. Returns as :func:`attach_remote`.

    Raises:
        FileProblem: it is no file that can be read.
        ReferenceNotFound: nothing of that name here.
        DiskFull: said before the first byte is copied.
    """
    with layout.using(), _open(attachment) as file:
        subject = local_manifest(layout, text).descriptor()
        with progress.task("reading", os.fstat(file.fileno()).st_size) as task:
            digest, size, _ = layout.add_file(file.fileno(), "the file", advance=task.advance)
        image = attachment.manifest(digest, size, subject)
        layout.add_bytes(EMPTY_CONFIG)
        layout.add_bytes(image.raw)
        layout.add_nameless(image.descriptor())
        return image.as_referrer(), subject


def _open(attachment: Attachment) -> BinaryIO:
    return _open_file(attachment.path)


def _open_file(path: Path) -> BinaryIO:
    return fsutil.open_input(path, "the file to attach", max_size=limits.DISK_LAYER_MAX)


def _recognised(path: Path) -> kinds.Recognised | None:
    with _open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        return kinds.recognise(os.pread(file.fileno(), size, 0)) if size <= kinds.RECOGNISED_MAX else None


def remote_manifest(client: RegistryClient, reference: Reference) -> ImageManifest | ImageIndex:
    """The manifest or index of an artifact in a registry.

    Raises:
        ReferenceNotFound: the registry has none of that name.
        RegistryError: and its kinds: as the registry met us; or it is neither an OCI manifest nor an index.
    """
    raw, _ = client.get_manifest(reference)
    # the registry's Content-Type is not asked: a manifest's type is in its own bytes
    return parse_manifest(raw, f"the manifest of {reference}")


def local_manifest(layout: Layout, text: str) -> ImageManifest | ImageIndex:
    """The manifest or index of an artifact in the local store.

    Raises:
        ReferenceNotFound: nothing of that name here.
    """
    known = lookup(layout, text)
    if known is None:
        raise ReferenceNotFound(
            f"there is no artifact {text[:120]!a} in the local store", hint="'ovm ls' lists what is there"
        )
    return layout.manifest(known[1])


# --- to and from a registry ------------------------------------------------------------------------------------------


def push_with_subject(
    layout: Layout, connect: Connect, text: str, subject_text: str, progress: Progress = NULL
) -> Descriptor:
    """Pushes what is called *text* here with another ``subject``, and lets the name stand for the result.

    The subject is a digest, or a reference of the same repository; it has to be there. It is part of the
    manifest, so what is pushed has another digest than what was here before.

    Raises:
        UsageError: the subject is in another repository, or the name is bound to a digest.
        ReferenceNotFound: nothing of that name here, or no such subject there.
        Unsupported, ManifestInvalid: it is no OVMS artifact.
        RegistryError: and its kinds: as the registry met us.
    """
    from ovms.oci import transfer

    reference = pushable(text)
    assert reference.registry is not None
    if reference.digest is not None:
        raise UsageError(
            f"{reference}: with another subject the artifact has another digest", hint="leave out what follows '@'"
        )
    where = _subject_reference(reference, subject_text)
    with layout.using():
        find(layout, text)  # raises where it is no OVMS artifact
        old = local_manifest(layout, text)
        client = connect(reference.registry)
        manifest = with_subject(old, remote_manifest(client, where).descriptor())
        made_from = origins.Source(old.digest, ram=True)
        origins.add(layout, manifest.digest, origins.Origin(made=True, sources=(made_from,)))
        layout.add_bytes(manifest.raw)
        transfer.push(layout, client, reference, manifest.digest, progress)
        layout.set_name(str(reference), manifest.descriptor())
        return manifest.descriptor()


def _subject_reference(reference: Reference, text: str) -> Reference:
    if is_digest(text):
        return replace(reference, tag=None, digest=Digest(text))
    subject = Reference.parse(text)
    if subject.name != reference.name:
        raise UsageError(
            f"the subject {subject} is not in {reference.name}, and a registry looks for referrers nowhere else",
            hint=f"push it there first, or name it {reference.name}:TAG",
        )
    return subject


def push_referrers(
    layout: Layout,
    client: RegistryClient,
    repository: str,
    digest: Digest,
    progress: Progress = NULL,
    *,
    wanted: Callable[[Descriptor], bool] = lambda _: True,
) -> list[Descriptor]:
    """Pushes the referrers of *digest* that have no name of their own here, theirs, and so on. Returns what they are.

    Those with a name (snapshots) are pushed by it, and by nothing else. *wanted* says which of the others, and theirs.

    Raises:
        BlobNotFound: the store does not have all of one.
        RegistryError: and its kinds: as the registry met us.
    """
    pushed: dict[Digest, Descriptor] = {}
    with layout.using():
        named = {entry.descriptor.digest for entry in layout.entries() if entry.name}
        listed = local_lister(layout)
        pending = _roots(layout, digest)
        while pending:
            for found in listed(pending.pop(), None).descriptors:
                if found.digest not in pushed and found.digest not in named and wanted(found):
                    _push_referrer(layout, client, repository, found.digest, progress)
                    pushed[found.digest] = found
                    pending.append(found.digest)
    return list(pushed.values())


def _push_referrer(layout: Layout, client: RegistryClient, repository: str, digest: Digest, progress: Progress) -> None:
    from ovms.oci import cosign, transfer

    image = layout.manifest(digest)
    if isinstance(image, ImageManifest) and cosign.is_classic(image):
        # under its tag again, where others look for it
        assert image.subject is not None
        for layer in image.layers:
            data = layout.read(layer.digest, "a signature", max_size=limits.MANIFEST_MAX)
            cosign.add_classic(client, repository, image.subject.digest, layer, data)
        return
    transfer.push(layout, client, Reference(client.host, repository, None, digest), digest, progress)


def pull_referrers(
    layout: Layout, client: RegistryClient, repository: str, digest: Digest, progress: Progress = NULL
) -> tuple[list[Descriptor], int]:
    """Fetches the referrers of *digest*, theirs, and so on, as they are kept here: without a name.

    Snapshots, and whatever else is an OVMS artifact, are left where they are: those are pulled by name.

    Returns the descriptors of what is here now, and how many were left out: indexes, what is no manifest that names
    this subject, what is damaged or incomplete in the registry, and what is beyond :data:`PULLED_BYTES_MAX`.

    Raises:
        DiskFull: said before the blobs of a referrer are fetched.
        RegistryError: and its kinds: as the registry met us.
    """
    from ovms.oci import transfer

    with layout.using():
        nodes, complete = tree(_roots(layout, digest), lister(client, repository))
        left_out, size = int(not complete), 0
        fetched: dict[Digest, ImageManifest] = {}
        pending = nodes
        try:
            while pending:
                node = pending.pop()
                if node.repeated or node.descriptor.artifact_type == mediatypes.MANIFEST:
                    continue
                image = _referrer(client, repository, node.descriptor, node.subject)
                total = 0 if image is None else sum(blob.size for blob in image.blobs)
                if image is None or size + total > PULLED_BYTES_MAX:
                    left_out += 1
                    continue
                try:
                    transfer.fetch(layout, client, repository, image, progress)
                except (BlobNotFound, IntegrityError):
                    left_out += 1  # a stranger's damaged artifact must not keep the others away
                    continue
                size += total
                fetched[image.digest] = image
                pending += node.children
        finally:
            # what came is kept; the list of the store is written once, for it may be a long one
            layout.add_nameless(*(image.descriptor() for image in fetched.values()))
        return [image.as_referrer() for image in fetched.values()], left_out


def _roots(layout: Layout, digest: Digest) -> list[Digest]:
    # of an index, the manifests that are here
    return [root for root in roots(layout.manifest(digest)) if layout.size(root) is not None]


def _referrer(client: RegistryClient, repository: str, descriptor: Descriptor, subject: Digest) -> ImageManifest | None:
    # What a list says is not what is there: something without this subject would stay in the store for ever.
    if descriptor.media_type != mediatypes.OCI_MANIFEST:
        return None
    try:
        raw, _ = client.get_manifest(Reference(client.host, repository, None, descriptor.digest))
        image = parse_manifest(raw, f"the referrer {descriptor.digest}")
    except (ReferenceNotFound, RegistryProtocol, JsonInvalid, IntegrityError):
        return None
    fits = isinstance(image, ImageManifest) and image.subject is not None and image.subject.digest == subject
    return image if fits and isinstance(image, ImageManifest) else None
