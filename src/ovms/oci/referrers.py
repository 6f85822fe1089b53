"""Who refers to an artifact: signatures, SBOMs, snapshots, whatever names it as its ``subject``.

A registry with the referrers API keeps the list itself. For any other, whoever pushes a manifest with a ``subject`` keeps
an image index under the tag ``sha256-<hex of the subject>`` (the *fallback tag*). Which of the two a registry's
other clients used is not known, so both are read and merged.

**What can't be guaranteed.** The distribution specification (1.1) has no way to replace a tag only if nobody else did
meanwhile: conditional requests are a proposal there, and neither docker-registry 2.8 nor distribution 3 looks at
``If-Match``, although both send an ``ETag``. Two clients that read the fallback index at the same time each write it
without the other's entry. So :func:`add` looks again after a while that is longer than it took to read and write, and
adds its entry once more where it is gone, until it has stayed. All entries stay when all writers do so. An entry
is lost when another client writes without looking again, or writes after a pause (suspended, or behind a
proxy that repeats a request) longer than ours: its manifest is still there, and pushing it again lists it again.

docker-registry 2.8 on a file system answers with 404 or 400 for what another client is just writing; such an answer is not
believed at once.

Sources: the OCI distribution specification 1.1, "Listing Referrers" and "Pushing Manifests with Subject".
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from ovms.errors import IntegrityError, JsonInvalid, OvmsError, ReferenceNotFound, RegistryProtocol
from ovms.lazy import dataclass, field, replace
from ovms.oci import workers
from ovms.oci.descriptor import Descriptor, ImageIndex, ImageManifest, parse_manifest
from ovms.oci.http import Broken, Refused
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import Busy, RegistryClient
from ovms.spec import limits, mediatypes, strictjson
from ovms.spec.digest import Digest, hex_of

#: Referrers of one artifact that are listed.
REFERRERS_MAX: Final = 1000
#: Pages of the API's answer that are read, and bytes of all of them.
PAGES_MAX: Final = 64
PAGES_BYTES_MAX: Final = 32 * limits.MIB
#: Manifests that are read because a list does not say of which type they are.
LOOKUPS_MAX: Final = 64
#: Levels of a tree, and artifacts in all of it.
DEPTH_MAX: Final = 8
TREE_MAX: Final = 1000
#: Lists that are asked for at once.
_AT_ONCE: Final = 8
#: Manifests of an index whose referrers are looked for.
ROOTS_MAX: Final = 32

#: What may stand under a fallback tag, and must be seen there so that it is not written over.
_ANYTHING: Final = ", ".join(
    (
        mediatypes.OCI_INDEX,
        mediatypes.OCI_MANIFEST,
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "*/*",
    )
)
#: Looks at a fallback index that others write to, too.
_TRIES: Final = 60
#: Seconds after which no further look begins.
_TIME_MAX: Final = 120.0
#: Seconds before an entry that was written is looked for: at least so many, and so many times what reading and writing
#: took.
_SETTLE: Final = 0.2
_SETTLE_TIMES: Final = 4
_SETTLE_MAX: Final = 5.0
#: Looks in a row that have to find the entry where others were seen to write.
_CONFIRMATIONS: Final = 3


@dataclass(frozen=True)
class Listing:
    """Descriptors of referrers, each digest once; not *complete* where a limit has cut it off."""

    descriptors: tuple[Descriptor, ...]
    complete: bool = True


#: Lists the referrers of a digest; of one artifact type, or of any (None).
Lister = Callable[[Digest, "str | None"], Listing]


# --- reading ---------------------------------------------------------------------------------------------------------


def fetch(client: RegistryClient, repository: str, digest: Digest, artifact_type: str | None = None) -> Listing:
    """What names the manifest *digest* as its subject in a registry: by the API, and by the fallback tag.

    Entries that are malformed, or have a digest of another algorithm, are left out. *artifact_type* is asked
    for, and looked at here too: not every registry filters, and none has to.

    Raises:
        RegistryProtocol: there is no API, and the fallback tag holds no index; or the registry's pages lead elsewhere.
        RegistryError: and its other kinds: as the registry met us.
    """
    found = _Found(client, repository, artifact_type)
    supported = _read_api(client, repository, digest, found)
    try:
        index = _fallback(client, repository, digest)
    except RegistryProtocol:
        if not supported:
            raise
    else:
        if index is not None:
            found.take(index["manifests"])
    return Listing(tuple(found.descriptors.values()), found.complete)


def lister(client: RegistryClient, repository: str) -> Lister:
    """:func:`fetch` for one repository."""
    return lambda digest, artifact_type: fetch(client, repository, digest, artifact_type)


class _Found:
    def __init__(self, client: RegistryClient, repository: str, artifact_type: str | None) -> None:
        self._client = client
        self._repository = repository
        self.wanted = artifact_type
        self._lookups = 0
        self._seen: set[Digest] = set()
        self.descriptors: dict[Digest, Descriptor] = {}
        self.complete = True

    def take(self, entries: list[Any]) -> None:
        for entry in entries:
            try:
                descriptor = Descriptor.from_json(entry, "a referrer")
            except RegistryProtocol:
                continue
            if descriptor.digest in self._seen:
                continue
            self._seen.add(descriptor.digest)
            # The empty config's type is what a careless registry says for want of an artifactType.
            if descriptor.artifact_type in (None, "", mediatypes.OCI_EMPTY):
                descriptor = self._looked_up(descriptor)
            if self.wanted not in (None, descriptor.artifact_type):
                continue
            if len(self.descriptors) == REFERRERS_MAX:
                self.complete = False
                return
            self.descriptors[descriptor.digest] = descriptor

    def _looked_up(self, descriptor: Descriptor) -> Descriptor:
        if self._lookups == LOOKUPS_MAX:
            self.complete = self.complete and self.wanted is None
            return descriptor
        self._lookups += 1
        reference = Reference(self._client.host, self._repository, None, descriptor.digest)
        try:
            entry = parse_manifest(self._client.get_manifest(reference)[0], "a referrer").as_referrer()
        except (ReferenceNotFound, RegistryProtocol, JsonInvalid, IntegrityError):
            return descriptor
        return replace(
            descriptor,
            artifact_type=entry.artifact_type,
            annotations=descriptor.annotations or entry.annotations,
        )


def _read_api(client: RegistryClient, repository: str, digest: Digest, found: _Found) -> bool:
    """Whether the registry has the API."""
    page = client.referrers_page(repository, digest, artifact_type=found.wanted)
    if page is None:
        return False
    try:
        index = _index(page.raw, f"the referrers of {digest}")
    except RegistryProtocol:
        return False  # a page for people, say: some answer 200 to everything
    seen: set[str] = set()
    size = len(page.raw)
    while True:
        found.take(index["manifests"])
        if page.next is None:
            return True
        if page.next in seen or len(seen) + 1 == PAGES_MAX or size > PAGES_BYTES_MAX or not found.complete:
            found.complete = False
            return True
        seen.add(page.next)
        following = client.referrers_page(repository, digest, url=page.next)
        if following is None:
            raise RegistryProtocol(f"{client.host} breaks its list of the referrers of {digest} off", hint="try again")
        page = following
        size += len(page.raw)
        index = _index(page.raw, f"the referrers of {digest}")


def _fallback(client: RegistryClient, repository: str, digest: Digest) -> dict[str, Any] | None:
    """The index under the fallback tag, None where there is no such tag."""
    tag = fallback_tag(digest)
    try:
        raw, _ = client.get_manifest(Reference(client.host, repository, tag), accept=_ANYTHING)
    except ReferenceNotFound:
        return None
    return _index(raw, f"the tag {client.host}/{repository}:{tag}")


def fallback_tag(digest: Digest) -> str:
    """The tag that holds the referrers of *digest* in a registry without the API."""
    return f"sha256-{hex_of(digest)}"


def _index(raw: bytes, what: str) -> dict[str, Any]:
    # Not parse_manifest: one malformed entry of a stranger's must not hide the others.
    try:
        value = strictjson.parse(raw, what, max_size=limits.OCI_MANIFEST_MAX)
    except JsonInvalid:
        value = None
    if (
        not isinstance(value, dict)
        or value.get("mediaType", mediatypes.OCI_INDEX) != mediatypes.OCI_INDEX
        or not isinstance(value.get("manifests"), list)
    ):
        raise RegistryProtocol(
            f"{what} holds no OCI image index, so there is no list of referrers",
            hint="look at what is there ('skopeo inspect --raw'); if nobody needs it, delete the tag and push again",
        )
    return value


# --- writing ---------------------------------------------------------------------------------------------------------


def add(client: RegistryClient, repository: str, entry: Descriptor, subject: Digest) -> None:
    """Lists *entry* (see ``as_referrer``) under the fallback tag of *subject*, for a registry without the API.

    What else stands in the index stays as it is, entries that we can't read among it. See this module's docstring for
    what other writers can do meanwhile.

    Raises:
        RegistryProtocol: the tag holds no index, which is left as it is; or the index is full; or others write
            so often that the entry does not stay.
        RegistryError: and its other kinds: as the registry met us.
    """
    state = _Adding(client, repository, entry, subject)
    patience = client.patience()
    end = time.monotonic() + _TIME_MAX
    for number in range(_TRIES):
        if number and time.monotonic() > end:
            break
        try:
            if state.step():
                return
            patience.progressed()
        except (Broken, Refused, Busy) as exc:
            # Never the same bytes again, as for any other upload: they would take away what others wrote meanwhile.
            patience.bear(exc)
    if state.confirmed:
        return  # there when last looked for, though others still write
    raise RegistryProtocol(
        f"{client.host} does not keep {entry.digest} among the referrers of {subject}: other clients write them, too",
        hint="the artifact itself was pushed; push it again later to have it listed",
    )


class _Adding:
    """One entry on its way into an index that others write to."""

    def __init__(self, client: RegistryClient, repository: str, entry: Descriptor, subject: Digest) -> None:
        self._client = client
        self._repository = repository
        self._entry = entry
        self._subject = subject
        self._written: list[Any] | None = None
        self._disturbed = False
        self._there = False
        self.confirmed = 0
        self._settle = _SETTLE

    def step(self) -> bool:
        """Reads the index, and writes it where the entry is not in it. Whether the entry is there to stay."""
        began = time.monotonic()
        index = _fallback(self._client, self._repository, self._subject)
        if index is None and self._there:
            # docker-registry says so, too, in the moment in which another client writes the tag
            self._there = False
            time.sleep(self._settle)
            return False
        self._there = index is not None
        entries = [] if index is None else index["manifests"]
        if self._written not in (None, entries):
            self._disturbed = True
        if any(isinstance(e, dict) and e.get("digest") == self._entry.digest for e in entries):
            self.confirmed += 1
            if self._written is None or self.confirmed >= (_CONFIRMATIONS if self._disturbed else 1):
                return True
        else:
            self.confirmed = 0
            # Noted before the attempt: one that fails may have been carried out all the same.
            self._written = [*entries, self._entry.to_json()]
            self._write(index, self._written)
            took = time.monotonic() - began
            self._settle = min(max(_SETTLE, _SETTLE_TIMES * took), _SETTLE_MAX)
        # Nothing sleeps between reading and writing. Each client waits another while, so that few meet again.
        time.sleep(self._settle * random.uniform(1, 2))  # noqa: S311 - no secret
        return False

    def _write(self, index: dict[str, Any] | None, entries: list[Any]) -> None:
        value = index or {"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX}
        raw = strictjson.canonical({**value, "manifests": entries})
        if len(raw) > limits.OCI_MANIFEST_MAX:
            raise RegistryProtocol(
                f"the list of the referrers of {self._subject} on {self._client.host} is full: it would have {len(raw)} "
                f"bytes of {limits.OCI_MANIFEST_MAX}",
                hint="delete referrers that nobody needs",
            )
        tag = fallback_tag(self._subject)
        self._client.put_manifest(self._repository, tag, raw, mediatypes.OCI_INDEX, retry=False)


# --- in the local store ----------------------------------------------------------------------------------------------


def local_lister(layout: Layout) -> Lister:
    """Lists referrers among the artifacts of the local store, named or not, as they stand now."""
    known: dict[Digest, dict[Digest, Descriptor]] = {}
    for entry in layout.entries():
        try:
            manifest = layout.manifest(entry.descriptor.digest)
        except OvmsError:
            continue  # a damaged artifact must not hide the others
        if manifest.subject is not None:
            known.setdefault(manifest.subject.digest, {})[manifest.digest] = manifest.as_referrer()

    def listed(digest: Digest, artifact_type: str | None) -> Listing:
        found = known.get(digest, {}).values()
        return Listing(tuple(d for d in found if artifact_type in (None, d.artifact_type)))

    return listed


# --- as a tree -------------------------------------------------------------------------------------------------------


@dataclass()
class Node:
    """A referrer of *subject*, and its own referrers. *repeated*: it stands in the tree already, with its referrers."""

    descriptor: Descriptor
    subject: Digest
    children: list[Node] = field(default_factory=list)
    repeated: bool = False


def roots(manifest: ImageManifest | ImageIndex) -> list[Digest]:
    """Whose referrers belong to *manifest*: its own, and those of the manifests of an index.

    A VM runs one of an index's manifests, and a snapshot of it names that one.
    """
    inner = manifest.manifests if isinstance(manifest, ImageIndex) else ()
    digests = [manifest.digest, *(d.digest for d in inner if d.media_type == mediatypes.OCI_MANIFEST)]
    return list(dict.fromkeys(digests))[:ROOTS_MAX]


def _listings(
    level: list[tuple[Digest, list[Node]]], listed: Lister, artifact_type: str | None
) -> Iterator[tuple[Digest, list[Node], Listing]]:
    # Some at a time, asked for at once: a round trip for each of a thousand signatures takes minutes. Not all of them: a limit may
    # cut the rest off.
    for first in range(0, len(level), _AT_ONCE):
        batch = level[first : first + _AT_ONCE]
        answers: dict[int, Listing] = {}

        def job(number: int, subject: Digest, answers: dict[int, Listing] = answers) -> workers.Job:
            def ask(_stopped: Callable[[], bool]) -> None:
                answers[number] = listed(subject, artifact_type)

            return ask

        workers.run_all([job(n, subject) for n, (subject, _) in enumerate(batch)], parallel=_AT_ONCE)
        for n, (subject, nodes) in enumerate(batch):
            yield subject, nodes, answers[n]


def tree(
    subjects: Sequence[Digest], listed: Lister, *, artifact_type: str | None = None, depth: int = DEPTH_MAX
) -> tuple[list[Node], bool]:
    """The referrers of *subjects*, theirs, and so on for *depth* levels; and whether nothing was cut off by a limit.

    *artifact_type* chooses among the referrers of *subjects* alone: the signature of an SBOM is found below the SBOM.
    Level by level, so that what a limit cuts off is what is furthest away.
    """
    tops: list[Node] = []
    complete = True
    seen = set(subjects)
    count = 0
    level: list[tuple[Digest, list[Node]]] = [(subject, tops) for subject in subjects]
    for number in range(min(depth, DEPTH_MAX)):
        deeper: list[tuple[Digest, list[Node]]] = []
        for subject, nodes, listing in _listings(level, listed, None if number else artifact_type):
            complete = complete and listing.complete
            for descriptor in listing.descriptors:
                if count == TREE_MAX:
                    return tops, False
                count += 1
                node = Node(descriptor, subject, repeated=descriptor.digest in seen)
                nodes.append(node)
                if not node.repeated:
                    seen.add(descriptor.digest)
                    deeper.append((descriptor.digest, node.children))
        level = deeper
    return tops, complete
