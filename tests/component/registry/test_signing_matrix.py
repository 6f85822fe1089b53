"""Who takes whose signatures: ovm and two versions of the real cosign, in every form, on two registries.

What comes out is the table of docs/signing/matrix.md (``pytest --regenerate`` writes it).
"""

from __future__ import annotations

import base64
import json
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from support import artifacts, tools
from support.cli import Ovm
from support.registry import Registry
from support.rfc import ROOT

from ovms.artifact.attach import remote_manifest
from ovms.oci import cosign
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.spec.digest import Digest, hex_of
from ovms.trust.model import Format, Found
from ovms.trust.sources import RegistrySource

MATRIX: Final = ROOT / "docs" / "signing" / "matrix.md"
BEGIN: Final = "<!-- what the test found -->\n"
PASSWORD: Final = "correct horse"
#: Registries without TLS on loopback, and no online service.
OFFLINE: Final = ("--allow-http-registry",)
COSIGN: Final = {"cosign 3": "cosign", "cosign 2": "cosign-2"}
SIGN: Final = {
    "cosign 3": {
        Format.BUNDLE: (),
        Format.REFERRER: ("--new-bundle-format=false", "--registry-referrers-mode=oci-1-1"),
        Format.CLASSIC: ("--new-bundle-format=false",),
    },
    "cosign 2": {Format.REFERRER: ("--registry-referrers-mode=oci-1-1",), Format.CLASSIC: ()},
}
VERIFY: Final = {
    "cosign 3": {
        Format.BUNDLE: (),
        Format.REFERRER: ("--new-bundle-format=false", "--experimental-oci11"),
        Format.CLASSIC: ("--new-bundle-format=false",),
    },
    "cosign 2": {Format.REFERRER: ("--experimental-oci11",), Format.CLASSIC: ()},
}
VERIFIERS: Final = ("ovm", *COSIGN)
#: Who signs, and with which of the keys.
SIGNERS: Final = {
    "ovm": "ovm",
    "ovm, a PEM key of openssl": "pem",
    "ovm, a program with the key": "exec",
    "cosign 3": "cosign",
    "cosign 2": "cosign",
}
TAKEN, REFUSED = "✓", "✗"
MAKES_NONE, READS_NONE = "makes none", "reads none"
CASES: Final = ("good", "wrong key", "moved", "changed")


