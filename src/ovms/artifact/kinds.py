"""What is attached to an artifact: told from a file's content, and from what a list of referrers says.

Nothing is checked but what it claims to be. Sources: SPDX 2.3 and 3.0, CycloneDX 1.x, in-toto Statement v0.1 and v1, DSSE v1,
Sigstore's ``bundle.proto``; the media types are those that each of them has registered or uses.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

from ovms.errors import JsonInvalid
from ovms.lazy import dataclass, regex
from ovms.oci import cosign
from ovms.oci.descriptor import Descriptor
from ovms.spec import limits, mediatypes, strictjson
from ovms.spec.digest import Digest, is_digest

#: Bytes of a file that is looked into; what is larger needs a media type from whoever attaches it.
RECOGNISED_MAX: Final = 32 * limits.MIB
#: Levels of its JSON: components of an SBOM hold components.
_DEPTH_MAX: Final = 128
#: Bytes of a text in which the first thing has to stand that tells what it is.
_HEAD: Final = 4096
_SPDX_TEXT: Final = regex(rb"(?:\xef\xbb\xbf)?(?:#[^\n]*\n|\s)*SPDXVersion:[ \t]*SPDX-[0-9]")
_CYCLONEDX_XML: Final = regex(rb"<bom\s[^>]*xmlns(?::[\w.-]+)?=[\"']http://cyclonedx\.org/schema/bom/1\.[0-9]")


class Kind(StrEnum):
    """What a referrer is to people, and to ``--type``."""

    SPDX = "spdx"
    CYCLONEDX = "cyclonedx"
    PROVENANCE = "provenance"
    IN_TOTO = "in-toto"
    DSSE = "dsse"
    SIGNATURE = "signature"
    ARTIFACT = "artifact"

    @property
    def text(self) -> str:
        """In words."""
        return _TEXTS[self]


_TEXTS: Final = {
    Kind.SPDX: "SBOM (SPDX)",
    Kind.CYCLONEDX: "SBOM (CycloneDX)",
    Kind.PROVENANCE: "provenance",
    Kind.IN_TOTO: "in-toto statement",
    Kind.DSSE: "signed statement",
    Kind.SIGNATURE: "signature",
    Kind.ARTIFACT: "OVMS artifact",
}
#: What can be attached: a signature is made by signing.
ATTACHED: Final = (Kind.SPDX, Kind.CYCLONEDX, Kind.PROVENANCE, Kind.IN_TOTO, Kind.DSSE)
_BY_TYPE: Final = {
    mediatypes.SPDX: Kind.SPDX,
    mediatypes.SPDX_TEXT: Kind.SPDX,
    mediatypes.CYCLONEDX: Kind.CYCLONEDX,
    mediatypes.CYCLONEDX_XML: Kind.CYCLONEDX,
    mediatypes.DSSE: Kind.DSSE,
    cosign.SIGNATURE_TYPE: Kind.SIGNATURE,
    mediatypes.MANIFEST: Kind.ARTIFACT,
}
#: How the types of predicates begin, whose version follows.
_BY_PREDICATE: Final = (
    ("https://slsa.dev/provenance/", Kind.PROVENANCE),
    ("https://spdx.dev/Document", Kind.SPDX),
    ("https://cyclonedx.org/bom", Kind.CYCLONEDX),
    (cosign.SIGN_PREDICATE, Kind.SIGNATURE),
)


@dataclass(frozen=True)
class Recognised:
    """What a file is. Of an in-toto statement: the type of its predicate, and the SHA-256 digests that it is about."""

    kind: Kind
    media_type: str
    predicate: str | None = None
    subjects: frozenset[Digest] = frozenset()


def of_referrer(descriptor: Descriptor) -> Kind | None:
    """What a list says of a referrer, None where that is nothing that we know. Whoever pushed it has written it there."""
    notes = descriptor.annotations
    if descriptor.artifact_type == cosign.BUNDLE_TYPE:
        # none without a predicate: other tools' bundles are signatures, as ours are
        return _of_predicate(notes.get(cosign.BUNDLE_PREDICATE, cosign.SIGN_PREDICATE))
    if descriptor.artifact_type == mediatypes.IN_TOTO:
        return _of_predicate(notes.get(mediatypes.PREDICATE_ANNOTATION, ""))
    return _BY_TYPE.get(descriptor.artifact_type or "")


def recognise(data: bytes) -> Recognised | None:
    """What a file's content says that it is; None where that is nothing that we know (or longer than we look)."""
    if len(data) > RECOGNISED_MAX:
        return None
    if _SPDX_TEXT.match(data[:_HEAD]):
        return Recognised(Kind.SPDX, mediatypes.SPDX_TEXT)
    if data.lstrip()[:1] == b"<":
        found = _CYCLONEDX_XML.search(data[:_HEAD])
        return Recognised(Kind.CYCLONEDX, mediatypes.CYCLONEDX_XML) if found else None
    try:
        document = strictjson.parse(data, "the file", max_size=RECOGNISED_MAX, max_depth=_DEPTH_MAX)
    except JsonInvalid:
        return None
    return _of_document(document) if isinstance(document, dict) else None


def _of_document(document: dict[str, Any]) -> Recognised | None:
    context = document.get("@context")
    if str(document.get("spdxVersion")).startswith("SPDX-") or str(context).startswith("https://spdx.org/rdf/3."):
        return Recognised(Kind.SPDX, mediatypes.SPDX)
    if document.get("bomFormat") == "CycloneDX":
        return Recognised(Kind.CYCLONEDX, mediatypes.CYCLONEDX)
    if document.get("_type") in mediatypes.STATEMENTS:
        predicate = document.get("predicateType")
        if not isinstance(predicate, str) or not 0 < len(predicate) <= limits.NAME_MAX or not predicate.isprintable():
            return None
        return Recognised(_of_predicate(predicate), mediatypes.IN_TOTO, predicate, _subjects(document))
    if {"payload", "payloadType", "signatures"} <= document.keys():
        return Recognised(Kind.DSSE, mediatypes.DSSE)
    return None


def _of_predicate(predicate: str) -> Kind:
    return next((kind for start, kind in _BY_PREDICATE if predicate.startswith(start)), Kind.IN_TOTO)


def _subjects(document: dict[str, Any]) -> frozenset[Digest]:
    subjects = document.get("subject")
    digests = [one.get("digest") for one in subjects if isinstance(one, dict)] if isinstance(subjects, list) else []
    texts = [f"sha256:{digest.get('sha256')}" for digest in digests if isinstance(digest, dict)]
    return frozenset(Digest(text) for text in texts if is_digest(text))
