"""Identities, with what is in a registry: ovm and cosign say the same of the same bundles."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support import keyless, keyless_services, tools
from support.cli import Done, Ovm
from support.keyless import IDENTITY, ISSUER, Clock, Sigstore
from support.registry import Registry
from support.rfc import ROOT

from ovms.oci import cosign
from ovms.oci.descriptor import Descriptor, ImageManifest, build_manifest, created_now
from ovms.oci.registry import RegistryClient
from ovms.spec import mediatypes
from ovms.spec.digest import of_bytes
from ovms.trust import keys
from ovms.trust.identity import IdentitySigner, TrustRoot
from ovms.trust.model import Bad, Format, Good
from ovms.trust.sources import RegistrySource

PAGE = ROOT / "docs" / "signing" / "identities.md"
BEGIN = "<!-- what the test found -->\n"
ANOTHER = of_bytes(b"another")
OURS = Sigstore()
STRANGE = Sigstore()
Made = Callable[[Any], dict[str, Any]]


pytestmark = pytest.mark.usefixtures("hurried")


def artifact(client: RegistryClient, repository: str) -> ImageManifest:
    """Something to sign, like nothing else, in the registry."""
    data = repository.encode()
    image = build_manifest(
        artifact_type="application/vnd.ovms.test",
        config=Descriptor.of(mediatypes.OCI_EMPTY, cosign.EMPTY),
        layers=(Descriptor.of("application/octet-stream", data),),
    )
    cosign.push(client, repository, image, (cosign.EMPTY, data))
    return image


def attach(client: RegistryClient, repository: str, image: ImageManifest, bundle: dict[str, Any]) -> None:
    data = json.dumps(bundle).encode()
    made = cosign.bundle_manifest(data, image.descriptor(), created_now())
    cosign.push(client, repository, made, (cosign.EMPTY, data))


def ours(client: RegistryClient, repository: str, image: ImageManifest, signer: IdentitySigner) -> Good | Bad:
    [one] = RegistrySource(client, repository).signatures(image.digest)
    assert getattr(one, "format", None) is Format.BUNDLE
    return signer.check(one, image.digest)  # type: ignore[arg-type]


def test_a_bundle_in_a_registry(each_registry: Registry, tmp_path: Path) -> None:
    root = TrustRoot.load(OURS.write_root(tmp_path / "trusted_root.json"))
    with RegistryClient(each_registry.host) as client:
        image = artifact(client, "keyless/web")
        attach(client, "keyless/web", image, OURS.bundle(image.digest))
        result = ours(client, "keyless/web", image, IdentitySigner("us", root, IDENTITY, ISSUER))
        assert isinstance(result, Good)
        assert result.signed_at == keyless.SIGNED
        assert isinstance(ours(client, "keyless/web", image, IdentitySigner("us", root, "x@y.example", ISSUER)), Bad)


@dataclasses.dataclass(frozen=True)
class Command:
    """``ovm verify`` of an artifact with a bundle of ours."""

    directory: Path
    ref: str

    def __call__(self, identity: str, *more: object, issuer: str = ISSUER) -> Done:
        return Ovm(self.directory / "root", self.directory)(
            "verify", self.ref, "--certificate-identity", identity, "--certificate-oidc-issuer", issuer,
            "--trusted-root", self.directory / "trusted_root.json", *more,
        )  # fmt: skip


@pytest.fixture
def verify(registry: Registry, tmp_path: Path) -> Command:
    OURS.write_root(tmp_path / "trusted_root.json")
    with RegistryClient(registry.host) as client:
        image = artifact(client, "cli/web")
        attach(client, "cli/web", image, OURS.bundle(image.digest))
    return Command(tmp_path, f"{registry.host}/cli/web@{image.digest}")


def test_a_command(verify: Command) -> None:
    done = verify(IDENTITY)
    assert (done.code, done.out) == (0, f"{verify.ref}\n")
    assert f"made by {IDENTITY} of {ISSUER} at 2025-06-01T12:00:00Z" in done.err
    done = verify("mallory@ovms.example")
    assert (done.code, done.out) == (14, "")
    assert "made by another identity" in done.err


@pytest.mark.long
def test_a_command_with_keys_and_with_mistakes(verify: Command, tmp_path: Path) -> None:
    key = tmp_path / "ovm.pub"
    key.write_bytes(keys.generate().public.pem)
    assert verify(IDENTITY, "--json").json["signatures"][0]["signed_at"] == keyless.SIGNED.isoformat()
    assert verify(IDENTITY, "--key", key).code == 0
    done = verify(IDENTITY, "--key", key, "--all")
    assert (done.code, done.out) == (14, "")
    assert verify(IDENTITY, issuer="https://accounts.example").code == 14
    done = verify("")
    assert done.code == 2
    assert "--trusted-root" in done.err
    ovm = Ovm(tmp_path / "root", tmp_path)
    assert ovm("verify", verify.ref, "--certificate-identity", IDENTITY).code == 2
    done = ovm("verify", verify.ref)
    assert done.code == 2
    assert "--key" in done.err
    (tmp_path / "trusted_root.json").write_text("{}")
    assert "names no certificate authority" in verify(IDENTITY).err


# --- cosign's opinion ------------------------------------------------------------------------------------------------


def _tampered(subject: Any) -> dict[str, Any]:
    document = OURS.bundle(subject)
    document["dsseEnvelope"] = OURS.bundle(subject)["dsseEnvelope"]
    return document


def _moved(subject: Any) -> dict[str, Any]:
    document = OURS.bundle(subject)
    document["verificationMaterial"]["tlogEntries"] = OURS.bundle(subject)["verificationMaterial"]["tlogEntries"]
    return document


def _redated(subject: Any) -> dict[str, Any]:
    document = OURS.bundle(subject)
    entry = document["verificationMaterial"]["tlogEntries"][0]
    entry["integratedTime"] = str(int(entry["integratedTime"]) + 1)
    return document


#: What the table of the page calls it, and the bundle. The first ones are good.
GOOD: dict[str, Made] = {
    "as it should be": OURS.bundle,
    "the issuer in the newer extension alone": lambda s: OURS.bundle(s, old_issuer=None),
    "the issuer in the older extension alone": lambda s: OURS.bundle(s, issuer=None),
}
BAD: dict[str, Made] = {
    "another identity": lambda s: OURS.bundle(s, identity="mallory@ovms.example"),
    "another issuer": lambda s: OURS.bundle(
        s, issuer="https://accounts.example", old_issuer="https://accounts.example"
    ),
    "moved: over another artifact": lambda s: OURS.bundle(ANOTHER),
    "an authority that is not in the trust root": lambda s: dataclasses.replace(
        OURS, authority=STRANGE.authority
    ).bundle(s),
    "a log of certificates that is not in the trust root": lambda s: dataclasses.replace(
        OURS, certificates=STRANGE.certificates
    ).bundle(s),
    "a log of signatures that is not in the trust root": lambda s: dataclasses.replace(
        OURS, signatures=STRANGE.signatures
    ).bundle(s),
    "a certificate that no log saw": lambda s: OURS.bundle(s, sct=False),
    "a signature that no log saw": lambda s: OURS.bundle(s, logged=False),
    "expired: made after the certificate's end": lambda s: OURS.bundle(s, late=timedelta(hours=1)),
    "changed: the envelope of another signature": _tampered,
    "changed: the log's entry of another signature": _moved,
    "changed: the time in the log's entry": _redated,
}
ENDED = {
    "an authority that had ended before": "certificateAuthorities",
    "a log of signatures whose key had ended before": "tlogs",
}


def _ended(name: str) -> dict[str, Any]:
    """A trust root in which one of those who vouch for signatures had ended before the first was made."""
    document = OURS.trusted_root()
    [one] = document[name]
    one.get("publicKey", one)["validFor"]["end"] = "2025-05-01T00:00:00Z"
    return document


def theirs(registry: Registry, repository: str, image: ImageManifest, root: Path, *more: str) -> str:
    """What cosign says of it: nothing, where it is good. (Its version 2 asks the public TUF repository, whatever it is given.)"""
    done = tools.attempt(
        "cosign", "verify", "--trusted-root", root, "--certificate-identity", IDENTITY, "--certificate-oidc-issuer", ISSUER,
        "--allow-http-registry", *more, f"{registry.host}/{repository}@{image.digest}", home=root.parent,
    )  # fmt: skip
    return "" if done.returncode == 0 else done.stderr.decode() or "?"


@pytest.mark.long
def test_cosign_says_the_same(registry: Registry, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What comes out is the table of docs/signing/identities.md (``pytest --regenerate`` writes it)."""
    tools.find("cosign")
    path = tmp_path / "trusted_root.json"
    lines = ["| the bundle | `ovm verify` | `cosign verify` |\n", "| --- | --- | --- |\n"]
    said = {True: "taken", False: "refused"}
    for number, case in enumerate([*GOOD, *BAD, *ENDED]):
        path.write_text(json.dumps(_ended(ENDED[case]) if case in ENDED else OURS.trusted_root()))
        signer = IdentitySigner("us", TrustRoot.load(path), IDENTITY, ISSUER)
        repository = f"keyless/{number}"
        made: Made = (GOOD | BAD).get(case) or OURS.bundle
        with RegistryClient(registry.host) as client:
            image = artifact(client, repository)
            attach(client, repository, image, made(image.digest))
            result = ours(client, repository, image, signer)
        other = theirs(registry, repository, image, path)
        assert isinstance(result, Good) is (other == "") is (case in GOOD), f"{case}: {other}"
        lines.append(f"| {case} | {said[isinstance(result, Good)]} | {said[other == '']} |\n")
    text = PAGE.read_text()
    whole = text[: text.index(BEGIN) + len(BEGIN)] + "".join(lines)
    if request.config.getoption("--regenerate"):
        PAGE.write_text(whole)
    assert whole == PAGE.read_text()