@dataclass(frozen=True)
class Bench:
    """Keys, and everybody's programs."""

    ovm: Ovm
    keys: Path
    host: str

    def public(self, kind: str) -> Path:
        return self.keys / f"{kind}.pub"

    def private(self, kind: str) -> str:
        if kind == "exec":
            return f"exec:{self.keys / 'signer'} {shlex.quote(str(self.keys / 'exec.pem'))}"
        return str(self.keys / (f"{kind}.pem" if kind == "pem" else f"{kind}.key"))

    def cosign(self, who: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
        env = {"COSIGN_PASSWORD": PASSWORD, "COSIGN_EXPERIMENTAL": "1"}
        return tools.attempt(COSIGN[who], *arguments, home=self.ovm.home, env=env)

    def sign(self, who: str, form: Format, target: str, key: str) -> None:
        if who.startswith("ovm"):
            done = self.ovm("sign", target, "--key", key, "--format", form, env={"OVMS_KEY_PASSWORD": PASSWORD})
            assert done.code == 0, done.err
            return
        offline = ("--use-signing-config=false",) if who == "cosign 3" else ()
        signed = self.cosign(
            who, "sign", "--key", key, "--tlog-upload=false", "-y", *offline, *OFFLINE, *SIGN[who][form], target
        )
        assert signed.returncode == 0, signed.stderr.decode()

    def verify(self, who: str, form: Format, target: str, key: str) -> bool:
        """Whether it is taken; a refusal for another reason than the signature fails the test."""
        public = self.public(key)
        if who == "ovm":
            done = self.ovm("verify", target, "--key", public)
            assert done.code in (0, 14), done.err
            return done.code == 0
        checked = self.cosign(
            who, "verify", "--key", public, "--insecure-ignore-tlog", *OFFLINE, *VERIFY[who][form], target
        )
        said = checked.stderr.decode()
        assert checked.returncode == 0 or "signature" in said or "attestation" in said, said
        return checked.returncode == 0


@pytest.fixture(scope="module")
def bench(each_registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    directory = tmp_path_factory.mktemp("matrix")
    for name in ("root", "home", "keys"):
        (directory / name).mkdir()
    ovm = Ovm(directory / "root", directory / "home")
    bench = Bench(ovm, directory / "keys", each_registry.host)
    for name in COSIGN.values():
        tools.find(name)
    for prefix in ("ovm", "other"):
        done = ovm("key", "generate", "--output-key-prefix", bench.keys / prefix, env={"OVMS_KEY_PASSWORD": PASSWORD})
        assert done.code == 0, done.err
    made = bench.cosign("cosign 2", "generate-key-pair", "--output-key-prefix", bench.keys / "cosign")
    assert made.returncode == 0, made.stderr.decode()
    for kind in ("pem", "exec"):
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", bench.keys / f"{kind}.pem")
        openssl("ec", "-in", bench.keys / f"{kind}.pem", "-pubout", "-out", bench.public(kind))
    signer = bench.keys / "signer"
    signer.write_text(
        "#!/bin/sh\n"
        'case "$2" in\n'
        '    public-key) exec openssl ec -in "$1" -pubout ;;\n'
        '    sign) exec openssl dgst -sha256 -sign "$1" ;;\n'
        "esac\n"
    )
    signer.chmod(0o755)
    return bench


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=30)


def push(bench: Bench, name: str, version: str) -> str:
    """A new artifact in a repository of its own. Returns what names it."""
    tag = f"{bench.host}/{name}:{version}"
    artifacts.small(Layout(bench.ovm.root / "store"), tag)
    return bench.ovm.ok("push", tag).out.strip().replace(f":{version}@", "@")


def transplant(bench: Bench, form: Format, source: str, target: str, *, rewrite: bool) -> None:
    """Puts the signature of one artifact beside another one; with *rewrite* its digest is put into it, too."""
    old, new = Reference.parse(source), Reference.parse(target)
    assert old.digest is not None
    assert new.digest is not None
    with RegistryClient(bench.host) as client:
        (found,) = RegistrySource(client, old.repository).signatures(old.digest)
        assert isinstance(found, Found)
        data = found.payload
        if rewrite:
            data = changed(form, data, old.digest, new.digest)
        subject = remote_manifest(client, new).descriptor()
        if form is Format.BUNDLE:
            image = cosign.bundle_manifest(data, subject, "2026-01-01T00:00:00Z")
            cosign.push(client, new.repository, image, (cosign.EMPTY, data))
            return
        layer = Descriptor.of(cosign.SIMPLE_SIGNING, data, {cosign.SIGNATURE_ANNOTATION: found.signature})
        if form is Format.CLASSIC:
            cosign.add_classic(client, new.repository, new.digest, layer, data)
            return
        image, config = cosign.referrer_manifest(layer, subject)
        cosign.push(client, new.repository, image, (config, data))


def changed(form: Format, data: bytes, old: Digest, new: Digest) -> bytes:
    if form is not Format.BUNDLE:
        assert old.encode() in data
        return data.replace(old.encode(), new.encode())
    document = json.loads(data)
    envelope = document["dsseEnvelope"]
    statement = base64.b64decode(envelope["payload"])
    assert hex_of(old).encode() in statement
    envelope["payload"] = base64.b64encode(statement.replace(hex_of(old).encode(), hex_of(new).encode())).decode()
    return json.dumps(document).encode()


def row(bench: Bench, form: Format, signer: str) -> list[str]:
    """A line of the table: for each verifier, what it makes of each case."""
    if signer in SIGN and form not in SIGN[signer]:
        return [MAKES_NONE] * len(VERIFIERS)
    name = f"{form}-{signer}".replace(",", "").replace(" ", "-").lower()
    good, moved, other = (push(bench, f"{name}-{case}", case) for case in ("good", "moved", "changed"))
    bench.sign(signer, form, good, bench.private(SIGNERS[signer]))
    transplant(bench, form, good, moved, rewrite=False)
    transplant(bench, form, good, other, rewrite=True)
    key = SIGNERS[signer]
    cells = []
    for verifier in VERIFIERS:
        if verifier in VERIFY and form not in VERIFY[verifier]:
            cells.append(READS_NONE)
            continue
        taken = [
            bench.verify(verifier, form, target, by)
            for target, by in ((good, key), (good, "other"), (moved, key), (other, key))
        ]
        cells.append(" ".join(TAKEN if one else REFUSED for one in taken))
    return cells


def table(rows: Sequence[Sequence[str]]) -> str:
    head = ("form", "signed by", *(f"verified by {verifier}" for verifier in VERIFIERS))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


#: How openssl makes a key of each other kind, and whether cosign 3.1 takes what it signs with one itself.
KINDS: Final = {
    "P-384": (("ecparam", "-name", "secp384r1", "-genkey", "-noout"), True),
    "P-521": (("ecparam", "-name", "secp521r1", "-genkey", "-noout"), True),
    "Ed25519": (("genpkey", "-algorithm", "ed25519"), False),
    "RSA": (("genrsa", "2048"), True),
}


@pytest.mark.long
@pytest.mark.parametrize("each_registry", ["docker-registry"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_other_kinds(bench: Bench, kind: str) -> None:
    make, signs = KINDS[kind]
    path = bench.keys / f"{kind}.pem"
    path.write_bytes(subprocess.run(["openssl", *make], check=True, capture_output=True, timeout=30).stdout)
    bench.public(kind).write_text(bench.ovm.ok("key", "public", path).out)
    imported = bench.cosign(
        "cosign 3", "import-key-pair", "--key", path, "--output-key-prefix", bench.keys / kind, "-y"
    )
    assert imported.returncode == 0, imported.stderr.decode()
    for form in Format:
        ours, theirs = (push(bench, f"{kind}-{form}-{who}".lower(), "1") for who in ("ovm", "cosign"))
        assert bench.ovm("sign", ours, "--key", path, "--format", form).code == 0
        for who in VERIFIERS:
            assert form not in VERIFY.get(who, Format) or bench.verify(who, form, ours, kind), (who, form)
        if signs:
            bench.sign("cosign 3", form, theirs, bench.private(kind))
            assert bench.verify("ovm", form, theirs, kind)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_matrix(bench: Bench, request: pytest.FixtureRequest) -> None:
    rows = [[form.value, signer, *row(bench, form, signer)] for form in Format for signer in SIGNERS]
    unsigned = push(bench, "unsigned", "1")
    nothing = [
        TAKEN if any(bench.verify(who, form, unsigned, "ovm") for form in VERIFY.get(who, Format)) else REFUSED
        for who in VERIFIERS
    ]
    found = table([*rows, ["none", "nobody (unsigned)", *nothing]])
    # whatever the table says: nobody takes what is not good, and ovm takes all that is
    refused = " ".join([REFUSED] * (len(CASES) - 1))
    for _, _, *cells in rows:
        assert cells[0] in (f"{TAKEN} {refused}", MAKES_NONE)
        assert all(cell.endswith(refused) or cell in (MAKES_NONE, READS_NONE) for cell in cells)
    text = MATRIX.read_text()
    before = text[: text.index(BEGIN) + len(BEGIN)]
    if request.config.getoption("--regenerate"):
        MATRIX.write_text(before + found)
    assert before + found == MATRIX.read_text()
