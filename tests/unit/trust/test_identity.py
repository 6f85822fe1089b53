"""Bundles made with certificates count for exactly the identity that the trusted authority vouched for, in time."""

from __future__ import annotations

import base64
import copy
import dataclasses
import glob
import json
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import pytest
import sigstore
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st
from support import keyless
from support.keyless import IDENTITY, ISSUER, SIGNED, Clock, Sigstore

from ovms.errors import InputError, ToolMissing
from ovms.spec.digest import Digest, of_bytes
from ovms.trust import identity, keys, payload
from ovms.trust.identity import IdentitySigner, TrustRoot
from ovms.trust.model import Bad, Format, Found, Good

SUBJECT = of_bytes(b"the artifact")
ANOTHER = of_bytes(b"another")
MANIFEST = of_bytes(b"m")
OURS = Sigstore()
STRANGE = Sigstore()
Change = Callable[[dict[str, Any]], object]


def rooted(path: Path, document: dict[str, Any]) -> TrustRoot:
    path.write_text(json.dumps(document))
    return TrustRoot.load(path)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> IdentitySigner:
    root = TrustRoot.load(OURS.write_root(tmp_path_factory.mktemp("root") / "trusted_root.json"))
    return IdentitySigner("us", root, IDENTITY, ISSUER)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "trusted_root.json"


@pytest.fixture(scope="module")
def bundle() -> dict[str, Any]:
    return OURS.bundle(SUBJECT)


@pytest.fixture(scope="module")
def clocked(tmp_path_factory: pytest.TempPathFactory) -> Sigstore:
    return dataclasses.replace(OURS, clock=Clock(tmp_path_factory.mktemp("clock")))


Stamped = tuple[TrustRoot, dict[str, Any]]


@pytest.fixture(scope="module")
def stamped(clocked: Sigstore, scratch: Path) -> Stamped:
    """A bundle with a timestamp, and what trusts the clock."""
    return rooted(scratch, clocked.trusted_root()), clocked.bundle(SUBJECT, now())


def found(document: Any) -> Found:
    return Found(Format.BUNDLE, MANIFEST, 0, json.dumps(document).encode(), "")


def why(signer: IdentitySigner, one: Found, subject: Digest = SUBJECT) -> str:
    result = signer.check(one, subject)
    assert isinstance(result, Bad)
    assert result.signer == signer.name
    assert result.detail.isprintable()
    assert len(result.detail) < 300
    # what was found, as pydantic shows it
    assert "[type=" not in result.detail
    return result.detail


def test_good_ones(signer: IdentitySigner, bundle: dict[str, Any]) -> None:
    one = found(bundle)
    assert signer.check(one, SUBJECT) == Good(one, "us", SIGNED)
    workflow = "https://git.example/ovms/.build/release.yml@refs/tags/v1"
    one = found(OURS.bundle(SUBJECT, identity=workflow))
    assert isinstance(dataclasses.replace(signer, identity=workflow).check(one, SUBJECT), Good)


