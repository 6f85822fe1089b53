"""The parsers of foreign bytes. Each takes any bytes, and what it raises is an OvmsError or nothing.

Some look deeper than their parser alone: what was read is used as it will be, and what two ways of reading must agree on is
compared. An AssertionError is a finding like any other.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

from support import keyless

from fuzz.seeds import CORPUS
from ovms.artifact import document, kernels, kinds, model
from ovms.cli import output, terminal
from ovms.disk import layers, qcow2, seed
from ovms.errors import AgentUnavailable, InputError, OvmsError, VmmError
from ovms.memory import chain
from ovms.oci import (
    auth,
    authfile,
    connections,
    credentials,
    platform,
    referrers,
    registries,
    registry,
    route,
    small,
    source,
    tar,
    transport,
)
from ovms.oci.descriptor import Descriptor, ImageIndex, ImageManifest, parse_manifest
from ovms.oci.reference import Reference
from ovms.oci.session import Session, Settings
from ovms.runtime import agent, guest, logrecords, logs, seeds
from ovms.runtime.server import http
from ovms.spec import api, bootstrap, limits, manifest, mediatypes, ramcrypt, ramheader, ramsnap, strictjson
from ovms.spec.digest import Digest, of_bytes
from ovms.spec.manifest import DiskFormat
from ovms.trust import keys, payload
from ovms.trust.identity import IdentitySigner, TrustRoot
from ovms.trust.model import Bad, Format, Found, Good, Signer
from ovms.trust.signers import KeySigner
from ovms.vmm.model import VmFiles
from ovms.vmm.qemu import qmp, state

DIRECTORY = Path(tempfile.mkdtemp(prefix="ovms-fuzz-"))
atexit.register(shutil.rmtree, DIRECTORY, ignore_errors=True)
_FD = os.memfd_create("input")
DIGEST = "sha256:" + "a" * 64


@dataclass(frozen=True)
class Target:
    """A parser: what is called with each input, and where its seeds are, below ``spec/vectors``."""

    run: Callable[[bytes], None]
    vectors: tuple[str, ...] = ()
    #: Bytes of an input at most.
    size: int = 4096


TARGETS: dict[str, Target] = {}


def target(*vectors: str, size: int = 4096) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    def add(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
        TARGETS[run.__name__.replace("_", "-")] = Target(run, vectors, size)
        return run

    return add


def opened(data: bytes) -> int:
    """A file with this content."""
    os.ftruncate(_FD, 0)
    os.pwrite(_FD, data, 0)
    return _FD


@contextlib.contextmanager
def said_safely(kind: type[OvmsError] = OvmsError) -> Iterator[None]:
    """Lets an error pass by that tells nothing which drives a terminal."""
    try:
        yield
    except kind as exc:
        if not exc.message.isprintable():
            raise AssertionError(ascii(exc.message)) from exc


def written(name: str, data: bytes) -> Path:
    path = DIRECTORY / name
    path.write_bytes(data)
    return path


# --- what an artifact consists of ------------------------------------------------------------------------------------


@target("disk/*/*.img", "hostile/*/qcow2-*")
def qcow2_header(data: bytes) -> None:
    fd = opened(data)
    with contextlib.suppress(OvmsError):
        info = qcow2.check_header(fd, "the layer")
        assert 0 < info.virtual_size <= limits.DISK_VIRTUAL_MAX
        qcow2.is_empty(fd, "the layer")
    with contextlib.suppress(OvmsError):
        layers.check_layer(fd, DiskFormat.RAW, "the layer")
        assert data[:4] != qcow2.MAGIC


@target("kernel/*/*.bin", "hostile/*/kernel-*")
def kernel(data: bytes) -> None:
    with contextlib.suppress(OvmsError):
        kernels.check_kernel(opened(data))


class _Decrypted(ramcrypt.Cipher):
    """Who encrypts for us may be hostile: what comes out is then whatever they like."""

    def decrypt_state(self, encrypted: bytes, bound: bytes) -> bytes:
        return encrypted[:-16]

    def decrypt_chunk(self, page: int, pages: int, codec: int, encrypted: bytes | memoryview) -> bytes:
        return bytes(encrypted)[:-16]


_CIPHERS = (ramcrypt.Cipher(bytes(ramcrypt.KEY_SIZE)), _Decrypted(bytes(ramcrypt.KEY_SIZE)))


@target("ramsnap/*/*.ovmr", "hostile/*/ramsnap-*", size=16384)
def ram_snapshot(data: bytes) -> None:
    # with the digest of its control part, as an attacker would have it: else nothing behind it is ever reached
    if len(data) >= 128:
        at, entries = struct.unpack_from("<QQ", data, 64)
        data = data[:96] + sha256(data[128 : at + entries * 64]).digest() + data[128:]
    fd = opened(data)
    with contextlib.suppress(OvmsError):
        prefix = chain.read_prefix(fd)
        control = ramsnap.parse_control(os.pread(fd, min(prefix.data_offset, len(data)), 0))
        ramheader.check_chain([(DIGEST, control.header)])
        for cipher in _CIPHERS:
            if control.encrypted is not None:
                with contextlib.suppress(OvmsError):
                    ramsnap.decrypt_state(control, cipher)
            for one in control.chunks[:64]:
                assert (one.page + one.pages) * ramsnap.PAGE <= control.header.memory
                with contextlib.suppress(OvmsError):
                    stored = os.pread(fd, one.stored_size, prefix.data_offset + one.offset)
                    ramsnap.unpack_chunk(one, stored, prefix.data_offset, cipher)


@target(size=8192)
def ram_chunk(data: bytes) -> None:
    if len(data) < 3:
        return
    codec, pages = data[0] % 3 + 1, 1 + data[1] % limits.RAM_CHUNK_PAGES
    stored = data[2:]
    one = ramsnap.Chunk(0, pages, 0, len(stored), codec, bytes(32))
    with contextlib.suppress(OvmsError):
        ramsnap.unpack_chunk(one, stored, 0)


@target("json/*/*.json", "manifest/*/*.json", "bootstrap/*/*.json")
def json_document(data: bytes) -> None:
    with contextlib.suppress(OvmsError):
        value = strictjson.parse(data, "the document", max_size=limits.MANIFEST_MAX)
        # what we read, others read the same way, and what we write we read again
        assert json.loads(data) == value
        assert strictjson.parse(strictjson.canonical(value), "it again", max_size=1 << 24, max_depth=64) == value


@target("manifest/*/*.json", "hostile/*/manifest-*")
def ovms_manifest(data: bytes) -> None:
    with contextlib.suppress(OvmsError):
        checked = manifest.parse(data)
        assert all(part.ref for part in checked.parts())


@target("manifest/valid/*.json", "../examples/*.yaml")
def yaml_manifest(data: bytes) -> None:
    with contextlib.suppress(OvmsError):
        value = document.read_document(written("m.yaml", data))
        strictjson.canonical(value)
        manifest.check(value, "the manifest")


@target("bootstrap/*/*.json", "bootstrap/mapping.json", "hostile/*/bootstrap-*")
def bootstrap_config(data: bytes) -> None:
    with contextlib.suppress(OvmsError):
        assert bootstrap.read_disk_image(bootstrap.disk_image(data)) == data
    with contextlib.suppress(OvmsError):
        bootstrap.read_disk_image(data)
    with contextlib.suppress(OvmsError):
        bootstrap.from_image_config(strictjson.parse(data, "it", max_size=limits.BOOTSTRAP_MAX))
    with contextlib.suppress(OvmsError):
        config = bootstrap.parse(data)
        assert bootstrap.parse(bootstrap.document_bytes(config)) == config
        bootstrap.environment(config, {"PATH": "/bin"})
        bootstrap.workload_script(config)
        bootstrap.user_data(config)


@target("oci/*/*.json")
def oci_manifest(data: bytes) -> None:
    with contextlib.suppress(OvmsError):
        image = parse_manifest(data, "the manifest")
        assert image.digest == of_bytes(data)
        if isinstance(image, ImageIndex):
            platform.fitting(image, platform.HOST, "here")
            image.as_referrer().to_json()
            return
        assert isinstance(image, ImageManifest)
        image.as_referrer().to_json()
        platform.is_artifact(image)
        model.check_image(image)
        model.ovms_descriptor(image)


class _Files:
    """A layout of an ``oci-layout``, and an ``index.json`` that is the input."""

    def __init__(self, data: bytes) -> None:
        self._index = data

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[source.Content | None]:
        data = {source.MARKER: b'{"imageLayoutVersion":"1.0.0"}', source.INDEX: self._index}.get(name)
        yield None if data is None else source.Content(opened(data), 0, len(data))


@target()
def layout_index(data: bytes) -> None:
    with contextlib.suppress(OvmsError):
        layout = source.Source(_Files(data), "oci:x")
        for entry in layout.entries():
            transport.name_in(entry.tag)
            with contextlib.suppress(OvmsError):
                layout.manifest(entry.descriptor)
    for place in ("oci:x", "oci:x:v1", "oci:x:@" + DIGEST):
        with contextlib.suppress(OvmsError):
            parsed = transport.parse_place(place)
            assert parsed is not None
            source.Source(_Files(data), "oci:x").select(parsed)


@target("hostile/*/oci-archive-*", size=16384)
def tar_archive(data: bytes) -> None:
    blocks = bytearray(data)
    for at in range(0, len(blocks) - 511, 512):  # checksums that are right, or no member would be read
        if blocks[at + 257 : at + 262] == b"ustar":
            blocks[at + 148 : at + 156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(blocks[at : at + 512])
    with contextlib.suppress(OvmsError):
        for one in tar.members(opened(bytes(blocks)), "oci-archive:x", lambda name: len(name) < 200).values():
            assert one.offset + one.size <= len(blocks)


# --- names, registries and what they say -----------------------------------------------------------------------------


@target()
def reference(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    with contextlib.suppress(OvmsError):
        parsed = Reference.parse(text)
        assert Reference.parse(str(parsed)) == parsed
        assert str(parsed).isascii()
        assert str(parsed).isprintable()
    for parse in (transport.parse, transport.new_name, platform.Platform.parse):
        with said_safely():
            parse(text)
    transport.name_in(text)


@target()
def auth_challenge(data: bytes) -> None:
    header, _, body = data.partition(b"\n")
    text = header.decode("latin-1")
    auth.parse_challenges(text)

    def fetch(method: str, url: str, headers: Any, sent: bytes | None, most: int) -> tuple[int, bytes]:
        where = urlsplit(url)
        beside = where.scheme == "https" and (where.hostname or "").rstrip(".").endswith("registry.example")
        assert beside or "Authorization" not in headers, url
        return 200, body[:most]

    asked = auth.Authenticator("registry.example", plain_http=False, fetch=fetch)
    known = credentials.Credential("user", "secret")
    if asked.challenged([text], "repository:x:pull"):
        with contextlib.suppress(OvmsError):
            value = asked.header("repository:x:pull", lambda: known)
            assert value is None or value.isprintable()


@target()
def auth_json(data: bytes) -> None:
    for name in ("auth.json", ".dockercfg"):
        path = written(name, data)
        found = credentials.Credentials((path,), {"PATH": "/nonexistent"})
        with contextlib.suppress(OvmsError):
            found.check()
        for host, repository in (("registry.example", "a/b"), ("docker.io", "")):
            with contextlib.suppress(OvmsError):
                found.get(host, repository)
        with contextlib.suppress(OvmsError):
            file = authfile.AuthFile(path, {"PATH": "/nonexistent"})
            file.erase("registry.example")
            file.store("registry.example", credentials.Credential("user", "secret"))


@target()
def registries_conf(data: bytes) -> None:
    with contextlib.suppress(OvmsError):
        found = registries.Registries([written("registries.conf", data)])
        for host, repository in (("registry.example", "a/b"), ("docker.io", "library/x"), ("localhost:5000", "x")):
            with contextlib.suppress(OvmsError):
                for endpoint in found.endpoints(host, repository, pull=True):
                    endpoint.rewrite(repository)


class _Socket(socket.socket):
    """One that passes for TCP."""

    def setsockopt(self, *options: Any) -> None:
        return


class _Client(registry.RegistryClient):
    """One attempt at everything."""

    def retrying(self, attempt: Callable[[], Any], *rest: Any, **named: Any) -> Any:
        return attempt()


@contextlib.contextmanager
def answering(data: bytes) -> Iterator[_Client]:
    """A client of a registry whose every connection brings the next answer, and then the last one again."""
    answers = data.split(b"\n---\n")[:4]

    def connect(address: object, *rest: object) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(answers.pop(0) if len(answers) > 1 else answers[0])
            theirs.shutdown(socket.SHUT_WR)
            # what it is asked must not be lost: the kernel would answer with an end, before the answer
            kept.append(os.dup(theirs.fileno()))
        return _Socket(fileno=ours.detach())

    kept: list[int] = []
    session = Session("127.0.0.1:5000", Settings(connect_timeout=0.5, read_timeout=0.5))
    session._use("http")
    try:
        with (
            mock.patch.object(connections, "_connect", connect),
            _Client(session.host, find=route.Alone(session)) as client,
        ):
            yield client
    finally:
        for fd in kept:
            os.close(fd)


@target()
def registry_answers(data: bytes) -> None:
    named = Reference("127.0.0.1:5000", "x", "1")
    blob = Descriptor("application/x", Digest(DIGEST), 100)
    with answering(data) as client:
        steps: tuple[Callable[[], object], ...] = (
            lambda: client.get_manifest(named),
            lambda: client.has_blob("x", blob.digest),
            lambda: sum(len(piece) for piece in client.read_blob("x", blob)),
            lambda: referrers.fetch(client, "x", blob.digest),
        )
        for step in steps:
            with said_safely():
                step()


@target()
def blob_answers(data: bytes) -> None:
    # as they are taken where many come at once
    blob = Descriptor("application/x", Digest(DIGEST), 5)
    with answering(data) as client:
        client._route._served.add("x")
        fetch = small.Fetch(client, "x", [blob], lambda _blob, _data: None, lambda _error: None)
        wanted = fetch.next()
        with contextlib.suppress(small._Lost), said_safely():
            while wanted is not None:
                try:
                    asked = wanted.send()
                except connections.NoneIdle as exc:
                    exc.open()
                    asked = wanted.send()
                if asked is None:
                    return
                came = None
                while came is None:
                    came = fetch.receive(asked, blob)
                assert isinstance(came, small._Wanted) or len(came) == blob.size
                wanted = came if isinstance(came, small._Wanted) else None


# --- who signed it ---------------------------------------------------------------------------------------------------


def judged(signer: Signer, kind: Format, data: bytes, signature: str = "") -> Good | Bad:
    result = signer.check(Found(kind, Digest(DIGEST), 0, data, signature), Digest(DIGEST))
    assert result.signer == signer.name
    assert isinstance(result, Good) or (result.detail.isprintable() and len(result.detail) < 1000)
    return result


@target()
def simple_signing(data: bytes) -> None:
    with contextlib.suppress(payload.Malformed):
        payload.check_simple(data, Digest(DIGEST))
        assert DIGEST in json.dumps(json.loads(data))
    key = signing_key()
    result = judged(KeySigner("us", key.public), Format.CLASSIC, data, base64.b64encode(key.sign(b"another")).decode())
    assert isinstance(result, Bad)


@target(size=8192)
def attached(data: bytes) -> None:
    found = kinds.recognise(data)
    if found is not None:
        assert found.predicate is None or found.predicate.isprintable()
        notes = {} if found.predicate is None else {mediatypes.PREDICATE_ANNOTATION: found.predicate}
        listed = Descriptor("x/y", Digest(DIGEST), 1, notes, artifact_type=found.media_type)
        assert kinds.of_referrer(listed) is found.kind


@functools.cache
def signing_key() -> keys.PrivateKey:
    return keys.load_private((CORPUS / "private-key" / "cosign.key").read_bytes(), "the key", lambda: b"x")


@target(size=8192)
def key_bundle(data: bytes) -> None:
    result = judged(KeySigner("us", signing_key().public), Format.BUNDLE, data)
    if isinstance(result, Good):
        # it says what it said in the first place
        payload.check_statement(payload.read_bundle(data).payload, Digest(DIGEST))


@functools.cache
def identity_signer() -> IdentitySigner:
    root = TrustRoot.load(CORPUS / "trust-root" / "root.json")
    return IdentitySigner("us", root, keyless.IDENTITY, keyless.ISSUER)


@functools.cache
def signed_times() -> frozenset[datetime | None]:
    found = [judged(identity_signer(), Format.BUNDLE, one) for one in seeds_of("identity-bundle")]
    return frozenset(one.signed_at for one in found if isinstance(one, Good))


def seeds_of(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


@target(size=16384)
def identity_bundle(data: bytes) -> None:
    result = judged(identity_signer(), Format.BUNDLE, data)
    assert isinstance(result, Bad) or result.signed_at in signed_times()


@target(size=16384)
def trust_root(data: bytes) -> None:
    with said_safely(InputError):
        root = TrustRoot.load(written("trusted_root.json", data))
        for one in seeds_of("identity-bundle"):
            judged(dataclasses.replace(identity_signer(), root=root), Format.BUNDLE, one)


@target()
def public_key(data: bytes) -> None:
    with said_safely(InputError):
        key = keys.load_public(data, "the key")
        assert keys.load_public(key.pem, "it again") == key
        assert not key.verify(b"no signature", b"message")


@target()
def private_key(data: bytes) -> None:
    def ask() -> bytes:
        # before what a derivation costs
        raise InputError("no password")

    with said_safely(InputError):
        keys.load_private(data, "the key", ask)


# --- what a guest and its VMM say ------------------------------------------------------------------------------------


@target()
def nocloud(data: bytes) -> None:
    path = written("input", data)
    with contextlib.suppress(OvmsError):
        keys = seeds.read_keys(path)
        seeds.check(seeds.Seed(ssh_keys=keys))
        meta = bootstrap.meta_data("0" * 8 + "-0000-0000-0000-" + "0" * 12, "guest", keys)
        # a comment of a key breaks out of nothing: as many lines as keys, and those that are always there
        assert meta.count("\n") == len(meta.splitlines()), meta
    with contextlib.suppress(OvmsError):
        user_data = seeds.read_user_data(path)
        image = seed.image({"meta-data": b"x", "user-data": user_data})
        assert user_data in image
    with contextlib.suppress(OvmsError):
        bootstrap.meta_data("0" * 8 + "-0000-0000-0000-" + "0" * 12, data.decode("utf-8", "surrogateescape"))
    with contextlib.suppress(OvmsError):
        seed.image({data.decode("latin-1"): b"x"})


@target(size=16384)
def migration_stream(data: bytes) -> None:
    with contextlib.suppress(VmmError):
        whole = state.wrap(data, machine_type="pc-i440fx-7.2", ram_block="ram", ram_size=1 << 20, bios=data[:8192])
        assert data[8:] in whole


def talk(data: bytes, client: Callable[[socket.socket], None]) -> None:
    """Lets a client talk to somebody who has said *data* already, and says no more."""
    ours, theirs = socket.socketpair()
    with contextlib.closing(ours), theirs:
        theirs.setblocking(False)
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OvmsError):
            client(ours)


@target()
def qmp_answers(data: bytes) -> None:
    def client(sock: socket.socket) -> None:
        session = qmp.Qmp(sock, timeout=1)
        for command in ("query-status", "query-memdev", "migrate"):
            with said_safely(qmp.QmpError):
                session.execute(command)

    talk(b'{"QMP": {}}\n{"return": {}}\n' + data, client)
    talk(data, client)


class _Agent(agent.Agent):
    """One whose session is open."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(VmFiles(DIRECTORY), wait=0.2)
        self._sock = sock
        self._since = time.monotonic()

    def _open(self) -> None:
        raise AgentUnavailable("there is no other")


