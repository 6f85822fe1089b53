"""SBOMs and statements: attached as what they are, found by their kind, fetched, and built artifacts that tell how they were made."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest
from support import faulty, tools
from support.artifacts import write_inputs, write_manifest
from support.cli import OVM, Ovm
from support.faulty import Server
from support.registry import Registry

from ovms.oci.layout import Layout
from ovms.oci.referrers import fallback_tag
from ovms.spec import mediatypes
from ovms.spec.digest import Digest, of_bytes

SLSA = "https://slsa.dev/provenance/v1"
BOM = b'{"bomFormat": "CycloneDX", "specVersion": "1.6"}'


@pytest.fixture
def ovm(tmp_path: Path) -> Ovm:
    (tmp_path / "home").mkdir()
    return Ovm(tmp_path / "root", tmp_path / "home")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_inputs(tmp_path / "project")
    return write_manifest(tmp_path / "project", ramSnapshot=None)


@pytest.fixture
def bom(tmp_path: Path) -> Path:
    path = tmp_path / "bom.json"
    path.write_bytes(BOM)
    return path


def test_there_and_back(ovm: Ovm, each_registry: Registry, project: Path, bom: Path, tmp_path: Path) -> None:
    """Built, attached to, pushed with what belongs to it; and found by somebody who has the registry alone."""
    name = f"{each_registry.host}/attached/{tmp_path.name.replace('_', '-').lower()}:1"
    digest = ovm.ok("build", project, "-t", name).out.strip()
    assert ovm.ok("attach", bom, name, "--local", "--json").json["kind"] == "cyclonedx"
    assert len(ovm.ok("push", "--referrers", name, "--json").json["referrers"]) == 2
    other = Ovm(tmp_path / "other", tmp_path / "home")
    found = {one["kind"]: one for one in other.ok("referrers", name, "--json").json["referrers"]}
    assert found.keys() == {"provenance", "cyclonedx"}
    assert found["provenance"]["annotations"]["in-toto.io/predicate-type"] == SLSA
    assert other.ok("referrers", name, "--get", "cyclonedx").out.encode() == BOM
    statement = json.loads(other.ok("referrers", name, "--get", found["provenance"]["digest"][7:19]).out)
    assert statement["subject"] == [{"name": "web", "digest": {"sha256": digest[7:]}}]
    # and for whoever pulls it, from the store
    other.ok("pull", "--referrers", name)
    path = tmp_path / "provenance.json"
    told = other.ok("referrers", name, "--local", "--get", "provenance", "-o", path, "--json").json
    assert (told["path"], told["media_type"]) == (str(path), mediatypes.IN_TOTO)
    assert told["digest"] == of_bytes(path.read_bytes())
    assert json.loads(path.read_bytes()) == statement
    assert [one["kind"] for one in other.ok("referrers", name, "--type", "cyclonedx", "--json").json["referrers"]] == [
        "cyclonedx"
    ]
    lines = other.ok("referrers", name).out
    assert "  provenance\n" in lines
    assert "  SBOM (CycloneDX)\n" in lines


@pytest.mark.long
def test_what_cosign_attests_a_policy_takes(
    ovm: Ovm, each_registry: Registry, project: Path, bom: Path, tmp_path: Path
) -> None:
    """docs/policy.md: how an artifact was made, signed by somebody who stands for it."""
    tools.find("cosign")
    name = f"{each_registry.host}/attested/{tmp_path.name.replace('_', '-').lower()}:1"
    digest = ovm.ok("build", project, "-t", name).out.strip()
    ovm.ok("push", name)
    password = {"OVMS_KEY_PASSWORD": "x", "COSIGN_PASSWORD": "x"}
    assert ovm("key", "generate", "--output-key-prefix", tmp_path / "ci", env=password).code == 0
    policy = tmp_path / "policy.json"
    other = Ovm(tmp_path / "other", tmp_path / "home", extra={"OVMS_POLICY": str(policy)})

    def pulled(predicate: str) -> int:
        needed = {"predicateType": predicate, "anyOf": ["ci"]}
        rule = {"type": "accept", "attestations": [needed]}
        policy.write_text(json.dumps({"version": 1, "signers": {"ci": {"keyPath": "ci.pub"}}, "default": rule}))
        return other("pull", name).code

    assert pulled(SLSA) == 14
    predicate = tmp_path / "predicate.json"
    statement = json.loads(ovm.ok("referrers", name, "--local", "--get", "provenance").out)
    predicate.write_text(json.dumps(statement["predicate"]))
    for kind, file in (("slsaprovenance1", predicate), ("cyclonedx", bom)):
        done = tools.attempt(
            "cosign", "attest", "--key", tmp_path / "ci.key", "--type", kind, "--predicate", file, "--use-signing-config=false",
            "--tlog-upload=false", "-y", "--allow-http-registry", f"{name.rpartition(':')[0]}@{digest}",
            home=ovm.home, env=password,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()
    assert pulled("https://spdx.dev/Document") == 14
    assert pulled(SLSA) == 0
    assert pulled("https://cyclonedx.org/bom") == 0
    found = other.ok("referrers", name, "--json").json["referrers"]
    assert {one["kind"] for one in found} == {"provenance", "cyclonedx"}


@pytest.mark.long
def test_what_is_attached_is_what_it_is_called(ovm: Ovm, project: Path, bom: Path, tmp_path: Path) -> None:
    digest = ovm.ok("build", project, "-t", "web:1", "--provenance=false").out.strip()
    assert ovm.ok("referrers", "web:1", "--json").json["referrers"] == []
    done = ovm("attach", bom, "web:1", "--type", "spdx")
    assert (done.code, "SBOM (CycloneDX)" in done.err) == (3, True)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    assert ovm("attach", text, "web:1").code == 2
    assert ovm("attach", text, "web:1", "--type", "sbom").code == 2
    assert ovm("attach", text, "web:1", "--type", "signature").code == 2  # those are made by signing
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "predicateType": "https://example.org/tested",
        "predicate": {},
    }
    about = tmp_path / "statement.json"
    for subjects, code in (([], 3), ([{"digest": {"sha256": "0" * 64}}], 3), ([{"digest": {"sha256": digest[7:]}}], 0)):
        about.write_text(json.dumps({**statement, "subject": subjects}))
        assert ovm("attach", about, "web:1").code == code
    about.write_text(json.dumps({**statement, "subject": []}))
    # whoever says the type is believed
    assert ovm.ok("attach", about, "web:1", "--type", mediatypes.IN_TOTO, "--json").json["kind"] == "in-toto"
    kinds = [one["kind"] for one in ovm.ok("referrers", "web:1", "--json").json["referrers"]]
    assert kinds == ["in-toto", "in-toto"]
    several = ovm("referrers", "web:1", "--get", "in-toto")
    assert (several.code, "2 referrers" in several.err) == (3, True)
    assert ovm("referrers", "web:1", "--get", "spdx").code == 4
    assert ovm("referrers", "web:1", "--get", "0" * 64).code == 4


@pytest.mark.long
def test_where_a_file_goes_to(ovm: Ovm, project: Path, bom: Path, tmp_path: Path) -> None:
    ovm.ok("build", project, "-t", "web:1", "--no-provenance")
    ovm.ok("attach", bom, "web:1")
    get = ("referrers", "web:1", "--get", "cyclonedx")
    there = tmp_path / "there"
    there.write_text("mine")
    done = ovm(*get, "-o", there, "--json")
    assert (done.code, done.error["code"]) == (3, "file-unreadable")
    assert there.read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert ovm(*get, "-o", tmp_path / "link").code == 3
    assert ovm(*get, "-o", tmp_path / "no" / "directory").code == 3
    assert ovm(*get, "--json").code == 2
    assert ovm("referrers", "web:1", "-o", there).code == 2
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_a_file_does_not_drive_a_terminal(ovm: Ovm, project: Path, tmp_path: Path) -> None:
    ovm.ok("build", project, "-t", "web:1", "--no-provenance")
    path = tmp_path / "bom"
    path.write_bytes(b'{"bomFormat": "CycloneDX"}\n')
    plain = ovm.ok("attach", path, "web:1").out.strip()
    path.write_bytes(b"\x1b]0;owned\x07")
    hostile = ovm.ok("attach", path, "web:1", "--type", "text/plain").out.strip()
    for digest, code in ((plain, 0), (hostile, 2)):
        reader, terminal = pty.openpty()
        command = [str(OVM), "referrers", "web:1", "--get", digest]
        done = subprocess.run(
            command, env=ovm.env(), stdout=terminal, stderr=subprocess.DEVNULL, timeout=60, check=False
        )
        os.close(terminal)
        assert done.returncode == code
        os.close(reader)
    assert ovm.ok("referrers", "web:1", "--get", hostile).out == "\x1b]0;owned\x07"


@pytest.mark.long
def test_a_registry_that_lies_of_a_referrer(ovm: Ovm, tmp_path: Path) -> None:
    with Server() as server:
        top = server.serve_artifact({}, (mediatypes.MANIFEST, b"{}"))
        name = f"{server.host}/x:1"
        # another subject than the list says; two files in one; and bytes that are others
        good = {"mediaType": mediatypes.SPDX, "digest": of_bytes(b"sbom"), "size": 4}
        right = {"mediaType": mediatypes.OCI_MANIFEST, "digest": top, "size": 1}
        server.blobs[of_bytes(b"sbom")] = b"sbom"
        server.blobs[of_bytes(b"{}")] = b"{}"
        empty = {"mediaType": mediatypes.OCI_EMPTY, "digest": of_bytes(b"{}"), "size": 2}
        base = {
            "schemaVersion": 2,
            "mediaType": mediatypes.OCI_MANIFEST,
            "artifactType": mediatypes.SPDX,
            "config": empty,
        }
        digests = []
        for subject, layers in (
            (right, [good]),
            ({**right, "digest": of_bytes(b"other")}, [good]),
            (right, [good, good]),
            (right, [{**good, "size": 65 << 20}]),
        ):
            raw = json.dumps({**base, "subject": subject, "layers": layers}).encode()
            server.manifests[of_bytes(raw)] = raw
            digests.append(of_bytes(raw))
        listed = [
            {"mediaType": mediatypes.OCI_MANIFEST, "digest": digest, "size": 1, "artifactType": mediatypes.SPDX}
            for digest in digests
        ]
        index = {"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": listed}
        server.manifests[fallback_tag(Digest(top))] = json.dumps(index).encode()
        assert ovm.ok("referrers", name, "--get", digests[0]).out == "sbom"
        for digest in digests[1:]:
            assert ovm("referrers", name, "--get", digest).code == 3
        server.faults = [("GET", "/blobs/", faulty.wrong_bytes)]
        assert ovm("referrers", name, "--get", digests[0], "-o", tmp_path / "sbom").code == 10
        assert not (tmp_path / "sbom").exists()


def test_unpacked_by_hand(ovm: Ovm, project: Path, tmp_path: Path) -> None:
    digest = ovm.ok("build", project, "-t", "web:1").out.strip()
    directory = tmp_path / "out"
    assert ovm.ok("unpack", "web:1", directory, "--json").json == {
        "path": str(directory),
        "name": "web:1",
        "digest": digest,
    }
    assert ovm.ok("validate", directory).code == 0
    again = Ovm(tmp_path / "again", tmp_path / "home")
    assert again.ok("build", directory, "-t", "web:1").out.strip() == digest
    assert ovm("unpack", "web:1", directory).code == 3
    assert ovm("unpack", "none:1", tmp_path / "new").code == 4
    assert not (tmp_path / "new").exists()
    assert len(Layout(again.root / "store").entries()) == 2  # with its provenance
    # what is built of the files would be one's own: no way around a policy
    (tmp_path / "policy.json").write_text(json.dumps({"version": 1, "default": {"type": "reject"}}))
    refused = ovm("unpack", "web:1", tmp_path / "refused", env={"OVMS_POLICY": str(tmp_path / "policy.json")})
    assert refused.code == 14
    assert not (tmp_path / "refused").exists()
