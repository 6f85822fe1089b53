"""Where the artifacts of the local store came from: what a policy goes by, whatever they are called here.

::

    ovms.origins/<hex of the manifest>    {"version": 1, "made": false, "places": ["registry.example/team/web"],
                                           "sources": [{"digest": …, "ram": false}], "indexes": [digest]}

A record is there before the artifact has a name. It only grows: the same bytes may come from several places. It goes with the
artifact, unless another was made from it.
"""

from __future__ import annotations

from typing import Any, Final

from ovms import fsutil
from ovms.errors import FileProblem, JsonInvalid, StoreCorrupt
from ovms.lazy import dataclass, regex
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.transport import Place
from ovms.spec import limits, strictjson
from ovms.spec.digest import Digest, hex_of, is_digest

#: Entries of each list of a record, and its bytes.
_ENTRIES_MAX: Final = 256
_SIZE_MAX: Final = 1 * limits.MIB
#: What ``fsutil.atomic_write`` leaves when it is killed.
_TEMPORARY: Final = regex(r"\.[0-9a-f]{64}\.[0-9a-f]+\.tmp")


@dataclass(frozen=True)
class Source:
    """An artifact that another was made from here; *ram*: with its RAM snapshot."""

    digest: Digest
    ram: bool = False


@dataclass(frozen=True)
class Origin:
    """Where an artifact came from.

    *made* here, from *sources*; or from *places*: a registry and repository (``registry.example/team/web``), ``oci`` or
    ``oci-archive``. *indexes* list its manifest.
    """

    made: bool = False
    places: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    indexes: tuple[Digest, ...] = ()

    def __or__(self, other: Origin) -> Origin:
        return Origin(
            self.made or other.made,
            tuple(dict.fromkeys((*self.places, *other.places)))[:_ENTRIES_MAX],
            tuple(dict.fromkeys((*self.sources, *other.sources))),
            tuple(dict.fromkeys((*other.indexes, *self.indexes)))[:_ENTRIES_MAX],
        )


def place_of(where: Reference | Place) -> str:
    """What a record calls a place."""
    return str(where.kind) if isinstance(where, Place) else where.name


def read(layout: Layout, digest: Digest) -> Origin | None:
    """Where an artifact came from; None where that was never written down.

    Raises:
        StoreCorrupt: the record can't be read.
    """
    path = layout.origin_dir / hex_of(digest)
    try:
        data = fsutil.read_input(path, "the origin of an artifact", max_size=_SIZE_MAX)
        return _parse(strictjson.parse(data, str(path), max_size=_SIZE_MAX))
    except FileProblem as exc:
        if exc.code == "file-missing":
            return None
        why = exc.message
    except (JsonInvalid, KeyError, TypeError, ValueError) as exc:
        why = str(exc)
    raise StoreCorrupt(
        f"{path} does not tell where {digest} came from: {ascii(why)[:200]}",
        hint="'ovm fsck --repair' takes it out of the way; then pull or build the artifact again",
        digest=digest,
    )


def add(layout: Layout, digest: Digest, origin: Origin) -> None:
    """Adds to what is known of where an artifact came from. The caller holds ``layout.using()``."""
    with layout.index_lock():
        try:
            known = read(layout, digest)
        except StoreCorrupt:
            known = None
        merged = origin if known is None else known | origin
        if merged == known:
            return
        layout.origin_dir.mkdir(exist_ok=True)
        fsutil.atomic_write(layout.origin_dir / hex_of(digest), strictjson.canonical(_document(merged)))


def sweep(layout: Layout) -> None:
    """Forgets artifacts that are gone (under the collector's lock), unless another was made from them."""
    try:
        there = list(layout.origin_dir.iterdir())
    except FileNotFoundError:
        return
    known = [path for path in there if is_digest(f"sha256:{path.name}")]
    for path in there:
        if _TEMPORARY.fullmatch(path.name):  # of a writer that was killed
            path.unlink(missing_ok=True)
    gone, used = [], set[str]()
    for path in known:
        digest = Digest(f"sha256:{path.name}")
        if layout.size(digest) is None:
            gone.append(path)
            continue
        try:
            record = read(layout, digest)
        except StoreCorrupt:
            continue
        used.update(hex_of(source.digest) for source in ([] if record is None else record.sources))
    for path in gone:
        if path.name not in used:
            path.unlink(missing_ok=True)


def _document(origin: Origin) -> dict[str, Any]:
    return {
        "version": 1,
        "made": origin.made,
        "places": list(origin.places),
        "sources": [{"digest": source.digest, "ram": source.ram} for source in origin.sources],
        "indexes": list(origin.indexes),
    }


def _parse(document: Any) -> Origin:
    if document["version"] != 1:
        raise ValueError("it is of another version")
    return Origin(
        _typed(document["made"], bool),
        tuple(_typed(place, str) for place in _typed(document["places"], list)),
        tuple(
            Source(_digest(source["digest"]), _typed(source["ram"], bool))
            for source in _typed(document["sources"], list)
        ),
        tuple(_digest(index) for index in _typed(document["indexes"], list)),
    )


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!a} stands where another type belongs")
    return value


def _digest(value: Any) -> Digest:
    if not isinstance(value, str) or not is_digest(value):
        raise ValueError(f"{value!a} is no digest")
    return Digest(value)
