"""Referrers in the local store, and any referrers as a tree."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from ovms.artifact import attach
from ovms.artifact.attach import Attachment
from ovms.errors import FileProblem, InputError, ReferenceNotFound
from ovms.oci import collector, referrers
from ovms.oci.collector import Needs
from ovms.oci.descriptor import Descriptor, ImageManifest, build_manifest, parse_manifest
from ovms.oci.layout import Layout
from ovms.oci.referrers import Listing, Node, tree
from ovms.spec import mediatypes
from ovms.spec.digest import Digest, of_bytes

SBOM = "application/spdx+json"


def named(number: int) -> Digest:
    return of_bytes(str(number).encode())


def describe(number: int, artifact_type: str = "application/x") -> Descriptor:
    return Descriptor(mediatypes.OCI_MANIFEST, named(number), number, artifact_type=artifact_type)


def lister(edges: dict[int, list[int]], asked: list[str | None] | None = None) -> referrers.Lister:
    by_digest = {named(number): children for number, children in edges.items()}

    def listed(digest: Digest, artifact_type: str | None) -> Listing:
        if asked is not None:
            asked.append(artifact_type)
        return Listing(tuple(describe(number) for number in by_digest.get(digest, [])))

    return listed


def shape(nodes: list[Node]) -> list[object]:
    return [(node.descriptor.size, "again" if node.repeated else shape(node.children)) for node in nodes]


# --- trees ---------------------------------------------------------------------------------------------------------


def test_a_tree_has_referrers_of_referrers() -> None:
    nodes, complete = tree([named(1)], lister({1: [2, 3], 2: [4], 4: [5]}))
    assert (shape(nodes), complete) == ([(2, [(4, [(5, [])])]), (3, [])], True)


def test_what_was_shown_is_not_followed_again() -> None:
    # no honest registry can have a loop, whose digests would have to hold each other
    nodes, _ = tree([named(1)], lister({1: [2, 3, 1], 2: [3, 4], 4: [2]}))
    assert shape(nodes) == [(2, [(3, "again"), (4, [(2, "again")])]), (3, []), (1, "again")]


def test_a_type_chooses_among_the_first_level_alone() -> None:
    asked: list[str | None] = []
    tree([named(1)], lister({1: [2], 2: [3]}, asked), artifact_type=SBOM)
    assert asked == [SBOM, None, None]


@pytest.mark.parametrize(("depth", "levels"), [(1, 1), (3, 3), (8, 8), (100, 8)])
def test_a_tree_is_as_deep_as_it_may_be(depth: int, levels: int) -> None:
    nodes, _ = tree([named(1)], lister({n: [n + 1] for n in range(1, 50)}), depth=depth)
    found = 0
    while nodes:
        found += 1
        nodes = nodes[0].children
    assert found == levels


def test_a_tree_without_end_is_cut_off() -> None:
    asked: list[str | None] = []
    nodes, complete = tree([named(1)], lister({n: range(n * 40, n * 40 + 40) for n in range(1, 2000)}, asked))  # type: ignore[misc]
    assert not complete
    assert len(asked) <= 26 + 7  # a request each, and those that are asked with the last
    assert len(nodes) == 40


def test_lists_are_asked_for_at_once() -> None:
    plain = lister({1: [2, 3, 4, 5], 3: [6], 4: [7]})
    together = threading.Barrier(4)

    def listed(digest: Digest, artifact_type: str | None) -> Listing:
        if digest in (named(2), named(3), named(4), named(5)):
            together.wait(5)  # broken where one is asked after the other
        return plain(digest, artifact_type)

    nodes, complete = tree([named(1)], listed)
    assert (shape(nodes), complete) == ([(2, []), (3, [(6, [])]), (4, [(7, [])]), (5, [])], True)


def test_a_list_that_was_cut_off_makes_the_tree_incomplete() -> None:
    assert not tree([named(1)], lambda digest, artifact_type: Listing((), complete=False))[1]


def test_the_manifests_of_an_index_have_referrers_too() -> None:
    value = {
        "schemaVersion": 2,
        "mediaType": mediatypes.OCI_INDEX,
        "manifests": [describe(n).to_json() for n in (1, 1, *range(2, 100))],
    }
    index = parse_manifest(json.dumps(value).encode(), "x")
    found = referrers.roots(index)
    assert found[:3] == [index.digest, named(1), named(2)]
    assert len(found) == len(set(found)) == referrers.ROOTS_MAX
    nodes, _ = tree(found, lister({2: [200]}))
    assert [(node.subject, node.descriptor.size) for node in nodes] == [(named(2), 200)]


# --- attaching in the store ----------------------------------------------------------------------------------------


def add(layout: Layout, name: str, content: bytes = b"x", *, subject: Descriptor | None = None) -> ImageManifest:
    layout.add_bytes(content)
    image = build_manifest(
        artifact_type=mediatypes.MANIFEST,
        config=Descriptor.of(mediatypes.MANIFEST, content),
        layers=(),
        subject=subject,
    )
    layout.add_bytes(image.raw)
    layout.set_name(name, image.descriptor())
    return image


@pytest.fixture
def sbom(tmp_path: Path) -> Path:
    path = tmp_path / "web.spdx.json"
    path.write_bytes(b'{"spdxVersion": "SPDX-2.3"}')
    return path


def attach_to(layout: Layout, text: str, path: Path, **annotations: str) -> Descriptor:
    added, _ = attach.attach_local(layout, text, Attachment(path, SBOM, SBOM, annotations))
    return added


@pytest.mark.spec("OCI-19", "OCI-23")
def test_an_attached_file_is_an_artifact_with_a_subject(layout: Layout, sbom: Path) -> None:
    base = add(layout, "web:1")
    added = attach_to(layout, "web:1", sbom, note="x")
    value = json.loads(layout.path(added.digest).read_bytes())
    assert value["artifactType"] == SBOM
    assert value["config"]["mediaType"] == mediatypes.OCI_EMPTY
    assert layout.path(value["config"]["digest"]).read_bytes() == b"{}"
    (layer,) = value["layers"]
    assert (layer["mediaType"], layer["annotations"]) == (SBOM, {mediatypes.TITLE_ANNOTATION: "web.spdx.json"})
    assert layout.path(layer["digest"]).read_bytes() == sbom.read_bytes()
    assert value["subject"] == {"mediaType": mediatypes.OCI_MANIFEST, "digest": base.digest, "size": len(base.raw)}
    assert value["annotations"].keys() == {mediatypes.CREATED_ANNOTATION, "note"}
    # oras keeps referrers in a layout as entries without a name, too
    entry = json.loads((layout.root / "index.json").read_bytes())["manifests"][-1]
    assert (entry["digest"], entry["artifactType"]) == (added.digest, SBOM)
    assert "annotations" not in entry


def test_local_referrers_are_found_named_or_not(layout: Layout, sbom: Path) -> None:
    base = add(layout, "web:1")
    added = attach_to(layout, "web:1", sbom)
    snapshot = add(layout, "web:warm", b"snapshot", subject=base.descriptor())
    deeper = attach_to(layout, added.digest, sbom, about="the sbom")
    layout.path(add(layout, "broken:1", b"broken").digest).unlink()
    nodes, _ = tree([base.digest], referrers.local_lister(layout))
    assert [node.descriptor.digest for node in nodes] == [added.digest, snapshot.digest]
    assert [node.descriptor.digest for node in nodes[0].children] == [deeper.digest]
    assert nodes[0].children[0].descriptor.annotations["about"] == "the sbom"
    nodes, _ = tree([base.digest], referrers.local_lister(layout), artifact_type=SBOM)
    assert [node.descriptor.digest for node in nodes] == [added.digest]


def test_referrers_live_as_long_as_their_subject(layout: Layout, sbom: Path) -> None:
    base = add(layout, "web:1")
    other = add(layout, "other:1", b"other")
    added = attach_to(layout, "web:1", sbom)
    deeper = attach_to(layout, added.digest, sbom, about="the sbom")
    kept = attach_to(layout, "other:1", sbom)
    collector.collect(layout, Needs)
    assert layout.size(deeper.digest)
    layout.remove_name("web:1")
    collector.collect(layout, lambda: Needs(frozenset({base.digest})))  # an instance runs it
    assert layout.size(deeper.digest)
    collector.collect(layout, Needs)
    assert [e.descriptor.digest for e in layout.entries()] == [other.digest, kept.digest]
    assert layout.size(added.digest) is None
    assert layout.size(deeper.digest) is None
    assert layout.manifest(kept.digest).subject is not None


def test_a_nameless_entry_without_a_subject_stays(layout: Layout) -> None:
    image = add(layout, "a")
    layout.add_nameless(image.descriptor())
    layout.remove_name("a")
    collector.collect(layout, Needs)
    assert layout.size(image.digest)


def test_a_snapshot_does_not_go_with_its_base(layout: Layout) -> None:
    base = add(layout, "web:1")
    snapshot = add(layout, "web:warm", b"snapshot", subject=base.descriptor())
    layout.remove_name("web:1")
    collector.collect(layout, Needs)
    assert layout.size(base.digest) is None
    assert [e.descriptor.digest for e in layout.entries()] == [snapshot.digest]


def test_a_nameless_entry_is_listed_once_and_removed_alone(layout: Layout, sbom: Path) -> None:
    add(layout, "web:1")
    first, second = attach_to(layout, "web:1", sbom, n="1"), attach_to(layout, "web:1", sbom, n="2")
    layout.add_nameless(first)
    assert [e.descriptor.digest for e in layout.entries() if not e.name] == [first.digest, second.digest]
    layout.remove_entries([e for e in layout.entries() if e.descriptor.digest == first.digest])
    assert [e.descriptor.digest for e in layout.entries() if not e.name] == [second.digest]


def test_attaching_to_what_is_not_here(layout: Layout, sbom: Path) -> None:
    with pytest.raises(ReferenceNotFound):
        attach_to(layout, "web:1", sbom)
    add(layout, "web:1")
    with pytest.raises(FileProblem):
        attach_to(layout, "web:1", sbom.with_name("missing"))
    assert len(layout.entries()) == 1


@pytest.mark.parametrize(
    ("media_type", "annotations"),
    [
        ("sbom", {}),
        ("a/b/c", {}),
        ("a/b\n", {}),
        ("", {}),
        ("/x", {}),
        (mediatypes.OCI_EMPTY, {}),
        (SBOM, {"": "x"}),
        (SBOM, {"k": "x" * 5000}),
    ],
)
def test_what_can_not_be_attached_so(media_type: str, annotations: dict[str, str]) -> None:
    with pytest.raises(InputError):
        Attachment(Path("x"), media_type, media_type, annotations)