def test_nothing_is_asked_of_anybody(
    signer: IdentitySigner, bundle: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise AssertionError("it went online")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert isinstance(signer.check(found(bundle), SUBJECT), Good)


def test_the_package_is_imported_when_it_is_needed() -> None:
    script = "import sys, ovms.trust.identity; sys.exit(' '.join({'sigstore', 'cryptography', 'pydantic'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("missing", ["issuer", "old_issuer"])
def test_either_extension_tells_the_issuer(signer: IdentitySigner, missing: str) -> None:
    issued: dict[str, Any] = {missing: None}
    assert isinstance(signer.check(found(OURS.bundle(SUBJECT, **issued)), SUBJECT), Good)


def test_another_subject(signer: IdentitySigner, bundle: dict[str, Any]) -> None:
    assert "over another digest" in why(signer, found(bundle), ANOTHER)
    provenance = json.dumps(
        {**json.loads(payload.statement(SUBJECT)), "predicateType": "https://slsa.dev/provenance/v1"}
    )
    assert "no signature of an artifact" in why(signer, found(OURS.bundle(SUBJECT, statement=provenance.encode())))


@pytest.mark.parametrize(
    "issued",
    [
        {"identity": "mallory@ovms.example"},
        {"identity": f"x{IDENTITY}"},
        {"identity": f"{IDENTITY}.x"},
        {"identity": IDENTITY.upper()},
        {"identity": f"https://{IDENTITY}"},
        {"issuer": "https://accounts.example"},
        {"issuer": f"{ISSUER}/"},
        # the two extensions contradict each other
        {"old_issuer": "https://accounts.example"},
        {"issuer": "https://accounts.example", "old_issuer": None},
        {"issuer": None, "old_issuer": "https://accounts.example"},
        {"issuer": "", "old_issuer": ""},
    ],
    ids=str,
)
def test_another_identity(signer: IdentitySigner, issued: dict[str, Any]) -> None:
    assert "made by another identity" in why(signer, found(OURS.bundle(SUBJECT, **issued)))


def test_an_identity_of_nobody(signer: IdentitySigner) -> None:
    assert "does not say who issued" in why(signer, found(OURS.bundle(SUBJECT, issuer=None, old_issuer=None)))
    hostile = "\x1b[31m\nGood@ovms.example"
    assert "another identity" in why(signer, found(OURS.bundle(SUBJECT, issuer=hostile)))


@pytest.mark.parametrize(
    ("made", "detail"),
    [
        (lambda: dataclasses.replace(OURS, authority=STRANGE.authority).bundle(SUBJECT), "no authority"),
        (lambda: dataclasses.replace(OURS, certificates=STRANGE.certificates).bundle(SUBJECT), "SCT"),
        (lambda: dataclasses.replace(OURS, signatures=STRANGE.signatures).bundle(SUBJECT), "log entry"),
        (lambda: STRANGE.bundle(SUBJECT), "no authority"),
        (lambda: OURS.bundle(SUBJECT, sct=False), "SCT"),
        (lambda: OURS.bundle(SUBJECT, logged=False), "one log entry"),
        (lambda: OURS.bundle(SUBJECT, late=timedelta(hours=1)), "and it was made 2025-06-01T13:00:00Z"),
        (lambda: OURS.bundle(SUBJECT, late=timedelta(hours=-1)), "and it was made 2025-06-01T11:00:00Z"),
        (lambda: OURS.bundle(SUBJECT, usage=ExtendedKeyUsageOID.CLIENT_AUTH), "code signing"),
    ],
    ids=["authority", "ct", "log", "all", "no-sct", "no-entry", "expired", "not-yet", "usage"],
)
def test_a_strangers_or_at_another_time(
    signer: IdentitySigner, made: Callable[[], dict[str, Any]], detail: str
) -> None:
    assert detail in why(signer, found(made()))


def entry(document: dict[str, Any]) -> dict[str, Any]:
    [one] = document["verificationMaterial"]["tlogEntries"]
    return one  # type: ignore[no-any-return]


def other() -> dict[str, Any]:
    return OURS.bundle(SUBJECT)


def _flip(inner: dict[str, Any], name: str, at: int = -1) -> None:
    data = bytearray(base64.b64decode(inner[name]))
    data[at] ^= 1
    inner[name] = keyless.b64(bytes(data))


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda d: _flip(d["verificationMaterial"]["certificate"], "rawBytes"), ""),
        (lambda d: _flip(d["dsseEnvelope"]["signatures"][0], "sig"), "invalid signature"),
        (lambda d: d["dsseEnvelope"].update(other()["dsseEnvelope"]), "invalid signature"),
        (lambda d: d["verificationMaterial"].update(certificate=other()["verificationMaterial"]["certificate"]), "invalid signature"),
        # a whole entry, of another signature
        (lambda d: d["verificationMaterial"].update(tlogEntries=other()["verificationMaterial"]["tlogEntries"]), "do not match"),
        (lambda d: d["verificationMaterial"].update(tlogEntries=[entry(d)] * 2), "one log entry"),
        (lambda d: entry(d).update(integratedTime=str(int(SIGNED.timestamp()) + 1)), "promise"),
        (lambda d: entry(d).update(integratedTime="9" * 4000), ""),
        (lambda d: entry(d).update(integratedTime=str(2**63)), ""),
        (lambda d: entry(d).update(integratedTime="0"), "tells its time"),
        (lambda d: entry(d).pop("integratedTime"), "tells its time"),
        (lambda d: entry(d).pop("inclusionPromise"), "promise or signed timestamp"),
        (lambda d: entry(d).pop("inclusionProof"), "nclusionProof"),
        (lambda d: entry(d)["inclusionProof"].pop("checkpoint"), "checkpoint"),
        (lambda d: entry(d)["inclusionProof"]["hashes"].pop(), "inclusion proof"),
        (lambda d: entry(d)["inclusionProof"].update(rootHash=keyless.b64(bytes(32))), "inclusion proof"),
        (lambda d: entry(d)["inclusionProof"].update(checkpoint=entry(other())["inclusionProof"]["checkpoint"]), "root hash"),
        (lambda d: entry(d)["kindVersion"].update(kind="hashedrekord"), "log entry type"),
        (lambda d: _flip(entry(d), "canonicalizedBody"), "inclusion proof"),
        (lambda d: d["verificationMaterial"].update(x509CertificateChain={"certificates": []}), "one certificate"),
        (lambda d: d["verificationMaterial"].update(x509CertificateChain=d["verificationMaterial"].pop("certificate")), ""),
        # what only one of the two parsers knows
        (lambda d: d.update(dsse_envelope=other()["dsseEnvelope"]), ""),
        (lambda d: d["dsseEnvelope"].update(payload_type="text/plain"), ""),
        (lambda d: d.update(mediaType="application/vnd.dev.sigstore.bundle+json;version=0.1"), "of the type"),
    ],
)  # fmt: skip
def test_a_changed_bundle(signer: IdentitySigner, bundle: dict[str, Any], change: Change, detail: str) -> None:
    document = copy.deepcopy(bundle)
    change(document)
    assert detail in why(signer, found(document))


