"""What a file is, by what it says; and what a list says of a referrer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.artifact import kinds
from ovms.artifact.kinds import Kind, recognise
from ovms.oci import cosign
from ovms.oci.descriptor import Descriptor
from ovms.spec import mediatypes
from ovms.spec.digest import of_bytes

SUBJECT = of_bytes(b"artifact")
SLSA = "https://slsa.dev/provenance/v1"


def statement(predicate: Any = SLSA, **changes: Any) -> bytes:
    subject = [{"name": "x", "digest": {"sha256": SUBJECT[7:]}}]
    document = {"_type": mediatypes.STATEMENT, "subject": subject, "predicateType": predicate, "predicate": {}}
    return json.dumps({**document, **changes}).encode()


@pytest.mark.parametrize(
    ("data", "kind", "media_type"),
    [
        (b'{"spdxVersion": "SPDX-2.3"}', Kind.SPDX, "application/spdx+json"),
        (b'{"@context": "https://spdx.org/rdf/3.0.1/spdx-context.jsonld"}', Kind.SPDX, "application/spdx+json"),
        (b"# made by hand\n\nSPDXVersion: SPDX-2.3\n", Kind.SPDX, "text/spdx"),
        (b'{"bomFormat": "CycloneDX", "specVersion": "1.6"}', Kind.CYCLONEDX, "application/vnd.cyclonedx+json"),
        (
            b'<?xml version="1.0"?>\n<!-- x -->\n<bom serialNumber="1" xmlns="http://cyclonedx.org/schema/bom/1.5">',
            Kind.CYCLONEDX,
            "application/vnd.cyclonedx+xml",
        ),
        (statement(), Kind.PROVENANCE, "application/vnd.in-toto+json"),
        (statement(_type="https://in-toto.io/Statement/v0.1"), Kind.PROVENANCE, "application/vnd.in-toto+json"),
        (statement("https://spdx.dev/Document/v2.3"), Kind.SPDX, "application/vnd.in-toto+json"),
        (statement("https://cyclonedx.org/bom"), Kind.CYCLONEDX, "application/vnd.in-toto+json"),
        (statement("https://example.org/test"), Kind.IN_TOTO, "application/vnd.in-toto+json"),
        (b'{"payload": "", "payloadType": "x", "signatures": []}', Kind.DSSE, mediatypes.DSSE),
    ],
)
def test_what_is_known(data: bytes, kind: Kind, media_type: str) -> None:
    found = recognise(data)
    assert found is not None
    assert (found.kind, found.media_type) == (kind, media_type)
    # a list that has what 'ovm attach' writes says the same of it
    notes = {} if found.predicate is None else {mediatypes.PREDICATE_ANNOTATION: found.predicate}
    listed = Descriptor("m", SUBJECT, 1, notes, artifact_type=found.media_type)
    assert kinds.of_referrer(listed) is kind


def test_what_a_statement_is_about() -> None:
    found = recognise(statement(subject=[{"digest": {"sha256": SUBJECT[7:], "sha1": "x"}}, {"digest": "x"}, {}, 1]))
    assert found is not None
    assert (found.predicate, found.subjects) == (SLSA, frozenset({SUBJECT}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SPDX",
        b" " * 5000 + b"SPDXVersion: SPDX-2.3",
        b'{"spdxVersion": 23}',
        b'{"bomFormat": "cyclonedx"}',
        b'["bomFormat"]',
        b'{"bomFormat": "CycloneDX", "bomFormat": "CycloneDX"}',
        b'{"bomFormat": "CycloneDX"',
        b'{"bomFormat": "CycloneDX", "x": ' + b"[" * 128 + b"]" * 128 + b"}",
        b"<bom xmlns='http://example.org/bom/1.5'>",
        b"<html><p>&lt;bom</p></html>",
        statement(""),
        statement("x" * 256),
        statement("https://x\x1b[31m"),
        statement(["a"]),
        statement(_type=[mediatypes.STATEMENT]),
        b'{"payload": "", "payloadType": "x"}',
    ],
    ids=range(17),
)
def test_what_is_not_known(data: bytes) -> None:
    assert recognise(data) is None


def test_a_large_file_is_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    data = statement()
    monkeypatch.setattr(kinds, "RECOGNISED_MAX", len(data))
    assert recognise(data) is not None
    assert recognise(data + b" ") is None


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_nothing_makes_it_fail(data: bytes) -> None:
    recognise(data)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_nothing_in_a_statement_makes_it_fail(value: Any) -> None:
    for key in ("_type", "subject", "predicateType"):
        recognise(
            statement(
                **{key: value} if key != "predicateType" else {}, predicate=value if key == "predicateType" else SLSA
            )
        )


@pytest.mark.parametrize(
    ("artifact_type", "notes", "kind"),
    [
        (cosign.BUNDLE_TYPE, {}, Kind.SIGNATURE),
        (cosign.BUNDLE_TYPE, {cosign.BUNDLE_PREDICATE: cosign.SIGN_PREDICATE}, Kind.SIGNATURE),
        (cosign.BUNDLE_TYPE, {cosign.BUNDLE_PREDICATE: SLSA}, Kind.PROVENANCE),
        (cosign.SIGNATURE_TYPE, {}, Kind.SIGNATURE),
        (mediatypes.MANIFEST, {}, Kind.ARTIFACT),
        (mediatypes.IN_TOTO, {}, Kind.IN_TOTO),
        ("text/plain", {}, None),
        (None, {}, None),
    ],
)
def test_what_a_list_says(artifact_type: str | None, notes: dict[str, str], kind: Kind | None) -> None:
    assert kinds.of_referrer(Descriptor("m", SUBJECT, 1, notes, artifact_type=artifact_type)) is kind
