"""Diffs and their ancestors: what is written, what comes out of it, and what is refused."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ram

from ovms.errors import BlobNotFound, JsonInvalid, OvmsError, SnapshotInvalid
from ovms.memory import chain, snapshot
from ovms.memory.capture import Capture, Run
from ovms.oci.layout import Layout
from ovms.spec import limits, ramsnap
from ovms.spec.digest import Digest, hex_of
from ovms.spec.manifest import Compression
from ovms.spec.ramheader import Header

PAGE = ramsnap.PAGE
MEMORY = ram.HEADER.memory
PAGES = MEMORY // PAGE
NOISE = random.Random(7).randbytes(MEMORY)


def filled(pages: dict[int, bytes], below: bytes = bytes(MEMORY)) -> bytes:
    """A memory that has *pages* (of one byte each, repeated) over another one."""
    memory = bytearray(below)
    for page, content in pages.items():
        memory[page * PAGE : (page + 1) * PAGE] = content * (PAGE // len(content))
    return bytes(memory)


@contextlib.contextmanager
def captured(memory: bytes, below: bytes | None = None, written: list[int] | None = None) -> Iterator[Capture]:
    """What :func:`capture.take` gives of a VM with this memory, restored from *below*, that wrote to the pages *written*."""
    with tempfile.TemporaryFile(buffering=0) as copy, tempfile.TemporaryFile(buffering=0) as image:
        if below is None:
            copy.write(memory)
            yield Capture(copy.fileno(), None, [], len(memory))
            return
        image.write(below)
        copy.truncate(len(memory))
        if written is None:
            written = [page for page in range(PAGES) if differ(memory, below, page)]
        for page in written:
            os.pwrite(copy.fileno(), memory[page * PAGE : (page + 1) * PAGE], page * PAGE)
        made = Capture(copy.fileno(), os.dup(image.fileno()), list(runs(written)), len(memory))
        try:
            yield made
        finally:
            made.close()


def differ(one: bytes, other: bytes, page: int) -> bool:
    return one[page * PAGE : (page + 1) * PAGE] != other[page * PAGE : (page + 1) * PAGE]


def runs(pages: list[int]) -> Iterator[Run]:
    start = end = -1
    for page in sorted(set(pages)):
        if page != end:
            if start >= 0:
                yield Run(start * PAGE, end * PAGE)
            start = page
        end = page + 1
    if start >= 0:
        yield Run(start * PAGE, end * PAGE)


def add(
    layout: Layout,
    memory: bytes,
    parent: tuple[Digest, bytes] | None = None,
    *,
    written: list[int] | None = None,
    compression: Compression = Compression.LZ4,
) -> Digest:
    """A snapshot of *memory* in the store: a diff on *parent* (its digest, its memory), or a base."""
    header = ram.HEADER if parent is None else replace(ram.HEADER, parent=parent[0])
    with captured(memory, None if parent is None else parent[1], written) as capture:
        return snapshot.store(layout, capture, b"state", header, compression=compression)[0]


def chain_of(layout: Layout, *memories: bytes, compression: Compression = Compression.LZ4) -> list[Digest]:
    """A chain whose members have these memories, base first."""
    digests: list[Digest] = []
    for i, memory in enumerate(memories):
        digests.append(add(layout, memory, (digests[-1], memories[i - 1]) if i else None, compression=compression))
    return digests


def forget_images(layout: Layout) -> None:
    for image in layout.derived_dir.glob("*.ram"):
        image.unlink()


def index(layout: Layout, digest: Digest) -> list[tuple[int, int, int]]:
    return [(c.page, c.pages, c.codec) for c in snapshot.read_control(layout, digest).chunks]


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.spec("RAM-14", "RAM-18", "RAM-19")
def test_a_diff_has_what_differs_and_no_more(layout: Layout) -> None:
    below = filled({0: b"a", 1: b"b", 2: b"c", 3: b"d", 40: b"e", 41: b"f", 255: b"g"})
    now = filled({1: b"B", 2: bytes(1), 14: b"x", 15: b"y", 16: b"z", 40: bytes(1), 41: bytes(1), 255: b"G"}, below)
    # 0 and 3 are written, and as before; 200 is written with zeroes, where zeroes were
    digest = add(layout, now, (add(layout, below), below), written=[0, 1, 2, 3, 14, 15, 16, 40, 41, 200, 255])
    lz4, zero = ramsnap.CODEC_LZ4, ramsnap.CODEC_ZERO
    assert index(layout, digest) == [
        (1, 1, lz4), (2, 1, zero), (14, 2, lz4), (16, 1, lz4), (40, 2, zero), (255, 1, lz4),
    ]  # fmt: skip
    assert snapshot.materialise(layout, digest).read_bytes() == now


@pytest.mark.spec("RAM-14")
def test_a_memory_that_became_zero_is_one_entry(layout: Layout) -> None:
    digests = chain_of(layout, NOISE, bytes(MEMORY))
    assert index(layout, digests[1]) == [(0, PAGES, ramsnap.CODEC_ZERO)]
    assert snapshot.materialise(layout, digests[1]).read_bytes() == bytes(MEMORY)


def test_a_diff_without_a_difference(layout: Layout) -> None:
    base = add(layout, NOISE)
    digest = add(layout, NOISE, (base, NOISE), written=[3, 4, 100])
    assert index(layout, digest) == []
    assert layout.size(digest) == 4096
    assert snapshot.materialise(layout, digest).read_bytes() == NOISE


@pytest.mark.parametrize("compression", list(Compression))
def test_what_is_written_does_not_depend_on_the_threads(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, compression: Compression
) -> None:
    memory = NOISE[: MEMORY // 2] + filled({5: b"abc1"})[MEMORY // 2 :]
    found = set()
    for count in (1, 2, 5):
        monkeypatch.setattr("ovms.memory.parallel.processors", lambda count=count: count)
        found.add(add(layout, memory, compression=compression))
    assert len(found) == 1
    assert snapshot.materialise(layout, found.pop(), compression=compression).read_bytes() == memory


# --- restoring -------------------------------------------------------------------------------------------------------

page_changes = st.dictionaries(
    st.integers(0, PAGES - 1) | st.integers(12, 20), st.sampled_from([b"\0", b"a", b"b", NOISE[:PAGE]]), max_size=12
)


@pytest.mark.spec("RAM-43", "RAM-18")
@given(
    changes=st.lists(page_changes, min_size=1, max_size=5),
    here=st.sets(st.integers(0, 4)),
    compression=st.sampled_from(list(Compression)),
)
def test_the_newest_member_wins(changes: list[dict[int, bytes]], here: set[int], compression: Compression) -> None:
    """Whatever is written, and whichever ancestors' images are there already."""
    with tempfile.TemporaryDirectory() as directory:
        layout = Layout(Path(directory) / "store")
        memories = [filled(changes[0])]
        for change in changes[1:]:
            memories.append(filled(change, memories[-1]))
        digests = chain_of(layout, *memories, compression=compression)
        for i in sorted(here):
            if i < len(digests) - 1:
                snapshot.materialise(layout, digests[i])
        image = snapshot.materialise(layout, digests[-1], compression=compression)
        assert image.read_bytes() == memories[-1]
        made = {path.name.partition(".")[0] for path in layout.derived_dir.glob("*.ram")}
        asked = {digests[-1], *(digests[i] for i in here if i < len(digests))}
        assert made == {hex_of(digest) for digest in asked}, "no image is made that nobody asked for"


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8)), max_size=10).map(
            lambda pieces: [
                ramsnap.Chunk(at, pages, 0, 1, ramsnap.CODEC_LZ4, b"")
                for i, (at, pages) in enumerate(sorted(pieces))
                if all(at >= before + count for before, count in sorted(pieces)[:i])
            ]
        ),
        min_size=1,
        max_size=5,
    )
)
def test_what_is_seen_of_each_member(indexes: list[list[ramsnap.Chunk]]) -> None:
    owner = {page: i for i, chunks in enumerate(indexes) for c in chunks for page in range(c.page, c.page + c.pages)}
    found: dict[int, int] = {}
    for i, parts in enumerate(chain.visible(indexes)):
        assert all(part.runs for part in parts)
        assert [part.chunk for part in parts] == [chunk for chunk in indexes[i] if part_of(parts, chunk)]
        for part in parts:
            assert part.whole == (sum(pages for _, pages in part.runs) == part.chunk.pages)
            for first, pages in part.runs:
                for page in range(first, first + pages):
                    assert page not in found
                    assert part.chunk.page <= page < part.chunk.page + part.chunk.pages
                    found[page] = i
    assert found == owner