def test_a_key_or_another_format(signer: IdentitySigner) -> None:
    key = keys.generate()
    statement = payload.statement(SUBJECT)
    data = payload.bundle(key.public.hint, statement, key.sign(payload.pae(payload.IN_TOTO, statement)))
    assert "with a key" in why(signer, Found(Format.BUNDLE, MANIFEST, 0, data, ""))
    simple = payload.simple(SUBJECT, "r/x")
    notes = (("dev.sigstore.cosign/certificate", "x"),)
    for kind in (Format.CLASSIC, Format.REFERRER):
        assert "bundles alone" in why(signer, Found(kind, MANIFEST, 0, simple, "", notes))


def test_what_only_one_parser_sees(signer: IdentitySigner, bundle: dict[str, Any]) -> None:
    class Other(TrustRoot):
        def verify(self, data: bytes, policy: Any) -> tuple[str, bytes, datetime]:
            kind, signed, at = signer.root.verify(data, policy)
            return kind, signed.replace(b"{}", b"{ }"), at

    assert "in two ways" in why(dataclasses.replace(signer, root=Other({})), found(bundle))


# --- clocks ----------------------------------------------------------------------------------------------------------


def now() -> datetime:
    return datetime.now(UTC)


def stamps(document: dict[str, Any]) -> list[Any]:
    return document["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"]  # type: ignore[no-any-return]


