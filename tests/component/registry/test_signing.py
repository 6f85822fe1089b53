"""ovm sign, verify and push against real registries: what travels with an artifact, indexes, what a tag means."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import artifacts
from support.registry import Registry

from ovms.cli import main
from ovms.cli.exitcodes import Exit
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.runtime.root import Root
from ovms.spec import mediatypes, strictjson
from ovms.spec.digest import of_bytes
from ovms.trust import keys

Run = Callable[..., tuple[int, str, str]]

FORMS = pytest.mark.parametrize("form", ["bundle", "referrer", "classic"])
pytestmark = pytest.mark.usefixtures("hurried")
ONE = pytest.mark.parametrize("each_registry", ["docker-registry"], indirect=True)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Root(tmp_path / "root").layout()


@pytest.fixture
def ovm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object, root: str = "root") -> tuple[int, str, str]:
        code = main.main(["--root", str(tmp_path / root), "--progress", "none", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A pair of which the private half needs no password: deriving a key from one takes a while."""
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    raw = ed25519.Ed25519PrivateKey.generate()
    private, public = tmp_path / "a.pem", tmp_path / "a.pub"
    private.write_bytes(raw.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(keys.load_private(private.read_bytes(), "k", lambda: b"").public.pem)
    return private, public


@pytest.fixture
def name(each_registry: Registry, tmp_path: Path) -> str:
    return f"{each_registry.host}/s/{of_bytes(str(tmp_path).encode())[7:19]}"


def test_what_is_signed_in_a_registry(ovm: Run, layout: Layout, name: str, pair: tuple[Path, Path]) -> None:
    digest = artifacts.small(layout, f"{name}:1").digest
    assert ovm("push", f"{name}:1")[0] == Exit.OK
    code, out, err = ovm("verify", f"{name}:1", "--key", pair[1])
    assert (code, out) == (Exit.UNTRUSTED, "")
    assert "has no signature" in err
    assert ovm("sign", f"{name}:1", "--key", pair[0]) == (Exit.OK, f"{name}@{digest}\n", "")
    assert ovm("verify", f"{name}:1", "--key", pair[1])[:2] == (Exit.OK, f"{name}@{digest}\n")
    # nothing of it is here
    assert ovm("verify", f"{name}:1", "--key", pair[1], "--local")[0] == Exit.UNTRUSTED
    # the tag goes elsewhere, and its signature does not go with it
    artifacts.of(layout, f"{name}:1", b"another kernel" * 100, b"another disk" * 100)
    ovm("push", f"{name}:1")
    assert ovm("verify", f"{name}:1", "--key", pair[1])[0] == Exit.UNTRUSTED
    assert ovm("verify", f"{name}@{digest}", "--key", pair[1])[0] == Exit.OK


@ONE
@FORMS
def test_signatures_travel_with_an_artifact(
    ovm: Run, layout: Layout, name: str, pair: tuple[Path, Path], form: str, tmp_path: Path
) -> None:
    artifacts.small(layout, "web:1")
    (tmp_path / "sbom").write_text("{}")
    assert ovm("attach", tmp_path / "sbom", "web:1", "--type", "application/spdx+json")[0] == Exit.OK
    assert ovm("sign", "web:1", "--key", pair[0], "--format", form)[0] == Exit.OK
    verify = ("verify", f"{name}:1", "--key", pair[1])
    ovm("push", "web:1", f"{name}:1", "--remove-signatures")
    assert ovm(*verify)[0] == Exit.UNTRUSTED
    code, out, _ = ovm("push", "web:1", f"{name}:1", "--json")
    assert (code, len(json.loads(out)["signatures"])) == (Exit.OK, 1)
    assert ovm(*verify)[0] == Exit.OK
    # what is no signature stays, unless it is asked for
    listed = [one["artifact_type"] for one in json.loads(ovm("referrers", f"{name}:1", "--json")[1])["referrers"]]
    assert "application/spdx+json" not in listed
    answer = json.loads(ovm("push", "web:1", f"{name}:1", "--json", "--referrers")[1])
    assert (len(answer["signatures"]), len(answer["referrers"])) == (1, 2)
    # and from there into another store, to another registry
    assert ovm("pull", f"{name}:1", "--referrers", root="second")[0] == Exit.OK
    assert ovm("verify", f"{name}:1", "--key", pair[1], "--local", root="second")[0] == Exit.OK
    assert ovm("push", f"{name}:1", f"{name}/copy:1", root="second")[0] == Exit.OK
    assert ovm("verify", f"{name}/copy:1", "--key", pair[1])[0] == Exit.OK


def test_an_artifact_goes_to_disk_alone(ovm: Run, layout: Layout, pair: tuple[Path, Path], tmp_path: Path) -> None:
    artifacts.small(layout, "web:1")
    ovm("sign", "web:1", "--key", pair[0])
    code, out, _ = ovm("push", "web:1", f"oci:{tmp_path / 'place'}:1", "--json")
    assert code == Exit.OK
    assert "signatures" not in json.loads(out)


@ONE
def test_an_index_and_what_it_lists(
    ovm: Run, layout: Layout, name: str, pair: tuple[Path, Path], each_registry: Registry
) -> None:
    images = [artifacts.small(layout, f"{name}:{number}").image for number in range(2)]
    for number in range(2):
        ovm("push", f"{name}:{number}")
    raw = strictjson.canonical(
        {
            "schemaVersion": 2,
            "mediaType": mediatypes.OCI_INDEX,
            "manifests": [image.descriptor().to_json() for image in images],
        }
    )
    with RegistryClient(each_registry.host) as client:
        client.put_manifest(Reference.parse(name).repository, "all", raw, mediatypes.OCI_INDEX)
    index = of_bytes(raw)
    assert ovm("sign", f"{name}:all", "--key", pair[0]) == (Exit.OK, f"{name}@{index}\n", "")
    assert ovm("verify", f"{name}:all", "--key", pair[1])[:2] == (Exit.OK, f"{name}@{index}\n")
    assert ovm("verify", f"{name}:0", "--key", pair[1])[0] == Exit.UNTRUSTED
    out = ovm("sign", f"{name}:all", "--key", pair[0], "--recursive")[1]
    assert out.splitlines() == [f"{name}@{digest}" for digest in (index, *(image.digest for image in images))]
    for tag in ("all", "0", "1"):
        assert ovm("verify", f"{name}:{tag}", "--key", pair[1])[0] == Exit.OK
    # and all of it comes here: of the index, and of the manifest in it that was taken
    for tag in ("all", "0"):
        ovm("sign", f"{name}:{tag}", "--key", pair[0], "--format", "classic")
    assert ovm("pull", f"{name}:all", "--referrers", root="second")[0] == Exit.OK
    for digest in (index, images[0].digest):
        answer = ovm("verify", digest, "--key", pair[1], "--json", root="second")[1]
        assert sorted(one["format"] for one in json.loads(answer)["signatures"]) == ["bundle", "classic"]


@ONE
def test_rubbish_where_signatures_are(
    ovm: Run, layout: Layout, name: str, pair: tuple[Path, Path], each_registry: Registry
) -> None:
    digest = artifacts.small(layout, f"{name}:1").digest
    ovm("push", f"{name}:1")
    raw = strictjson.canonical({"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": []})
    with RegistryClient(each_registry.host) as client:
        client.put_manifest(Reference.parse(name).repository, f"sha256-{digest[7:]}.sig", raw, mediatypes.OCI_INDEX)
    code, _, err = ovm("verify", f"{name}:1", "--key", pair[1], "--json")
    error = json.loads(err)["error"]
    assert (code, error["code"]) == (Exit.UNTRUSTED, "signature-invalid")
    assert "holds an index" in error["message"]
    ovm("sign", f"{name}:1", "--key", pair[0])
    code, _, err = ovm("verify", f"{name}:1", "--key", pair[1])
    assert code == Exit.OK
    assert "does not count" in err
