"""Policies over real registries: what is not signed does not come, whichever way it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from support import artifacts, policies
from support.cli import Ovm
from support.policies import ACCEPT, REJECT, signed
from support.registry import Registry

from ovms.artifact import ram, resolve
from ovms.artifact.build import Builder
from ovms.artifact.model import Artifact
from ovms.artifact.resolve import Found
from ovms.errors import PolicyRefused, SignatureInvalid, SignatureMissing, Untrusted
from ovms.oci import cosign, origins, referrers, transfer
from ovms.oci.descriptor import EMPTY_CONFIG, Descriptor, build_file_manifest
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.spec import mediatypes, strictjson
from ovms.spec.digest import Digest, of_bytes
from ovms.trust import keys, payload, signing
from ovms.trust.guard import Guard
from ovms.trust.keys import PrivateKey
from ovms.trust.model import Format

KEYS: Final = {name: keys.generate() for name in ("a", "b", "c")}
STRANGER: Final = keys.generate()
FORMATS: Final = pytest.mark.parametrize("kind", Format)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(referrers, "_SETTLE", 0.001)
    monkeypatch.setattr(referrers, "_SETTLE_TIMES", 0)
    monkeypatch.setattr(cosign, "_SETTLE", 0.001)


class Setting:
    """An artifact in a registry, an empty store, and a policy."""

    def __init__(self, client: RegistryClient, path: Path) -> None:
        self.client = client
        self.path = path
        self.theirs = Layout(path / "theirs")
        self.ours = Layout(path / "ours")
        self.ref = Reference(client.host, f"t/{path.name.replace('_', '-').strip('-').lower()}", "1")
        self.artifact = self.put(artifacts.small(self.theirs, str(self.ref)))

    def put(self, artifact: Artifact) -> Artifact:
        transfer.push(self.theirs, self.client, self.ref, artifact.digest)
        self.artifact = artifact
        return artifact

    def sign(self, key: PrivateKey, kind: Format = Format.BUNDLE, digest: Digest | None = None) -> None:
        target = self.ref if digest is None else Reference(self.ref.registry, self.ref.repository, None, digest)
        signing.sign_remote(self.client, target, key, kind)

    def guard(self, rule: dict[str, Any], default: dict[str, Any] = REJECT, **more: Any) -> Guard:
        value = policies.document(default, KEYS, scopes={self.ref.name: rule, **more})
        return policies.guard(self.ours, self.path / "policy.json", value)

    def connect(self, _host: str) -> RegistryClient:
        return self.client

    def pull(self, guard: Guard, text: str | None = None, **more: Any) -> Found:
        return resolve.pull(self.ours, self.connect, text or str(self.ref), guard=guard, **more)

    def refuses(self, guard: Guard, kind: type[Untrusted], text: str | None = None) -> Untrusted:
        with pytest.raises(kind) as caught:
            self.pull(guard, text)
        assert [entry for entry in self.ours.entries() if entry.name] == []
        here = [blob for blob in self.artifact.image.layers if self.ours.size(blob.digest) is not None]
        assert here == [], "the bulk was fetched"
        return caught.value


@pytest.fixture
def setting(each_registry: Registry, tmp_path: Path) -> Iterator[Setting]:
    with RegistryClient(each_registry.host) as client:
        yield Setting(client, tmp_path)


def test_what_is_not_signed_does_not_come(setting: Setting) -> None:
    error = setting.refuses(setting.guard(signed("a")), SignatureMissing)
    assert setting.ref.name in error.message
    assert "there is no signature" in error.message
    assert KEYS["a"].public.fingerprint[:16] in error.message


@FORMATS
def test_what_is_signed_comes_and_runs_without_the_registry(setting: Setting, kind: Format) -> None:
    setting.sign(KEYS["a"], kind)
    guard = setting.guard(signed("a"))
    found = setting.pull(guard)
    assert origins.read(setting.ours, found.artifact.digest) == origins.Origin(places=(setting.ref.name,))
    # asked anew by another command, and by digest
    again = setting.guard(signed("a"))
    for text in (str(setting.ref), found.artifact.digest, found.artifact.digest[7:19]):
        resolve.resolve(setting.ours, _offline, text, policy="never", guard=again)
    # under a stricter policy it does not
    with pytest.raises(SignatureInvalid):
        resolve.resolve(setting.ours, _offline, str(setting.ref), policy="never", guard=setting.guard(signed("b")))


@FORMATS
def test_another_key_is_none(setting: Setting, kind: Format) -> None:
    setting.sign(STRANGER, kind)
    setting.sign(KEYS["b"], kind)
    error = setting.refuses(setting.guard(signed("a")), SignatureInvalid)
    assert "a (key " in error.message
    assert len(error.context["found"]) == 2


def test_a_signature_of_another_artifact_is_none(setting: Setting) -> None:
    setting.sign(KEYS["a"])
    old = setting.artifact
    setting.put(artifacts.small(setting.theirs, "another:1"))
    setting.refuses(setting.guard(signed("a")), SignatureMissing)
    # put beside it, as if it were one
    found = referrers.fetch(setting.client, setting.ref.repository, old.digest).descriptors[0]
    raw, _ = setting.client.get_manifest(Reference(setting.ref.registry, setting.ref.repository, None, found.digest))
    forged = raw.replace(old.digest.encode(), setting.artifact.digest.encode()).replace(
        f'"size":{len(old.image.raw)}'.encode(), f'"size":{len(setting.artifact.image.raw)}'.encode()
    )
    setting.client.put_manifest(setting.ref.repository, of_bytes(forged), forged, mediatypes.OCI_MANIFEST)
    layout = Layout(setting.path / "forged")
    layout.add_bytes(forged)
    image = layout.manifest(of_bytes(forged))
    entry = image.as_referrer()
    if not referrers.fetch(setting.client, setting.ref.repository, setting.artifact.digest).descriptors:
        referrers.add(setting.client, setting.ref.repository, entry, setting.artifact.digest)
    error = setting.refuses(setting.guard(signed("a")), SignatureInvalid)
    assert "another" in error.message


def test_m_of_n(setting: Setting) -> None:
    guard = setting.guard(signed("a", "b", "c", of=2))
    setting.sign(KEYS["a"])
    setting.sign(KEYS["a"], Format.CLASSIC)
    assert "only a has signed it" in setting.refuses(guard, SignatureMissing).message
    setting.sign(KEYS["c"], Format.REFERRER)
    setting.pull(guard)


@pytest.mark.spec("SEC-7")
def test_a_digest_is_no_way_around(setting: Setting) -> None:
    pinned = f"{setting.ref.name}@{setting.artifact.digest}"
    setting.refuses(setting.guard(signed("a")), SignatureMissing, pinned)
    setting.sign(KEYS["a"])
    setting.pull(setting.guard(signed("a")), pinned)


def test_another_name_is_no_way_around(setting: Setting) -> None:
    guard = setting.guard(signed("a"), local=ACCEPT)
    with pytest.raises(SignatureMissing):
        setting.pull(guard, name="mine:1")
    # pulled when there was no policy, and called something else
    setting.pull(setting.guard(ACCEPT), name="mine:1")
    for text in ("mine:1", setting.artifact.digest):
        with pytest.raises(SignatureMissing):
            resolve.resolve(
                setting.ours, _offline, text, policy="never", guard=setting.guard(signed("a"), local=ACCEPT)
            )


def test_signatures_that_came_later_are_fetched_for_what_is_here(setting: Setting) -> None:
    setting.pull(setting.guard(ACCEPT))
    guard = setting.guard(signed("a"))
    with pytest.raises(SignatureMissing):
        resolve.resolve(setting.ours, setting.connect, str(setting.ref), guard=guard)
    setting.sign(KEYS["a"])
    resolve.resolve(setting.ours, setting.connect, str(setting.ref), guard=guard)
    resolve.resolve(setting.ours, _offline, str(setting.ref), policy="never", guard=setting.guard(signed("a")))


def test_where_the_registry_is_gone_what_is_here_decides(setting: Setting) -> None:
    setting.pull(setting.guard(ACCEPT))

    def gone(_host: str) -> RegistryClient:
        client = RegistryClient("127.0.0.1:1")
        client.patience = lambda *_: _Impatient()  # type: ignore[assignment,method-assign]
        return client

    with pytest.raises(SignatureMissing):
        resolve.resolve(setting.ours, gone, str(setting.ref), guard=setting.guard(signed("a")))


class _Impatient:
    def bear(self, exc: Exception) -> None:
        raise exc

    def progressed(self) -> None:
        return


def test_an_index_is_signed_or_what_it_lists(setting: Setting) -> None:
    entry = {**setting.artifact.image.descriptor().to_json(), "platform": {"os": "linux", "architecture": "amd64"}}
    raw = strictjson.canonical({"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": [entry]})
    setting.client.put_manifest(setting.ref.repository, "1", raw, mediatypes.OCI_INDEX)
    guard = setting.guard(signed("a"))
    setting.refuses(guard, SignatureMissing)
    setting.sign(KEYS["a"])  # the index: that is what the tag stands for
    found = setting.pull(guard)
    assert found.artifact.digest == setting.artifact.digest
    resolve.resolve(setting.ours, _offline, str(setting.ref), policy="never", guard=setting.guard(signed("a")))
    # the manifest alone is not signed, and not known to be in the index where it is asked for by itself
    other = Setting.__new__(Setting)
    other.__dict__.update(setting.__dict__, ours=Layout(setting.path / "other"))
    other.refuses(other.guard(signed("a")), SignatureMissing, f"{setting.ref.name}@{setting.artifact.digest}")
    setting.sign(KEYS["b"], digest=setting.artifact.digest)
    other.pull(other.guard(signed("b")))


def test_a_ram_snapshot_needs_more(setting: Setting) -> None:
    setting.put(artifacts.with_ram(setting.theirs, str(setting.ref), artifacts.ram_blob()))
    setting.sign(KEYS["b"])
    rule = {**signed("b"), "ramSnapshots": signed("a")}
    error = setting.refuses(setting.guard(rule), SignatureInvalid)
    assert "its RAM snapshot has to be signed by a (key" in error.message
    # without it, the rest may come; and it is refused when it is needed after all
    found = setting.pull(setting.guard(rule), gate=ram.unwanted)
    assert ram.left_out(setting.ours, found.artifact)
    with pytest.raises(SignatureInvalid, match="RAM snapshot"):
        resolve.resolve(setting.ours, setting.connect, str(setting.ref), gate=_needed, guard=setting.guard(rule))
    assert ram.left_out(setting.ours, found.artifact)
    with pytest.raises(SignatureInvalid, match="RAM snapshot"):
        setting.pull(setting.guard(rule), gate=_needed)
    assert ram.left_out(setting.ours, found.artifact)
    setting.sign(KEYS["a"])
    resolve.resolve(setting.ours, setting.connect, str(setting.ref), gate=_needed, guard=setting.guard(rule))
    assert not ram.left_out(setting.ours, found.artifact)


@pytest.mark.spec("SEC-7")
def test_a_file_is_no_way_around(setting: Setting) -> None:
    archive = f"oci-archive:{setting.path / 'x.tar'}"
    resolve.push(setting.theirs, setting.connect, str(setting.ref), destination=archive)
    text = f"{archive}:{setting.ref}"
    for ask in (setting.pull, lambda guard, text: resolve.resolve(setting.ours, setting.connect, text, guard=guard)):
        with pytest.raises(PolicyRefused, match="rule for oci-archive"):
            ask(setting.guard(ACCEPT, **{"oci-archive": REJECT}), text)
        with pytest.raises(SignatureMissing):
            ask(setting.guard(ACCEPT, **{"oci-archive": signed("a")}), text)
        assert [blob for blob in setting.artifact.image.layers if setting.ours.size(blob.digest) is not None] == []
    # what was let in by a file is under the rule of the name that it is asked for by, too
    resolve.resolve(setting.ours, setting.connect, text, guard=setting.guard(signed("a"), **{"oci-archive": ACCEPT}))
    with pytest.raises(SignatureMissing):
        resolve.resolve(
            setting.ours,
            _offline,
            str(setting.ref),
            policy="never",
            guard=setting.guard(signed("a"), **{"oci-archive": ACCEPT}),
        )


def test_a_name_that_is_put_elsewhere_meanwhile(setting: Setting) -> None:
    """What was checked is a digest, and the artifact of that digest is used, whatever its name stands for by then."""
    setting.sign(KEYS["a"])
    guard = setting.guard(signed("a"))
    good = setting.pull(guard).artifact
    evil = artifacts.small(setting.ours, "evil:1")
    found = resolve.resolve(setting.ours, _offline, str(setting.ref), policy="never", guard=guard)
    setting.ours.set_name(str(setting.ref), evil.image.descriptor())
    assert found.artifact.digest == good.digest
    assert found.artifact.image == good.image
    origins.add(setting.ours, evil.digest, origins.Origin(places=("evil.example/x",)))
    (setting.ours.origin_dir / evil.digest[7:]).write_bytes(
        strictjson.canonical({"version": 1, "made": False, "places": ["evil.example/x"], "sources": [], "indexes": []})
    )
    with pytest.raises(PolicyRefused):
        resolve.resolve(setting.ours, _offline, str(setting.ref), policy="never", guard=guard)


def test_a_registry_that_changes_the_tag_between_the_check_and_the_bulk(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting.sign(KEYS["a"])
    good, guard = setting.artifact, setting.guard(signed("a"))
    admit = guard.admit

    def moved(*arguments: Any, **more: Any) -> None:
        admit(*arguments, **more)
        setting.put(artifacts.small(setting.theirs, "evil:1"))

    monkeypatch.setattr(guard, "admit", moved)
    assert setting.pull(guard).artifact.digest == good.digest
    named = setting.ours.find(str(setting.ref))
    assert named is not None
    assert named.digest == good.digest


def _needed(*_: Any) -> None:
    return None


def _offline(host: str) -> RegistryClient:
    raise AssertionError(f"{host} was asked")


@pytest.mark.long
def test_check_and_show_by_command(setting: Setting) -> None:
    setting.put(artifacts.with_ram(setting.theirs, str(setting.ref), artifacts.ram_blob()))
    rule = {**signed("a", "b"), "ramSnapshots": signed("b"), "maxAge": "90d"}
    path = setting.path / "policy.json"
    allowed = ["registry.example", setting.client.host]
    policies.write(path, policies.document(REJECT, KEYS, scopes={setting.ref.name: rule}, registries=allowed))
    ovm = Ovm(setting.path / "root", setting.path, extra={"OVMS_POLICY": str(path)})

    shown = ovm.ok("policy", "show").out
    assert f"{path}\nallowed registries: registry.example, {setting.client.host}\n" in shown
    row = next(line for line in shown.splitlines() if line.startswith(setting.ref.name))
    assert [cell.strip() for cell in row.split("   ") if cell][1:] == [
        "signed by one of a, b",
        "signed by b",
        "90 days",
    ]
    assert ovm.ok("policy", "show", "--json").json["policies"][0]["signers"] == ["a", "b", "c"]

    # in the registry: nothing of it comes into a store
    checked = ovm("policy", "check", setting.ref)
    assert checked.code == 14
    assert not (setting.path / "root").exists()
    assert "refused: " in checked.out
    assert "there is no signature" in checked.out
    setting.sign(KEYS["a"])
    pulled = ovm("pull", setting.ref, "--no-ram")
    assert pulled.code == 14
    assert "it does not say when it was made" in pulled.err
    assert ovm("pull", setting.ref, "--json").error["code"] == "signature-invalid"
    setting.guard({**signed("a", "b"), "ramSnapshots": signed("b")})
    checked = ovm("policy", "check", setting.ref, "--json")
    assert (checked.code, checked.json["allowed"], checked.json["ram_allowed"]) == (14, True, False)
    assert checked.json["verdicts"][0]["signed_by"] == ["a"]
    setting.sign(KEYS["b"], Format.CLASSIC)
    checked = ovm.ok("policy", "check", setting.ref)
    assert "accepted: signed by " in checked.out
    assert "with its RAM snapshot:" in checked.out
    ovm.ok("pull", setting.ref)
    assert ovm.ok("policy", "check", setting.ref).out.splitlines()[-1] == checked.out.splitlines()[-1]

    # in a file, where nobody has signed
    archive = f"oci-archive:{setting.path / 'x.tar'}"
    resolve.push(setting.theirs, setting.connect, str(setting.ref), destination=archive)
    assert ovm("policy", "check", archive).code == 14
    for wrong in (("check",), ("show", "x"), ("check", "none:1")):
        assert ovm("policy", *wrong).code in (2, 4)
    path.unlink()
    assert ovm("policy", "show").code == 9
    assert "every artifact is accepted" in Ovm(setting.path / "root", setting.path).ok("policy", "show").out


def test_a_build_takes_no_part_of_what_is_refused(setting: Setting) -> None:
    setting.put(artifacts.of(setting.theirs, str(setting.ref), b"kernel", b"disk" * 4096))
    manifest = setting.path / "ovms.json"
    manifest.write_text(
        json.dumps(
            {
                "schemaVersion": 1,
                "mediaType": mediatypes.MANIFEST,
                "name": "mine",
                "version": "1",
                "diskLayers": [{"ref": str(setting.ref), "format": "raw"}],
            }
        )
    )
    with pytest.raises(SignatureMissing):
        Builder(setting.ours, setting.connect, guard=setting.guard(signed("a"), local=ACCEPT)).build(manifest)
    setting.sign(KEYS["a"])
    guard = setting.guard(signed("a"), local=ACCEPT)
    made = Builder(setting.ours, setting.connect, guard=guard).build(manifest, name="mine:1")
    assert origins.read(setting.ours, made.digest) == origins.Origin(
        made=True, sources=(origins.Source(setting.artifact.digest),)
    )
    guard.allow(made.digest, "mine:1")
    with pytest.raises(SignatureInvalid, match="from which mine:1 was made"):
        setting.guard(signed("b"), local=ACCEPT).allow(made.digest, "mine:1")


def attest(setting: Setting, key: PrivateKey, predicate: str, digest: Digest | None = None) -> None:
    """Puts a signed statement beside the artifact, as 'cosign attest' does."""
    subject = setting.artifact.image.descriptor()
    document = {**json.loads(payload.statement(digest or subject.digest)), "predicateType": predicate}
    statement = json.dumps(document).encode()
    data = payload.bundle(key.public.hint, statement, key.sign(payload.pae(payload.IN_TOTO, statement)))
    image = build_file_manifest(
        cosign.BUNDLE_TYPE,
        Descriptor.of(cosign.BUNDLE_TYPE, data),
        subject,
        {cosign.BUNDLE_CONTENT: "dsse-envelope", cosign.BUNDLE_PREDICATE: predicate},
    )
    cosign.push(setting.client, setting.ref.repository, image, (EMPTY_CONFIG, data))


def test_provenance_can_be_asked_for(setting: Setting) -> None:
    slsa = "https://slsa.dev/provenance/v1"
    rule = {**ACCEPT, "attestations": [{"predicateType": slsa, "anyOf": ["a"]}]}
    setting.sign(KEYS["a"])
    setting.refuses(setting.guard(rule), SignatureMissing)
    attest(setting, STRANGER, slsa)
    attest(setting, KEYS["a"], "https://spdx.dev/Document")
    attest(setting, KEYS["a"], slsa, of_bytes(b"another artifact"))
    error = setting.refuses(setting.guard(rule), SignatureInvalid)
    assert slsa in error.message
    attest(setting, KEYS["a"], slsa)
    found = setting.pull(setting.guard(rule))
    # it is kept beside the artifact, and enough without the registry
    resolve.resolve(setting.ours, _offline, str(setting.ref), policy="never", guard=setting.guard(rule))
    with pytest.raises(SignatureInvalid):
        stricter = {**ACCEPT, "attestations": [{"predicateType": slsa, "anyOf": ["b"]}]}
        resolve.resolve(setting.ours, _offline, str(setting.ref), policy="never", guard=setting.guard(stricter))
    # what came before anybody asked for it is looked for when it is used
    other = Layout(setting.path / "other")
    setting.ours = other
    setting.pull(setting.guard(ACCEPT))
    with pytest.raises(SignatureMissing):
        resolve.resolve(other, _offline, found.artifact.digest, policy="never", guard=setting.guard(rule))
    setting.guard(rule).allow(found.artifact.digest, "x", connect=setting.connect)
    setting.guard(rule).allow(found.artifact.digest, "x")