def test_a_clock_tells_the_time(signer: IdentitySigner, clocked: Sigstore, tmp_path: Path) -> None:
    document = clocked.bundle(SUBJECT, now())
    ours = dataclasses.replace(signer, root=rooted(tmp_path / "root", clocked.trusted_root()))
    result = ours.check(found(document), SUBJECT)
    assert isinstance(result, Good)
    assert result.signed_at is not None
    assert abs(result.signed_at - now()) < timedelta(minutes=5)
    # a time that the log did not sign
    again = copy.deepcopy(document)
    entry(again)["integratedTime"] = str(int(result.signed_at.timestamp()) + 60)
    assert ours.check(found(again), SUBJECT) == dataclasses.replace(result, found=found(again))
    # a trust root without a clock, and with another
    assert "no Timestamp Authorities" in why(signer, found(document))
    assert clocked.clock is not None
    stranger = Clock(tmp_path / "clock")
    other = rooted(tmp_path / "other", dataclasses.replace(clocked, clock=stranger).trusted_root())
    assert "verified time" in why(dataclasses.replace(signer, root=other), found(document))
    ended = clocked.trusted_root()
    ended["timestampAuthorities"][0]["validFor"]["end"] = keyless.rfc3339(SIGNED)
    late = rooted(tmp_path / "ended", ended)
    assert "verified time" in why(dataclasses.replace(signer, root=late), found(document))

    again = copy.deepcopy(document)
    stamps(again)[0] = {"signedTimestamp": keyless.b64(clocked.clock.stamp(b"something else"))}
    assert "verified time" in why(ours, found(again))
    again = copy.deepcopy(document)
    stamps(again)[:] = []
    assert "timestamp" in why(ours, found(again))
    again = copy.deepcopy(document)
    stamps(again).append({"signedTimestamp": keyless.b64(clocked.clock.stamp(b"something else"))})
    assert "this one has 2" in why(ours, found(again))
    again = copy.deepcopy(document)
    _flip(stamps(again)[0], "signedTimestamp", 40)
    assert why(ours, found(again))
    # a good clock does not help a certificate that was not valid then
    old = clocked.bundle(SUBJECT, now() - timedelta(hours=1))
    assert "its certificate was good from" in why(ours, found(old))


def test_a_panic_is_no_signature(signer: IdentitySigner, clocked: Sigstore, tmp_path: Path) -> None:
    document = clocked.trusted_root()
    [clock] = document["timestampAuthorities"]
    certificate = clock["certChain"]["certificates"][1]
    name = b"\x0c\x0aclock root"
    der = base64.b64decode(certificate["rawBytes"])
    assert name in der
    # a name that is no UTF-8
    certificate["rawBytes"] = keyless.b64(der.replace(name, name[:-1] + b"\xff"))
    with pytest.raises(InputError, match="can't be used"):
        rooted(tmp_path / "root", document)
    # without that check, the parser of timestamps panics
    ours = dataclasses.replace(signer, root=TrustRoot(document))
    assert "unwrap()" in why(ours, found(clocked.bundle(SUBJECT, now())))


def test_what_stops_a_check_is_not_taken_for_its_result(signer: IdentitySigner, bundle: dict[str, Any]) -> None:
    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    policy = type("Policy", (), {"verify": stop})()
    with pytest.raises(KeyboardInterrupt):
        signer.root.verify(found(bundle).payload, policy)


# --- trust roots -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "detail"), [("tlogs", "no log of signatures"), ("certificateAuthorities", "no certificate authority")]
)
@pytest.mark.parametrize(
    ("start", "end", "good"),
    [
        (None, None, True),
        ("2025-06-01T12:00:00Z", "2025-06-01T12:00:00Z", True),
        ("2025-06-01T14:00:00+02:00", None, True),
        ("2025-06-01T12:00:01Z", None, False),
        (None, "2025-06-01T11:59:59.999Z", False),
    ],
)
def test_what_vouches_for_it_was_valid_then(
    signer: IdentitySigner, bundle: dict[str, Any], tmp_path: Path, name: str, detail: str,
    start: str | None, end: str | None, good: bool,
) -> None:  # fmt: skip
    document = OURS.trusted_root()
    [one] = document[name]
    period = {key: value for key, value in (("start", start), ("end", end)) if value}
    one.get("publicKey", one)["validFor"] = {"start": "2024-01-01T00:00:00Z", **period}
    dated = dataclasses.replace(signer, root=rooted(tmp_path / "root", document))
    if good:
        assert isinstance(dated.check(found(bundle), SUBJECT), Good)
    else:
        assert f"{detail} that was valid then (2025-06-01)" in why(dated, found(bundle))