@target()
def agent_answers(data: bytes) -> None:
    def client(sock: socket.socket) -> None:
        with _Agent(sock) as session:
            while True:
                with said_safely(agent.AgentRefused):
                    answer = session.execute("guest-exec-status")
                    with contextlib.suppress(OvmsError):
                        agent.data(answer, "buf-b64", 100)
                    with said_safely():
                        assert guest.said(guest._finished(answer)).isprintable()

    talk(data, client)


logs._MOVE = 0.0  # type: ignore[misc]  # nobody moves anything here


@target(size=8192)
def log_records(data: bytes) -> None:
    size = int.from_bytes(data[:2], "big") % 256 * 16
    files = VmFiles(DIRECTORY)
    index, console = data[2 : 2 + size], data[2 + size :]
    files.console_index.write_bytes(index)
    files.console_log.write_bytes(console)
    with contextlib.suppress(OvmsError):
        for record in logrecords.read_all(files):
            assert len(record["text"]) <= limits.LOG_TEXT_MAX
            json.dumps(record)
    with contextlib.suppress(OvmsError), logs.Console(files) as log:
        log.tail(3)
        log.after(1 << 40)
        for line in logs.records(log):
            json.dumps(line.to_json())


@target("hostile/*/console-*")
def terminal_text(data: bytes) -> None:
    whole = terminal.Cleaner().feed(data, final=True)
    assert all(c.isprintable() or c in "\n\t" for c in whole), whole
    cleaner = terminal.Cleaner()
    parts = [cleaner.feed(data[at : at + 3]) for at in range(0, len(data), 3)] + [cleaner.feed(b"", final=True)]
    assert all(c.isprintable() or c in "\n\t" for c in "".join(parts)), parts
    assert output.safe(data.decode("utf-8", "surrogateescape")).isprintable()


