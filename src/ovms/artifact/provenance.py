"""How an artifact was made: an in-toto statement with SLSA's provenance, a referrer of the artifact in the local store.

It names what went in by digest, and files by their last name alone: no directory of whoever built it, nothing of the environment.
It is no part of the artifact, whose digest is the same with it and without. It is not signed: whoever holds the artifact could
have written it.

Sources: in-toto Statement v1 and its resource descriptors, SLSA provenance v1, the purl type ``oci``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

from ovms import __version__
from ovms.artifact.model import Artifact
from ovms.errors import OvmsError, UsageError
from ovms.lazy import dataclass
from ovms.oci.descriptor import EMPTY_CONFIG, Descriptor, ImageManifest, build_file_manifest, created_now, rfc3339
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.spec import limits, mediatypes, strictjson
from ovms.spec.digest import Digest, hex_of

PREDICATE: Final = "https://slsa.dev/provenance/v1"
BUILDER: Final = "urn:ovms:builder:ovm"
#: The file's name, for tools that write it to one.
TITLE: Final = "provenance.json"
#: The last moment of the year 9999, in seconds since 1970.
_EPOCH_MAX: Final = 253402300799


class Work(StrEnum):
    """What made an artifact; ``urn:ovms:<work>:v1`` is SLSA's ``buildType``."""

    BUILD = "build"
    COMMIT = "commit"
    SNAPSHOT = "snapshot"


@dataclass(frozen=True)
class Material:
    """What went in: its digest, and what it is called (its last name, where it is a file)."""

    name: str
    digest: Digest
    media_type: str
    uri: str | None = None

    @classmethod
    def of_artifact(cls, artifact: Artifact, reference: Reference | None = None) -> Material:
        """A whole artifact; *reference* is where it was found."""
        uri = None if reference is None or reference.registry is None else purl(reference, artifact.digest)
        return cls(artifact.manifest.name, artifact.digest, mediatypes.OCI_MANIFEST, uri)

    def to_json(self) -> dict[str, Any]:
        """A resource descriptor of in-toto."""
        uri = {} if self.uri is None else {"uri": self.uri}
        digest = {"sha256": hex_of(self.digest)}
        # a file's name that is not UTF-8 has halves of surrogate pairs in Python
        name = self.name.encode("utf-8", "replace").decode("utf-8")
        return {"name": name, **uri, "digest": digest, "mediaType": self.media_type}


@dataclass(frozen=True)
class Times:
    """When the work began (RFC 3339); or the moment that stands for all times (seconds since 1970), and no statement has any."""

    began: str | None
    epoch: int | None = None

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Times:
        """From now on; or, with ``SOURCE_DATE_EPOCH``, of that moment alone.

        Raises:
            UsageError: the variable holds no number of seconds.
        """
        text = environ.get("SOURCE_DATE_EPOCH", "")
        if not text:
            return cls(created_now())
        if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= _EPOCH_MAX):
            raise UsageError(
                f"SOURCE_DATE_EPOCH is {text[:40]!a}, which is no number of seconds since 1970",
                hint="'git log -1 --format=%ct' gives that of a commit; without the variable it is the present time",
            )
        return cls(None, int(text))

    @property
    def created(self) -> str:
        """When the statement was made."""
        return created_now() if self.epoch is None else rfc3339(self.epoch)


def purl(reference: Reference, digest: Digest) -> str:
    """The package URL of an artifact in a registry."""
    from urllib.parse import quote, urlencode

    place = {"repository_url": reference.name, **({} if reference.tag is None else {"tag": reference.tag})}
    name = reference.repository.rpartition("/")[2]
    return f"pkg:oci/{quote(name, safe='')}@{quote(digest, safe='')}?{urlencode(place, safe='/:')}"


def add(layout: Layout, artifact: Artifact, work: Work, materials: Sequence[Material], times: Times) -> Descriptor:
    """Keeps the provenance of *artifact* in the store, without a name. The caller is :meth:`Layout.using` it.

    What was made of the same once more keeps the statement that it has: another would tell another time, and nothing else.

    Returns the descriptor of the referrer.
    """
    document = _statement(artifact, work, materials, times)
    subject = artifact.image.descriptor()
    known = _known(layout, subject.digest, document)
    if known is not None:
        return known.as_referrer()
    data = strictjson.canonical(document)
    notes = {mediatypes.PREDICATE_ANNOTATION: PREDICATE}
    image = build_file_manifest(
        mediatypes.IN_TOTO,
        Descriptor.of(mediatypes.IN_TOTO, data, {mediatypes.TITLE_ANNOTATION: TITLE, **notes}),
        subject,
        {mediatypes.CREATED_ANNOTATION: times.created, **notes},
    )
    for blob in (data, EMPTY_CONFIG, image.raw):
        layout.add_bytes(blob)
    layout.add_nameless(image.descriptor())
    return image.as_referrer()


def _statement(artifact: Artifact, work: Work, materials: Sequence[Material], times: Times) -> dict[str, Any]:
    moments = {} if times.began is None else {"metadata": {"startedOn": times.began, "finishedOn": times.created}}
    return {
        "_type": mediatypes.STATEMENT,
        "subject": [{"name": artifact.manifest.name, "digest": {"sha256": hex_of(artifact.digest)}}],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": f"urn:ovms:{work}:v1",
                "externalParameters": {"source": materials[0].to_json()},
                "resolvedDependencies": [material.to_json() for material in materials],
            },
            "runDetails": {"builder": {"id": BUILDER, "version": {"ovms": __version__}}, **moments},
        },
    }


def _known(layout: Layout, subject: Digest, document: dict[str, Any]) -> ImageManifest | None:
    for entry in layout.entries():
        if entry.descriptor.artifact_type != mediatypes.IN_TOTO or entry.name:
            continue
        try:
            image = layout.manifest(entry.descriptor.digest)
            if not isinstance(image, ImageManifest) or image.subject is None or image.subject.digest != subject:
                continue
            data = layout.read(image.layers[0].digest, "a statement", max_size=limits.MANIFEST_MAX)
            found = strictjson.parse(data, "a statement", max_size=limits.MANIFEST_MAX)
        except (OvmsError, IndexError):
            continue  # somebody else's, or damaged
        if _timeless(found) == _timeless(document):
            return image
    return None


def _timeless(document: Any) -> Any:
    try:
        predicate = document["predicate"]
        details = {key: value for key, value in predicate["runDetails"].items() if key != "metadata"}
        return {**document, "predicate": {**predicate, "runDetails": details}}
    except (AttributeError, KeyError, TypeError):
        return document