def test_one_of_several_is_enough(signer: IdentitySigner, bundle: dict[str, Any], tmp_path: Path) -> None:
    ours, strange = OURS.trusted_root(), STRANGE.trusted_root()
    both = {**ours, **{name: strange[name] + ours[name] for name in ("tlogs", "ctlogs", "certificateAuthorities")}}
    several = dataclasses.replace(signer, root=rooted(tmp_path / "root", both))
    assert isinstance(several.check(found(bundle), SUBJECT), Good)


def test_the_public_trust_root_is_read() -> None:
    [path] = glob.glob(f"{Path(sigstore.__file__).parent}/_store/*sigstore.dev/trusted_root.json")  # noqa: PTH207 - odd name
    TrustRoot.load(Path(path))


def _root(change: Change) -> Callable[[], bytes]:
    def made() -> bytes:
        document = OURS.trusted_root()
        change(document)
        return json.dumps(document).encode()

    return made


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (lambda: b"", "is empty"),
        (lambda: b" " * (identity.ROOT_MAX + 1), "are allowed"),
        (lambda: b"\x1b", "is not JSON"),
        (lambda: b"[]", "no JSON object"),
        (lambda: b"[" * 100, "deeper"),
        (lambda: b"{}", "names no certificate authority"),
        (_root(lambda d: d.update(tlogs=[])), "names no log of signatures"),
        (_root(lambda d: d.update(timestampAuthorities=[{}] * 10_000)), "more than 10000 values"),
        (_root(lambda d: d.pop("ctlogs")), "names no log of certificates"),
        (_root(lambda d: d.update(ctlogs=d["ctlogs"] * 65)), "at most 64"),
        (_root(lambda d: d.update(mediaType="x\x1b")), "can't be used: "),
        (_root(lambda d: d["certificateAuthorities"][0].update(certChain={"certificates": []})), "can't be used: "),
        (_root(lambda d: d["certificateAuthorities"][0]["certChain"]["certificates"][0].update(rawBytes="AAAA")), "can't be used: "),
        (_root(lambda d: d["certificateAuthorities"][0].update(validFor="x")), "certificateAuthorities[0] has no validity"),
        (_root(lambda d: d["tlogs"][0]["publicKey"].update(validFor={"start": "yesterday"})), "tlogs[0] has no validity"),
        (_root(lambda d: d["tlogs"][0]["publicKey"].update(validFor={"start": 7})), "tlogs[0] has no validity"),
        # names that other writers of the format use
        (_root(lambda d: d["tlogs"][0].update(public_key=d["tlogs"][0].pop("publicKey"))), "tlogs[0] has no validity"),
        (_root(lambda d: d["tlogs"][0]["publicKey"].update(valid_for=d["tlogs"][0]["publicKey"].pop("validFor"))), "tlogs[0] has no validity"),
        (_root(lambda d: d["tlogs"].append("x")), "tlogs[1] has no validity"),
        (_root(lambda d: d["tlogs"][0].pop("publicKey")), "can't be used: "),
    ],
)  # fmt: skip
def test_a_file_that_is_no_trust_root(data: Callable[[], bytes], detail: str, tmp_path: Path) -> None:
    path = tmp_path / "trusted_root.json"
    path.write_bytes(data())
    with pytest.raises(InputError) as caught:
        TrustRoot.load(path)
    assert detail in caught.value.message
    assert caught.value.message.isprintable()


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        TrustRoot.load(tmp_path / "nothing")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sigstore.errors", None)
    with pytest.raises(ToolMissing) as caught:
        TrustRoot.load(OURS.write_root(tmp_path / "root"))
    assert caught.value.hint is not None
    assert "ovms[keyless]" in caught.value.hint


