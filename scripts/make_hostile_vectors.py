"""Writes ``spec/vectors/hostile`` ('make vectors'): whole attacks, each with what it tries and whom it would hurt.

A file that it wants to reach is always called ``secret`` and lies beside the attack, so that tests can show what happens to
who believes it. The files are checked in; a test makes them anew and compares.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import lz4.block

sys.path.insert(0, str(Path(__file__).parent.parent))

from ovms.spec import limits, mediatypes
from scripts.make_vectors import (
    BASE_PAGES,
    HEADER,
    MINIMAL,
    PAGE,
    Blob,
    Case,
    Files,
    digest,
    nested,
    plain,
    poke,
    qcow2,
    snapshot,
    with_header,
    write,
    write_cases,
)

SECRET: Final = b"secret"
#: Whom an attack would hurt.
HOST, USER, OTHERS, SERVICE = (
    "the host",
    "the user at the terminal",
    "whoever reads it after us",
    "all who share the host",
)


@dataclass(frozen=True)
class Attack:
    """What an input claims to be, the input, what it tries and whom that would hurt, and the error that it meets.

    Without a code it is taken, and does no harm.
    """

    form: str
    name: str
    data: bytes
    tries: str
    victim: str
    code: str | None
    rules: str

    def case(self) -> Case:
        suffix = {"oci-archive": ".tar", "manifest": ".json", "bootstrap": ".json", "console": ".log"}
        more = {"form": self.form, "tries": self.tries, "victim": self.victim, "name": self.name}
        rules = tuple(self.rules.split())
        return Case(
            f"{self.form} {self.name}", self.data, rules, code=self.code, more=more, suffix=suffix.get(self.form, "")
        )


# --- disks -----------------------------------------------------------------------------------------------------------


def with_data_file(name: bytes) -> bytes:
    """A qcow2 image whose first cluster is the first of the file *name*."""
    cluster, copied = 512, 1 << 63
    image = bytearray(qcow2(incompatible=4, extensions=((0x44415441, name),)) + bytes(cluster))
    struct.pack_into(">Q", image, 3 * cluster, copied | 4 * cluster)
    struct.pack_into(">Q", image, 4 * cluster, copied)
    struct.pack_into(">5H", image, 2 * cluster, 1, 1, 1, 1, 1)
    return bytes(image)


def backed(name: bytes, version: int = 3) -> bytes:
    return qcow2(version=version, backing_offset=256, backing_size=len(name), text=(256, name))


def qcow2_attacks() -> Iterator[Attack]:
    def attack(name: str, data: bytes, tries: str, rule: str, victim: str = HOST) -> Attack:
        return Attack("qcow2", name, data, tries, victim, "disk-invalid", rule)

    reads = "the guest reads a file of the host as its disk"
    yield attack("a backing file", backed(SECRET), reads, "LAY-9")
    yield attack("a backing file in version 2", backed(SECRET, version=2), reads, "LAY-9")
    yield attack("a backing file by its options", backed(b'json:{"file":{"filename":"secret"}}'), reads, "LAY-9")
    yield attack(
        "a backing file on the network",
        backed(b"nbd://169.254.169.254"),
        "the host connects to where the guest may not",
        "LAY-9",
        SERVICE,
    )
    yield attack(
        "a backing file behind the end",
        qcow2(backing_offset=2**63, backing_size=1023),
        "reads where nothing is",
        "LAY-9",
    )
    yield attack(
        "a backing file with escapes",
        backed(b"\x1b]0;owned\x07\x1b[2J\xe2\x80\xae"),
        "the error drives the terminal",
        "LAY-9",
        USER,
    )
    yield attack("a data file", with_data_file(SECRET), "the guest reads and writes a file of the host", "LAY-10")
    yield attack(
        "a data file without its bit",
        qcow2(extensions=((0x44415441, SECRET),)),
        "hides from who looks at the feature bits alone",
        "LAY-10",
    )
    many = tuple((1, b"") for _ in range(40))
    yield attack(
        "a data file behind forty extensions",
        qcow2(cluster=1024, extensions=(*many, (0x44415441, SECRET))),
        "hides from who looks at the first extensions alone",
        "LAY-10",
    )
    table = struct.pack(">IIQQ", 65535, 0, 1 << 40, 1 << 62)
    yield attack(
        "bitmaps out of the file", qcow2(extensions=((0x23852875, table),)), "reads or allocates 1 TiB", "LAY-12"
    )
    yield attack(
        "snapshots out of the file",
        qcow2(snapshots=65536, snapshots_offset=2**63 - 512),
        "reads a table of 65536 snapshots where no file can reach",
        "LAY-12",
    )
    yield attack("an L1 bomb", qcow2(l1_entries=2**31), "allocates 16 GiB", "LAY-15", SERVICE)
    yield attack("an L1 table in the header", qcow2(l1_offset=0), "what the guest writes changes the header", "LAY-15")
    yield attack("a refcount bomb", qcow2(refcount_clusters=2**32 - 1), "allocates 2 TiB", "LAY-15", SERVICE)
    yield attack(
        "a refcount table in the header", qcow2(refcount_offset=0), "an allocation overwrites the header", "LAY-15"
    )
    yield attack("AES", qcow2(encryption=1), "waits for a key", "LAY-11", SERVICE)
    yield attack("LUKS", qcow2(encryption=2), "runs the crypto code on the author's numbers", "LAY-11")
    for bit in (5, 63):
        yield attack(
            f"unknown feature {bit}", qcow2(incompatible=1 << bit), "is read by rules that we don't know", "LAY-13"
        )
    for bits in (0, 63, 2**32 - 1):
        yield attack(f"clusters of 2 to the {bits}", qcow2(cluster_bits=bits), "a shift by too much", "LAY-14")
    loop = struct.pack(">II", 1, 2**32 - 8)
    yield attack(
        "an extension that comes round",
        qcow2(text=(104, loop)),
        "a sum of 32 bits is 0, so the next extension is this one, for ever",
        "LAY-16",
        SERVICE,
    )
    yield attack(
        "extensions without an end",
        qcow2(cluster=1024, extensions=tuple((1, b"") for _ in range(100))),
        "more of them than anybody has a use for",
        "LAY-16",
        SERVICE,
    )
    yield attack("a disk of 8 EiB", qcow2(size=2**63, l1_entries=2**22), "a size that is negative", "LAY-5", SERVICE)


def raw_attacks() -> Iterator[Attack]:
    reads = "who guesses the format reads a file of the host"
    yield Attack("raw", "a qcow2 image", backed(SECRET), reads, HOST, "disk-invalid", "LAY-6")
    descriptor = (
        '# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="monolithicFlat"\n\n'
        'RW 8 FLAT "secret" 0\n\nddb.virtualHWVersion = "4"\nddb.geometry.cylinders = "1"\n'
        'ddb.geometry.heads = "1"\nddb.geometry.sectors = "8"\nddb.adapterType = "ide"\n'
    )
    vmdk = descriptor.encode().ljust(1024, b"\n")
    yield Attack("raw", "a VMDK descriptor", vmdk, reads, HOST, None, "LAY-3 LAY-6")


# --- kernels and initrds ---------------------------------------------------------------------------------------------


def elf(*, headers: int = 1, offset: int = 64, size: int = 56, notes: tuple[int, int] = (120, 20)) -> bytes:
    """An ELF kernel that says this of its program headers and notes."""
    head = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, offset, 0, 0, 64, size, headers, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 4, 4, notes[0], 0, 0, notes[1], notes[1], 4)
    note = struct.pack("<III", 4, 4, 18) + b"Xen\0" + bytes(4)
    return b"\x7fELF\2\1\1" + bytes(9) + head + segment + note


def kernel_attacks() -> Iterator[Attack]:
    def attack(name: str, data: bytes, tries: str, rule: str = "BIN-6") -> Attack:
        return Attack("kernel", name, data, tries, HOST, "kernel-invalid", f"BIN-1 {rule}")

    setup = bytearray(1024)
    setup[0x1F1], setup[0x1FE:0x200], setup[0x202:0x206] = 255, b"\x55\xaa", b"HdrS"
    yield attack("a setup of an old kernel", bytes(setup), "is loaded low, over what is there", "BIN-5")
    struct.pack_into("<H", setup, 0x206, 0x01FF)
    setup[0x211] = 1
    yield attack("a setup of before the protocol", bytes(setup), "fields that mean something else", "BIN-5")
    struct.pack_into("<H", setup, 0x206, 0x020F)
    lies = "sizes of what a VMM copies into the guest, beyond the end of the file"
    yield Attack("kernel", "a setup longer than the file", bytes(setup), lies, HOST, None, "BIN-5")
    yield attack("65535 program headers", elf(headers=65535), "reads 3.5 MiB, a header at a time")
    yield attack("program headers far away", elf(offset=2**63), "an offset that is negative")
    yield attack("program headers of no size", elf(size=0), "a loop that stands still")
    yield attack("notes of 16 EiB", elf(notes=(120, 2**64 - 1)), "allocates what it says")
    yield attack("notes far away", elf(notes=(2**64 - 8, 64)), "an offset that comes round")
    yield Attack(
        "initrd", "nothing", b"", "a size of 0, which is 2^32 minus something later", HOST, "file-empty", "BIN-2"
    )


# --- documents -------------------------------------------------------------------------------------------------------


def manifest_attacks() -> Iterator[Attack]:
    def bad(name: str, data: bytes, tries: str, rule: str, code: str = "json-invalid", victim: str = SERVICE) -> Attack:
        return Attack("manifest", name, data, tries, victim, code, rule)

    head = plain(MINIMAL)[:-3]
    yield bad("a hundred thousand levels", b"[" * 100_000, "a parser's stack runs over", "DOC-4")
    yield bad("33 levels", nested(limits.JSON_DEPTH_MAX + 1), "one level more than allowed", "DOC-4")
    yield bad("a megabyte and more", head + b" " * limits.MANIFEST_MAX + b"\n}\n", "memory", "DOC-5")
    twice = head + b',\n  "name": "other"\n}\n'
    yield bad("a name twice", twice, "who checks takes the one, and who runs the other", "DOC-2", victim=OTHERS)
    escaped = head + b',\n  "n\\u0061me": "other"\n}\n'
    yield bad("a name twice, once escaped", escaped, "the same, past who compares bytes", "DOC-2", victim=OTHERS)
    yield bad("a number of 1e999", head + b',\n  "x": 1e999\n}\n', "infinity, which nobody can write", "DOC-3")
    digits = head + b',\n  "x": ' + b"9" * 20_000 + b"\n}\n"
    yield bad("a number of 20000 digits", digits, "time that grows with the square of the digits", "DOC-3")
    yield bad(
        "half a character", head + b',\n  "x": "\\ud800"\n}\n', "fails where it is printed", "DOC-3", victim=OTHERS
    )

    def invalid(name: str, tries: str, rule: str, victim: str = HOST, /, **fields: Any) -> Attack:
        return bad(name, plain({**MINIMAL, **fields}), tries, rule, "manifest-invalid", victim)

    climbing = "sha256:../../../secret"
    yield invalid("a digest that climbs", "a path made of it leads out of the store", "MAN-8", kernel={"ref": climbing})
    other = "sha512:" + "a" * 128
    yield invalid("a digest of SHA-512", "is checked by nobody", "MAN-8", OTHERS, kernel={"ref": other})
    args = {"ref": digest("kernel"), "args": "quiet\n-device vfio-pci"}
    yield invalid("kernel arguments of two lines", "a second line, where lines are configuration", "MAN-6", kernel=args)
    yield invalid("a name with escapes", "drives the terminal of who lists it", "MAN-6", USER, name="web\x1b[2J")
    yield invalid("a version with escapes", "drives the terminal of who lists it", "MAN-6", USER, version="1\x1b[2J")
    ram = {"ref": digest("ram"), "parents": [digest("ram")]}
    yield invalid("a snapshot that is its own parent", "a chain without an end", "MAN-16", SERVICE, ramSnapshot=ram)
    layers = [{"ref": digest("base"), "format": "qcow2"}] * (limits.DISK_LAYERS_MAX + 1)
    yield invalid(
        "a layer too many", "a chain of block nodes, each with its caches", "MAN-11", SERVICE, diskLayers=layers
    )


def bootstrap_attacks() -> Iterator[Attack]:
    def attack(name: str, document: dict[str, Any], tries: str, rule: str) -> Attack:
        return Attack("bootstrap", name, plain(document), tries, "the guest", "manifest-invalid", rule)

    command = {"cmd": ["true"]}
    yield attack(
        "a variable whose name is a command", {**command, "env": ["A$(reboot)=b"]}, "is run by the shell", "BOOT-2"
    )
    yield attack(
        "a directory that is a command", {**command, "workdir": "/x\nreboot"}, "a line of the script", "BOOT-1"
    )
    yield attack("an argument with a NUL", {"cmd": ["a\0b"]}, "is cut where C ends a string", "BOOT-4")
    yield attack("a user who is a command", {**command, "user": "$(reboot)"}, "is run by the shell", "BOOT-6")


# --- RAM snapshots ---------------------------------------------------------------------------------------------------


#: What a disk that does no harm holds.
_DISK: Final = b"disk" * 128
#: A snapshot that belongs to an artifact of that disk alone.
_HEADER: Final = replace(
    HEADER,
    kernel=None,
    kernel_args="",
    disks=("sha256:" + hashlib.sha256(_DISK).hexdigest(),),
    devices=(*HEADER.devices[:4], replace(HEADER.devices[4], size=len(_DISK))),
)


def ram_attacks() -> Iterator[Attack]:
    def attack(
        name: str, data: bytes, tries: str, rule: str, victim: str = SERVICE, code: str = "snapshot-invalid"
    ) -> Attack:
        return Attack("ramsnap", name, data, tries, victim, code, rule)

    whole = snapshot(BASE_PAGES, _HEADER).whole
    index = struct.unpack_from("<Q", whole, 64)[0]
    state = struct.unpack_from("<Q", whole, 48)[0]
    yield attack("a state that claims 4 GiB", poke(whole, state, "<I", 2**32 - 1), "allocates 4 GiB", "RAM-9")
    yield attack("2 to the 64 entries", poke(whole, 72, "<Q", 2**64 - 1), "a product that comes round", "RAM-6")
    yield attack("memory of 16 EiB", poke(whole, 16, "<Q", 2**64 - PAGE), "a file of that size", "RAM-6")
    yield attack("an index far away", poke(whole, 64, "<Q", 2**63), "an offset that is negative", "RAM-6")
    yield attack(
        "a page beyond the memory", poke(whole, index, "<Q", 2**40), "writes behind the guest's memory", "RAM-11"
    )
    yield attack(
        "a page number that comes round", poke(whole, index, "<Q", 2**64 - 1), "writes before the memory", "RAM-11"
    )
    yield attack("entries that overlap", poke(whole, index + 64, "<Q", 3), "a page that is one or the other", "RAM-11")
    yield attack(
        "bytes of another entry", poke(whole, index + 64 + 16, "<Q", 0), "two entries of the same bytes", "RAM-12"
    )
    yield attack("cut in the data", whole[:-100], "a read behind the end", "RAM-1 RAM-16")
    bomb = bytes(lz4.block.compress(bytes(15 * limits.MIB), store_size=False))
    yield attack("a chunk that unpacks to 15 MiB", _with_chunk(bomb), "memory for each of its chunks", "RAM-16")
    yield attack(
        "a machine of a path",
        with_header(lambda document: document["machine"].update(type="pc,dump-guest-core=on\x1b[2J")),
        "an option of the VMM, and a terminal",
        "RAM-25",
        HOST,
    )
    yield attack(
        "a source that climbs",
        with_header(lambda document: document.update(parent="sha256:../../secret")),
        "a path made of it leads out of the store",
        "RAM-21",
        HOST,
    )


def _with_chunk(stored: bytes) -> bytes:
    first = snapshot(BASE_PAGES).chunks[0]
    chunk = first._replace(pages=limits.RAM_CHUNK_PAGES, page=32, stored_size=len(stored), offset=0)
    return Blob(_HEADER, (chunk,), stored).whole


# --- archives of a layout --------------------------------------------------------------------------------------------

_MARKER: Final = b'{"imageLayoutVersion":"1.0.0"}'


def _blob(content: bytes) -> str:
    return "blobs/sha256/" + hashlib.sha256(content).hexdigest()


def descriptor(media_type: str, content: bytes, **more: Any) -> dict[str, Any]:
    sha = hashlib.sha256(content).hexdigest()
    return {"mediaType": media_type, "digest": f"sha256:{sha}", "size": len(content), **more}


def image(
    *, manifest: bytes | None = None, layers: list[dict[str, Any]] | None = None, **more: Any
) -> tuple[bytes, bytes]:
    """The OCI manifest of a disk, and its OVMS manifest; *more* are fields of the first."""
    disk = descriptor(mediatypes.DISK_LAYER, _DISK, annotations={mediatypes.DISK_FORMAT_ANNOTATION: "raw"})
    ovms = manifest or plain({**MINIMAL, "diskLayers": [{"ref": disk["digest"], "format": "raw"}]})
    document = {
        "schemaVersion": 2,
        "mediaType": mediatypes.OCI_MANIFEST,
        "artifactType": mediatypes.MANIFEST,
        "config": descriptor(mediatypes.MANIFEST, ovms),
        "layers": [disk] if layers is None else layers,
        **more,
    }
    return json.dumps(document).encode(), ovms


def index(*manifests: dict[str, Any]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": list(manifests)}).encode()


def layout(
    oci: bytes, *others: bytes, media_type: str = mediatypes.OCI_MANIFEST, name: str = "web:1"
) -> dict[str, bytes]:
    """The files of a layout whose index names *oci*."""
    top = index(descriptor(media_type, oci, annotations={mediatypes.REF_NAME_ANNOTATION: name}))
    return {"oci-layout": _MARKER, "index.json": top, **{_blob(content): content for content in (oci, *others, _DISK)}}


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", **fields: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def archive(files: dict[str, bytes], *more: Member, before: tuple[Member, ...] = ()) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in (*before, *(member(*item) for item in files.items()), *more):
            tar.offset = out.tell()
            out.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512))
            tar.offset = out.tell()
    return out.getvalue()


def archive_attacks() -> Iterator[Attack]:
    honest = layout(*image())
    blob = _blob(_DISK)
    without = {name: data for name, data in honest.items() if name != blob}

    def bad(
        name: str, data: bytes, tries: str, code: str = "invalid-input", rule: str = "OCI-27", victim: str = HOST
    ) -> Attack:
        return Attack("oci-archive", name, data, tries, victim, code, rule)

    def harmless(name: str, data: bytes, tries: str, rule: str = "OCI-27", victim: str = HOST) -> Attack:
        return Attack("oci-archive", name, data, tries, victim, None, rule)

    outside = "who unpacks it writes outside of where they unpack"
    yield harmless("a name that climbs", archive(honest, member("../escaped", b"x")), outside)
    absolute = member("/index.json", index(descriptor(mediatypes.OCI_MANIFEST, b"{}")))
    yield harmless(
        "a name that is absolute",
        archive(honest, absolute),
        "without its slash it is what others unpack",
        victim=OTHERS,
    )
    yield harmless(
        "a link that others are written through",
        archive(honest, before=(member("door", type=tarfile.SYMTYPE, linkname=".."), member("door/escaped", b"x"))),
        outside,
    )
    yield harmless(
        "a device", archive(honest, member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=1)), "memory of the host"
    )
    link = member(blob, type=tarfile.SYMTYPE, linkname="../../../secret")
    yield bad("a blob that is a link", archive(without, link), "a file of the host becomes a layer")
    hard = member(blob, type=tarfile.LNKTYPE, linkname="secret")
    yield bad("a blob that is a hard link", archive(without, hard), "a file of the host becomes a layer")
    yield bad(
        "a blob that is a device",
        archive(without, member(blob, type=tarfile.CHRTYPE, devmajor=1, devminor=5)),
        "bytes without end",
    )
    yield bad(
        "a blob that is a FIFO", archive(without, member(blob, type=tarfile.FIFOTYPE)), "waits for ever", victim=SERVICE
    )
    yield bad(
        "an index twice",
        archive(honest, member("./index.json", index())),
        "who checks sees the one, and who runs the other",
        victim=OTHERS,
    )
    sparse = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.realsize": str(1 << 50),
        "GNU.sparse.name": blob,
    }
    yield bad(
        "a sparse bomb",
        archive(without, member("x", b"0\n".ljust(512, b"\0"), pax_headers=sparse)),
        "a file of 1 PiB",
        victim=SERVICE,
    )
    sized = {"path": blob, "size": "1"}
    yield bad(
        "a blob of two sizes",
        archive(without, member("x", _DISK, pax_headers=sized)),
        "what follows is a member, or is content",
        victim=OTHERS,
    )
    long = member("x", b"x" * 100_000, type=tarfile.GNUTYPE_LONGNAME)
    yield bad(
        "a name of 100000 bytes",
        archive(honest, before=(long,)),
        "memory, and a path that no system has",
        victim=SERVICE,
    )
    cut = archive(honest)
    yield bad("cut short", cut[: cut.index(_DISK) + 100], "a read behind the end", victim=SERVICE)
    yield from oci_attacks(bad, harmless)


def oci_attacks(bad: Any, harmless: Any) -> Iterator[Attack]:
    """What a layout says, whatever it lies in."""
    honest, ovms = image()
    disk = json.loads(honest)["layers"][0]

    def hostile(**fields: Any) -> bytes:
        return archive(layout(*image(**fields)))

    good = b"good" * 128
    promised = descriptor(mediatypes.DISK_LAYER, good, annotations=disk["annotations"])
    signed = plain({**MINIMAL, "diskLayers": [{"ref": promised["digest"], "format": "raw"}]})
    other = archive({**layout(*image(manifest=signed, layers=[promised])), _blob(good): b"evil" * 128})
    yield bad("a blob of other content", other, "bytes that nobody signed", "digest-mismatch", "OCI-21", OTHERS)
    large = [{**disk, "size": 2**62}]
    yield bad("a layer of 4 EiB", hostile(layers=large), "room for it", "registry-protocol", "OCI-9", SERVICE)
    huge = [{**disk, "size": 2**63}]
    yield bad(
        "a layer of 8 EiB", hostile(layers=huge), "a size that is negative", "registry-protocol", "OCI-9", SERVICE
    )
    sha512 = [{**disk, "digest": "sha512:" + "a" * 128}]
    yield bad(
        "a layer of SHA-512", hostile(layers=sha512), "is checked by nobody", "registry-protocol", "OCI-9", OTHERS
    )
    climbs = [{**disk, "digest": "sha256:../../../secret"}]
    yield bad(
        "a layer that climbs", hostile(layers=climbs), "a path made of it leads out", "registry-protocol", "OCI-9"
    )
    yield bad(
        "a thousand layers",
        hostile(layers=[disk] * 1000),
        "memory and connections",
        "registry-protocol",
        "OCI-1",
        SERVICE,
    )
    urls = [{**disk, "urls": ["http://169.254.169.254/latest/meta-data", "file:///secret"]}]
    yield harmless(
        "a layer with addresses",
        hostile(layers=urls),
        "the host fetches it from where the author says",
        "OCI-9",
        SERVICE,
    )
    deep = archive(layout(honest[:-1] + b', "x": ' + b"[" * 1000 + b"]" * 1000 + b"}", ovms))
    yield bad("a manifest of a thousand levels", deep, "a parser's stack runs over", "json-invalid", "DOC-4", SERVICE)
    twice = archive(layout(honest[:-1] + b', "config": ' + json.dumps(disk).encode() + b"}", ovms))
    yield bad(
        "a config twice", twice, "who checks takes the one, and who runs the other", "json-invalid", "DOC-2", OTHERS
    )
    host = {"os": "linux", "architecture": "amd64"}
    innermost = index(descriptor(mediatypes.OCI_MANIFEST, honest, platform=host))
    inner = index(descriptor(mediatypes.OCI_INDEX, innermost, platform=host))
    top = layout(inner, honest, ovms, innermost, media_type=mediatypes.OCI_INDEX)
    yield bad("an index of indexes", archive(top), "a walk without an end", "unsupported", "OCI-16", SERVICE)
    escapes = "\x1b]0;owned\x07\x1b[2J\x9b2J\u202egnp.exe\r\x08"
    annotated = hostile(annotations={"org.opencontainers.image.title": escapes, f"x{escapes}": "y"})
    yield harmless("annotations with escapes", annotated, "drives the terminal of who shows it", "SEC-3", USER)
    disks = [{"ref": disk["digest"], "format": "raw"}]
    told = hostile(manifest=plain({**MINIMAL, "version": "1\x9b2J\u202e", "diskLayers": disks}))
    yield harmless("a version with escapes of eight bits", told, "drives the terminal of who shows it", "SEC-3", USER)
    named = archive(layout(honest, ovms, name=escapes))
    yield harmless("a name with escapes", named, "drives the terminal of who lists it", "SEC-3", USER)
    typed = [disk, {**descriptor("text/plain\x1b[2J", _DISK[:8])}]
    yield bad(
        "a media type with escapes",
        hostile(layers=typed),
        "drives the terminal of who sees the error",
        "blob-not-found",
        "SEC-3",
        USER,
    )


# --- what a guest prints ---------------------------------------------------------------------------------------------


def console_attacks() -> Iterator[Attack]:
    def attack(name: str, data: bytes, tries: str) -> Attack:
        return Attack("console", name, data, tries, USER, None, "SEC-3")

    yield attack("a title", b"a\x1b]0;owned\x07b\n", "the window is called something else")
    yield attack("a clipboard", b"a\x1b]52;c;cm0gLXJmIH4K\x07b\n", "what is pasted next is a command")
    yield attack("a question", b"a\x1b[6n\x1b[c\x05b\n", "the terminal answers as if the user typed")
    yield attack("a screen that is cleared", b"a\x1b[2J\x1b[3J\x1b[Hb\xc2\x9b2J\n", "what was there is gone")
    yield attack("a line written over", b"denied\rgranted\x08\x08b\n", "shows something else than it says")
    yield attack(
        "letters that turn round", "a\u202e\u2066txt.exe\u2069b\n".encode(), "shows something else than it says"
    )
    yield attack("a sequence without an end", b"a\x1b]0;" + b"x" * 8192 + b"b\n", "all that follows is swallowed")
    yield attack("a line without an end", b"\x1b[8mab" * 15_000, "memory for a line")


def attacks() -> list[Attack]:
    """All of them."""
    makers = (qcow2_attacks, raw_attacks, kernel_attacks, manifest_attacks, bootstrap_attacks, ram_attacks,
              archive_attacks, console_attacks)  # fmt: skip
    return [attack for make in makers for attack in make()]


def generate() -> Files:
    """Every file, by its path below ``spec/``."""
    files: Files = {}
    write_cases(files, "hostile", ".bin", [attack.case() for attack in attacks()])
    return files


def main() -> int:
    write(generate())
    return 0


if __name__ == "__main__":
    sys.exit(main())