@pytest.mark.long
def test_cosign_says_the_same_of_a_clock(registry: Registry, tmp_path: Path) -> None:
    tools.find("cosign")
    sigstore = Sigstore(clock=Clock(tmp_path / "clock"))
    path = sigstore.write_root(tmp_path / "trusted_root.json")
    signer = IdentitySigner("us", TrustRoot.load(path), IDENTITY, ISSUER)
    with RegistryClient(registry.host) as client:
        for at, good in ((datetime.now(UTC), True), (datetime.now(UTC) - timedelta(hours=1), False)):
            repository = f"clock/{good}".lower()
            image = artifact(client, repository)
            attach(client, repository, image, sigstore.bundle(image.digest, at))
            result = ours(client, repository, image, signer)
            said = theirs(registry, repository, image, path, "--use-signed-timestamps")
            assert isinstance(result, Good) is (said == "") is good, said


@pytest.mark.long
@pytest.mark.parametrize("version", [1, 2])
def test_what_cosign_signs(registry: Registry, tmp_path: Path, version: int) -> None:
    """Without a key, with an authority, a log and a clock on loopback; each version of the log in its own way."""
    sigstore = Sigstore(clock=Clock(tmp_path / "clock"))
    path, config = tmp_path / "trusted_root.json", tmp_path / "signing_config.json"
    (tmp_path / "token").write_text(keyless_services.token())
    repository = f"cosign/{version}"
    with keyless_services.serving(sigstore) as url, RegistryClient(registry.host) as client:
        sigstore.write_root(path)
        more = ",start-time=2025-01-01T00:00:00Z,operator=ovms.example"
        services = [f"--fulcio=url={url},api-version=1{more}", f"--rekor=url={url},api-version={version}{more}"]
        if version == 2:
            services += [f"--tsa=url={url}/api/v1/timestamp,api-version=1{more}", "--tsa-config=ANY"]
        tools.run("cosign", "signing-config", "create", "--out", config, "--rekor-config=ANY", *services, home=tmp_path)
        image = artifact(client, repository)
        tools.run(
            "cosign", "sign", "--signing-config", config, "--trusted-root", path, "--identity-token", tmp_path / "token",
            "--allow-http-registry", "-y", f"{registry.host}/{repository}@{image.digest}", home=tmp_path,
        )  # fmt: skip
        root = TrustRoot.load(path)
        result = ours(client, repository, image, IdentitySigner("us", root, IDENTITY, ISSUER))
        assert isinstance(result, Good), result.detail
        assert result.signed_at is not None
        assert abs(result.signed_at - datetime.now(UTC)) < timedelta(minutes=5)
        assert isinstance(ours(client, repository, image, IdentitySigner("us", root, IDENTITY, f"{ISSUER}/x")), Bad)