def part_of(parts: list[chain.Part], chunk: ramsnap.Chunk) -> bool:
    return any(part.chunk is chunk for part in parts)


@pytest.mark.spec("RAM-35")
def test_an_ancestors_image_is_copied_and_stays(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    memories = [NOISE, filled({9: b"x"}, NOISE), filled({9: b"y", 10: b"\0"}, NOISE)]
    digests = chain_of(layout, *memories)
    first = snapshot.materialise(layout, digests[1])
    read: list[int] = []
    original = ramsnap.unpack_chunk

    def noted(chunk: ramsnap.Chunk, *more: Any) -> bytes:
        read.append(chunk.page)
        return original(chunk, *more)

    monkeypatch.setattr(ramsnap, "unpack_chunk", noted)
    assert snapshot.materialise(layout, digests[2]).read_bytes() == memories[2]
    assert read == [9], "only what is newer is unpacked"
    assert first.read_bytes() == memories[1]
    read.clear()
    forget_images(layout)
    assert snapshot.materialise(layout, digests[2]).read_bytes() == memories[2]
    assert read.count(9) == 1, "what nobody sees is not unpacked: of the three members that have page 9, one"


def test_an_image_is_sparse(layout: Layout) -> None:
    memory = 32 << 20
    header = ram.header(memory=memory)
    with tempfile.TemporaryFile(buffering=0) as copy:
        copy.truncate(memory)
        os.pwrite(copy.fileno(), b"a" * PAGE, 20 << 20)
        base = snapshot.store(layout, Capture(copy.fileno(), None, [], memory), b"s", header)[0]
        os.pwrite(copy.fileno(), b"b" * PAGE, 8 << 20)
        written = [Run(8 << 20, (8 << 20) + PAGE)]
        with tempfile.TemporaryFile(buffering=0) as before:
            before.truncate(memory)
            capture = Capture(copy.fileno(), os.dup(before.fileno()), written, memory)
            with contextlib.closing(capture):
                diff = snapshot.store(layout, capture, b"s", replace(header, parent=base))[0]
    for ready in ((), (base,)):
        forget_images(layout)
        for digest in ready:
            snapshot.materialise(layout, digest)
        image = snapshot.materialise(layout, diff)
        assert image.stat().st_size == memory
        assert image.stat().st_blocks * 512 <= 4 * 64 * 1024
        with image.open("rb") as file:
            assert (os.pread(file.fileno(), 1, 8 << 20), os.pread(file.fileno(), 1, 20 << 20)) == (b"b", b"a")


def test_a_chunk_of_the_parent_that_is_damaged_and_not_seen_does_no_harm(layout: Layout) -> None:
    """RAM-16 is about the pages that are used."""
    digests = chain_of(layout, filled({3: b"a"}), filled({3: b"b"}))
    damage(layout, digests[0], lambda data: data.__setitem__(-1, data[-1] ^ 1))
    assert snapshot.materialise(layout, digests[1]).read_bytes() == filled({3: b"b"})
    with pytest.raises(SnapshotInvalid):
        snapshot.materialise(layout, digests[0])


# --- what is refused -------------------------------------------------------------------------------------------------


def put(layout: Layout, digest: str, blob: bytes) -> Digest:
    """Puts *blob* where *digest* belongs, whatever its own is: what a store that was tampered with gives us."""
    layout.add_bytes(b"the store is there")
    path = layout.path(Digest(digest))
    path.unlink(missing_ok=True)
    path.write_bytes(blob)
    return Digest(digest)


def damage(layout: Layout, digest: Digest, change: Callable[[bytearray], object]) -> None:
    data = bytearray(layout.path(digest).read_bytes())
    change(data)
    put(layout, digest, bytes(data))


def digits(letter: str) -> str:
    return "sha256:" + letter * 64


BASE, MIDDLE, TOP = digits("1"), digits("2"), digits("3")


def members(**headers: Header) -> dict[str, Header]:
    """A sound chain of three, with the headers of some changed."""
    more = (*ram.HEADER.disks, ram.DIGEST)
    sound = {
        "base": ram.HEADER,
        "middle": ram.header(parent=BASE),
        "top": ram.header(parent=MIDDLE, disks=more),
    }
    return {**sound, **headers}


def put_chain(layout: Layout, headers: dict[str, Header]) -> Digest:
    for digest, (name, header) in zip((BASE, MIDDLE, TOP), headers.items(), strict=True):
        pages = {i: bytes([65 + i]) * PAGE for i in range(3)} if name == "base" else {1: name.encode()[:1] * PAGE}
        put(layout, digest, ram.blob(pages, header))
    return Digest(TOP)


BAD_CHAINS: dict[str, tuple[dict[str, Header], str]] = {
    "a loop of two": (members(base=ram.header(parent=MIDDLE)), "RAM-40"),
    "its own parent": (members(top=ram.header(parent=TOP)), "RAM-40"),
    "a parent of another memory size": (members(base=ram.header(memory=2 << 20)), "RAM-42"),
    "a parent of another kernel": (members(middle=ram.header(parent=BASE, kernel=ram.DIGEST)), "RAM-42"),
    "a parent with an initrd": (members(base=ram.header(initrd=ram.DIGEST)), "RAM-42"),
    "a parent with other arguments": (members(base=ram.header(kernel_args="single")), "RAM-42"),
    "a parent with more disks": (members(base=ram.header(disks=(*ram.HEADER.disks, ram.DIGEST))), "RAM-42"),
    "a parent with other disks": (members(middle=ram.header(parent=BASE, disks=(ram.DIGEST,))), "RAM-42"),
}


def test_the_chain_that_the_bad_ones_are_made_of_is_sound(layout: Layout) -> None:
    top = put_chain(layout, members())
    chain.check(layout, top, snapshot.read_control(layout, top), [BASE, MIDDLE])
    assert snapshot.materialise(layout, top).read_bytes() == filled({0: b"A", 1: b"t", 2: b"C"})


@pytest.mark.spec("RAM-40", "RAM-41", "RAM-42", "GEN-3")
@pytest.mark.parametrize("name", list(BAD_CHAINS))
def test_a_chain_that_is_none_is_refused(layout: Layout, name: str) -> None:
    headers, rule = BAD_CHAINS[name]
    top = put_chain(layout, headers)
    with pytest.raises(SnapshotInvalid) as info:
        snapshot.materialise(layout, top)
    assert info.value.context["rule"] == rule
    assert not list(layout.derived_dir.glob("*.ram"))
    # and by what the manifest says of it
    with pytest.raises(SnapshotInvalid) as info:
        chain.check(layout, top, snapshot.read_control(layout, top), [BASE, MIDDLE])
    assert info.value.context["rule"] == rule


@pytest.mark.spec("RAM-40")
@pytest.mark.parametrize("parents", [[], [BASE], [MIDDLE], [MIDDLE, BASE], [BASE, MIDDLE, BASE], [BASE, BASE, MIDDLE]])
def test_a_manifest_that_names_other_parents(layout: Layout, parents: list[str]) -> None:
    top = put_chain(layout, members())
    with pytest.raises(SnapshotInvalid) as info:
        chain.check(layout, top, snapshot.read_control(layout, top), parents)
    assert info.value.context["rule"] == "RAM-40"


@pytest.mark.spec("RAM-40")
def test_a_parent_that_is_not_there(layout: Layout) -> None:
    top = put_chain(layout, members())
    layout.path(Digest(BASE)).unlink()
    control = snapshot.read_control(layout, top)
    for refused in (
        lambda: snapshot.materialise(layout, top),
        lambda: chain.check(layout, top, control, [BASE, MIDDLE]),
    ):
        with pytest.raises(BlobNotFound, match=BASE) as info:
            refused()
        assert info.value.hint
        assert info.value.context["rule"] == "RAM-40"


@pytest.mark.spec("RAM-41")
def test_a_chain_that_is_too_long(layout: Layout) -> None:
    names = [f"sha256:{i:064x}" for i in range(1, limits.RAM_PARENTS_MAX + 3)]
    for i, name in enumerate(names):
        header = ram.header(parent=names[i - 1]) if i else ram.HEADER
        put(layout, name, ram.blob({0: bytes([i + 1]) * PAGE}, header))
    longest, more = names[limits.RAM_PARENTS_MAX], names[limits.RAM_PARENTS_MAX + 1]
    assert snapshot.materialise(layout, Digest(longest)).read_bytes()[:1] == bytes([limits.RAM_PARENTS_MAX + 1])
    with pytest.raises(SnapshotInvalid) as info:
        snapshot.materialise(layout, Digest(more))
    assert info.value.context["rule"] == "RAM-41"
    with pytest.raises(SnapshotInvalid) as info:
        chain.check(
            layout, Digest(more), snapshot.read_control(layout, Digest(more)), names[: limits.RAM_PARENTS_MAX + 1]
        )
    assert info.value.context["rule"] == "RAM-41"


@pytest.mark.spec("RAM-41")
def test_a_chain_whose_indexes_are_too_long(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    top = put_chain(layout, members())  # of three entries, one, and one
    monkeypatch.setattr(limits, "RAM_CHUNKS_MAX", 5)
    snapshot.materialise(layout, top)
    forget_images(layout)
    monkeypatch.setattr(limits, "RAM_CHUNKS_MAX", 4)
    for refused in (
        lambda: snapshot.materialise(layout, top),
        lambda: chain.check(layout, top, snapshot.read_control(layout, top), [BASE, MIDDLE]),
    ):
        with pytest.raises(SnapshotInvalid, match="5 index entries") as info:
            refused()
        assert info.value.context["rule"] == "RAM-41"


def wrong_index(change: Callable[[list[ramsnap.Chunk]], None], header: Header) -> bytes:
    """A blob of three pages whose index was changed, and sealed."""
    chunks: list[ramsnap.Chunk] = []
    data = b""
    for page in range(3):
        codec, stored, digest = ramsnap.compress(bytes([65 + page]) * PAGE)
        chunks.append(ramsnap.Chunk(page, 1, len(data), len(stored), codec, digest))
        data += bytes(stored)
    change(chunks)
    return ramsnap.build_control(header, b"state", chunks, chunk_pages=2) + data


def zero_chunk(chunks: list[ramsnap.Chunk]) -> None:
    end = chunks[-1].offset + chunks[-1].stored_size
    chunks.append(ramsnap.Chunk(9, 1, end, 0, ramsnap.CODEC_ZERO, bytes(32)))


def overlapping(chunks: list[ramsnap.Chunk]) -> None:
    chunks[1] = chunks[1]._replace(page=0)


def beyond(chunks: list[ramsnap.Chunk]) -> None:
    chunks[2] = chunks[2]._replace(page=PAGES)


def wrong_digest(chunks: list[ramsnap.Chunk]) -> None:
    chunks[2] = chunks[2]._replace(digest=bytes(32))


@pytest.mark.spec("RAM-11", "RAM-14", "RAM-16")
@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("member", ["base", "middle", "top"])
@pytest.mark.parametrize(
    ("change", "rule"),
    [(zero_chunk, "RAM-14"), (overlapping, "RAM-11"), (beyond, "RAM-11"), (wrong_digest, "RAM-16")],
)
def test_an_index_that_lies(
    layout: Layout, member: str, change: Callable[[list[ramsnap.Chunk]], None], rule: str, ready: bool
) -> None:
    """In any member; also where the image of an older one is there already."""
    top = put_chain(layout, members())
    if ready and member != "base":
        snapshot.materialise(layout, Digest(BASE))
    place = {"base": BASE, "middle": MIDDLE, "top": TOP}[member]
    put(layout, place, wrong_index(change, members()[member]))
    if change is zero_chunk and member != "base":
        assert snapshot.materialise(layout, top).stat().st_size == MEMORY
        return
    with pytest.raises(SnapshotInvalid) as info:
        snapshot.materialise(layout, top)
    assert info.value.context["rule"] == rule
    if member != "top":
        assert place in info.value.message, "which member it is"
    left = [path.name for path in layout.derived_dir.iterdir() if path.suffix != ".lock"]
    assert [name for name in left if not name.startswith(hex_of(Digest(BASE)))] == []


@pytest.mark.spec("RAM-17", "RAM-45")
def test_members_of_two_compressions(layout: Layout) -> None:
    text = NOISE[: MEMORY // 2].hex().encode()
    base = add(layout, text, compression=Compression.ZSTD)
    diff = add(layout, filled({3: b"lz4!"}, text), (base, text), compression=Compression.LZ4)
    for compression in Compression:
        with pytest.raises(SnapshotInvalid) as info:
            snapshot.materialise(layout, diff, compression=compression)
        assert info.value.context["rule"] == "RAM-17"


# --- mutations -------------------------------------------------------------------------------------------------------

FUZZED = [
    filled({0: b"a", 3: NOISE[:PAGE], 7: b"q", 8: b"q", 255: b"z"}),
    filled({3: b"\0", 7: b"r", 30: NOISE[PAGE : 2 * PAGE]}, filled({0: b"a", 8: b"q", 255: b"z"})),
    filled({0: b"x", 31: b"\0", 255: b"\0"}, filled({7: b"r", 8: b"q", 30: NOISE[PAGE : 2 * PAGE]})),
]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, list[Digest], list[bytes]]:
    layout = Layout(tmp_path_factory.mktemp("fuzzed") / "store")
    digests = chain_of(layout, *FUZZED)
    return layout, digests, [layout.path(digest).read_bytes() for digest in digests]


@st.composite
def mutations(draw: st.DrawFn, whole: bytes) -> bytes:
    """*whole* with bytes of its prefix, header, index or chunks changed, cut out or put in."""
    data = bytearray(whole)
    prefix = ramsnap.parse_prefix(whole)
    places = (
        st.integers(0, 127)
        | st.integers(128, prefix.index_end)
        | st.integers(prefix.index_offset, prefix.index_end)
        | st.integers(prefix.data_offset, len(data) - 1)
    )
    for _ in range(draw(st.integers(1, 3))):
        at = min(draw(places), len(data) - 1)
        match draw(st.sampled_from(["flip", "set", "cut", "insert"])):
            case "flip":
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set":
                data[at : at + 8] = draw(st.binary(min_size=8, max_size=8))
            case "cut":
                del data[at : at + draw(st.integers(1, 80))]
            case _:
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data)


@pytest.mark.spec("RAM-2", "RAM-7", "RAM-16", "RAM-43", "SEC-1")
@given(data=st.data(), member=st.integers(0, 2), ready=st.integers(-1, 1))
def test_a_mutated_member_is_refused_or_means_the_same(
    fuzzed: tuple[Layout, list[Digest], list[bytes]], data: st.DataObject, member: int, ready: int
) -> None:
    """An error, or the very same memory: never another one, whichever ancestor's image is there already."""
    layout, digests, blobs = fuzzed
    forget_images(layout)
    if ready >= 0:
        snapshot.materialise(layout, digests[ready])
    put(layout, digests[member], data.draw(mutations(blobs[member])))
    try:
        assert snapshot.materialise(layout, digests[-1]).read_bytes() == FUZZED[-1]
    except (SnapshotInvalid, JsonInvalid, OvmsError):
        left = {path.name.partition(".")[0] for path in layout.derived_dir.iterdir() if path.suffix != ".lock"}
        assert hex_of(digests[-1]) not in left
    finally:
        put(layout, digests[member], blobs[member])


@pytest.mark.spec("RAM-43", "SEC-1")
@given(data=st.data(), member=st.integers(0, 2))
def test_a_mutated_member_that_is_sealed_again(
    fuzzed: tuple[Layout, list[Digest], list[bytes]], data: st.DataObject, member: int
) -> None:
    """An attacker seals the control part anew: then it may mean another memory, of the right size, or is refused."""
    import hashlib

    layout, digests, blobs = fuzzed
    forget_images(layout)
    changed = bytearray(data.draw(mutations(blobs[member])))
    end = ramsnap.parse_prefix(blobs[member]).index_end
    if len(changed) < end:
        return
    changed[96:128] = hashlib.sha256(changed[128:end]).digest()
    put(layout, digests[member], bytes(changed))
    try:
        assert snapshot.materialise(layout, digests[-1]).stat().st_size == MEMORY
    except (SnapshotInvalid, JsonInvalid, BlobNotFound):
        pass
    finally:
        put(layout, digests[member], blobs[member])


# --- threads ---------------------------------------------------------------------------------------------------------


def test_a_start_that_is_broken_off_leaves_nothing(layout: Layout) -> None:
    digest = add(layout, NOISE)

    class Stop(Exception):
        pass

    class Task:
        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def advance(self, _: int) -> None:
            raise Stop

    progress = type("P", (), {"task": lambda *_: Task()})()
    with pytest.raises(Stop):
        snapshot.materialise(layout, digest, progress)
    assert [path for path in layout.derived_dir.iterdir() if path.suffix != ".lock"] == []