def test_a_key_of_an_unknown_kind_is_not_trusted(
    signer: IdentitySigner, bundle: dict[str, Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # as in a program that sets up no logging
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    document = OURS.trusted_root()
    document["tlogs"][0]["publicKey"]["keyDetails"] = "PKIX_ECDSA_P384_SHA_256"
    ours = dataclasses.replace(signer, root=rooted(tmp_path / "root", document))
    assert "log entry" in why(ours, found(bundle))
    assert capsys.readouterr() == ("", "")


# --- whatever strangers write ----------------------------------------------------------------------------------------


def _places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _put(document: Any, path: tuple[str | int, ...], value: Any) -> Any:
    if not path:
        return value
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return document


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
    | st.binary(max_size=40).map(keyless.b64) | st.integers(0, 2**70).map(str),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
EXAMPLE = OURS.bundle(SUBJECT)
PLACES = sorted(_places(EXAMPLE), key=str)
ROOT_PLACES = sorted(_places(OURS.trusted_root()), key=str)


@given(st.sampled_from(PLACES), JSON)
def test_nothing_in_a_bundle_makes_it_raise(signer: IdentitySigner, place: tuple[str | int, ...], value: Any) -> None:
    document = _put(copy.deepcopy(EXAMPLE), place, value)
    result = signer.check(found(document), SUBJECT)
    if isinstance(result, Good):
        # what nobody signed: which log it is (all are tried), and where in it
        assert result.signed_at == SIGNED
        assert document == EXAMPLE or place[-1] in ("logId", "keyId", "mediaType", "tlogEntries")
    else:
        assert result.detail.isprintable()
        assert len(result.detail) < 300


TEXTS = {"rawBytes", "sig", "payload", "canonicalizedBody", "signedEntryTimestamp"}


@pytest.mark.parametrize(
    "change",
    [
        lambda d: entry(d)["inclusionProof"].update(hashes=[1] * 100_000),
        lambda d: d["verificationMaterial"].update(tlogEntries=[{}] * 100_000),
        lambda d: d["verificationMaterial"].update(tlogEntries=[[[]] * 9] * 50),
        lambda d: d.update({str(i): 1 for i in range(40_000)}),
    ],
)
def test_a_bundle_of_many_small_mistakes(signer: IdentitySigner, bundle: dict[str, Any], change: Change) -> None:
    # each of which would be described: 600 MB, and six seconds
    document = copy.deepcopy(bundle)
    change(document)
    assert "more than 500 values" in why(signer, found(document))


def test_a_bundle_with_the_longest_proof(signer: IdentitySigner, bundle: dict[str, Any]) -> None:
    document = copy.deepcopy(bundle)
    entry(document)["inclusionProof"]["hashes"] = [keyless.b64(bytes(32))] * 128
    assert "wrong size" in why(signer, found(document))


BYTES = [place for place in PLACES if TEXTS.intersection(place)]


@given(st.sampled_from(BYTES), st.data())
def test_no_bit_can_be_changed(signer: IdentitySigner, place: tuple[str | int, ...], data: st.DataObject) -> None:
    document = copy.deepcopy(EXAMPLE)
    inner: Any = document
    for key in place[:-1]:
        inner = inner[key]
    changed = bytearray(base64.b64decode(inner[place[-1]]))
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    inner[place[-1]] = keyless.b64(bytes(changed))
    assert why(signer, found(document))


@given(st.data())
def test_no_bit_of_a_timestamp_changes_the_time(signer: IdentitySigner, stamped: Stamped, data: st.DataObject) -> None:
    root, example = stamped
    ours = dataclasses.replace(signer, root=root)
    expected = ours.check(found(example), SUBJECT)
    assert isinstance(expected, Good)
    document = copy.deepcopy(example)
    changed = bytearray(base64.b64decode(stamps(document)[0]["signedTimestamp"]))
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    stamps(document)[0]["signedTimestamp"] = keyless.b64(bytes(changed))
    result = ours.check(found(document), SUBJECT)
    # some of it nobody signed
    assert isinstance(result, Bad) or result.signed_at == expected.signed_at


@given(st.sampled_from(ROOT_PLACES), JSON)
def test_nothing_in_a_trust_root_leaks_another_error(scratch: Path, place: tuple[str | int, ...], value: Any) -> None:
    try:
        root = rooted(scratch, _put(OURS.trusted_root(), place, value))
    except InputError as exc:
        assert exc.message.isprintable()  # noqa: PT017 - it need not be raised
    else:
        IdentitySigner("us", root, IDENTITY, ISSUER).check(found(EXAMPLE), SUBJECT)