# --- the server ------------------------------------------------------------------------------------------------------


class _Writer:
    """A stream that takes all, and keeps it."""

    def __init__(self) -> None:
        self.out = io.BytesIO()

    def write(self, data: bytes) -> None:
        self.out.write(data)

    async def drain(self) -> None:
        return

    def can_write_eof(self) -> bool:
        return False

    def get_extra_info(self, name: str) -> None:
        return

    @property
    def transport(self) -> _Writer:
        return self

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        return


class _Handler:
    """Reads bodies as the server does, and answers with nothing."""

    def admit(self, request: http.Request) -> int:
        if not request.target.startswith("/"):
            raise http.HttpError(InputError("no such target"))
        return 4096 if request.method == "POST" else 0

    async def answer(self, request: http.Request, body: bytes) -> http.Answer:
        for operation in api.OPERATIONS:
            if operation.request is not None:
                try:
                    api.parse_body(operation, body)
                except OvmsError as exc:
                    answer = http.HttpError(exc).answer()
                    assert b"\n" not in bytes(answer.body)[:-1]  # type: ignore[arg-type]
        return http.Answer.json({})


_LOOP = asyncio.new_event_loop()
atexit.register(_LOOP.close)


@target("json/*/*.json")
def http_request(data: bytes) -> None:
    async def serve() -> bytes:
        reader, writer = asyncio.StreamReader(), _Writer()
        reader.feed_data(data)
        reader.feed_eof()
        served = http.Http(_Handler(), refuse=lambda _: None)
        connection = http._Connection(served, reader, writer, False)  # type: ignore[arg-type]
        with contextlib.suppress(http._Gone, TimeoutError):
            await connection.run()
        assert served._bodies == 0
        return writer.out.getvalue()

    answer = _LOOP.run_until_complete(serve())
    assert not answer or answer.startswith(b"HTTP/1.1 ")
