"""Asks the policies that hold about artifacts: as they come, and each time they are used.

What is asked about is the digest of a manifest. That covers every part (each is named by its digest there), so neither a name, an index
nor the order of things in the store can put another artifact in the place of the one that was checked.

Which rule holds follows from where an artifact came from (:mod:`ovms.oci.origins`), whatever it is called:

* It was made here: the rule for ``local``, and of each artifact that it was made from, its own.
* It came from several places: it is enough that the rule for one of them is met.
* Nobody knows: the rules for all names that it has here; without a name, the default.
* It is asked for by a name with a registry, and was not made here: the rule for that name, too.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from ovms.errors import OvmsError, PolicyRefused, SignatureInvalid, SignatureMissing
from ovms.lazy import dataclass, field
from ovms.oci import origins
from ovms.oci.descriptor import Descriptor, ImageIndex, ImageManifest
from ovms.oci.layout import Layout
from ovms.oci.origins import Origin
from ovms.oci.reference import Reference
from ovms.oci.transport import Place
from ovms.spec import mediatypes
from ovms.spec.digest import Digest
from ovms.trust.files import InForce, Loaded, Policies

if TYPE_CHECKING:
    from ovms.oci.registry import RegistryClient
    from ovms.trust.judge import Evidence, Verdict
    from ovms.trust.model import Source

#: Artifacts that one was made from, and those that these were made from, in all.
_SOURCES_MAX: Final = 256
#: Seconds that an answer is good for where a rule has a maximum age.
_FRESH: Final = 60.0
#: Answers that are remembered.
_KNOWN_MAX: Final = 4096

_Connect = Callable[[str], "RegistryClient"]
#: Artifacts that one was made from, without and with their RAM snapshots, and what decides them; None while that is looked for.
_Seen = dict[tuple[Digest, bool], "list[Verdict] | None"]


class Guard:
    """The policies over one store. Safe for threads."""

    def __init__(self, layout: Layout, policies: Policies) -> None:
        #: Which policies hold.
        self.policies = policies
        self._layout = layout
        self._lock = threading.Lock()
        self._stamp: object = None
        self._allowed: dict[tuple[Digest, str | None, bool], float] = {}

    # --- what comes ------------------------------------------------------------------------------------------------

    def admit(
        self,
        image: ImageManifest,
        top: Descriptor,
        where: Reference | Place,
        client: RegistryClient | None,
        *,
        ram: bool,
    ) -> None:
        """See :meth:`ovms.artifact.guard.Guard.admit`. Signatures that were asked for are kept beside the artifact."""
        verdicts = self.arriving(image, top, where, client, ram=ram)
        _require(verdicts)
        place = origins.place_of(where)
        with self._layout.using():
            indexes = () if top.digest == image.digest else (top.digest,)
            origins.add(self._layout, image.digest, Origin(places=(place,), indexes=indexes))
            if client is not None and any(verdict.rule.wants_signatures for verdict in verdicts):
                attested = any(verdict.rule.attestations for verdict in verdicts)
                _keep(self._layout, client, place, _subjects(image, top), attested=attested)

    def arriving(
        self,
        image: ImageManifest,
        top: Descriptor,
        where: Reference | Place,
        client: RegistryClient | None,
        *,
        ram: bool,
    ) -> list[Verdict]:
        """What each policy makes of an artifact that is not here yet: one verdict each; none without a policy."""
        force = self.policies.in_force()
        if not force.policies:
            return []
        from ovms.trust import judge
        from ovms.trust.sources import LocalSource, RegistrySource

        place = origins.place_of(where)
        known: dict[bool, Evidence] = {}

        def evidence(*, attested: bool = False) -> Evidence:
            if attested not in known:
                places: list[Source] = [LocalSource(self._layout)]
                if client is not None:
                    places.append(RegistrySource(client, _repository(place)))
                subjects = [subject.digest for subject in _subjects(image, top)]
                known[attested] = _gather(places, subjects, attested=attested)
            return known[attested]

        def statements() -> Evidence:
            return evidence(attested=True)

        case = judge.Case(str(where), image.digest, place, ram and has_ram(image), created(image))
        now = datetime.now(UTC)
        return [judge.judge(one.policy, one.signers, case, evidence, now, statements) for one in force.policies]

    # --- what is used ----------------------------------------------------------------------------------------------

    def allow(
        self, digest: Digest, name: str, *, asked: str | None = None, connect: _Connect | None = None, ram: bool = False
    ) -> None:
        """See :meth:`ovms.artifact.guard.Guard.allow`."""
        force = self.policies.in_force()
        if not force.policies:
            return
        key, stamp = (digest, asked, ram), (force.stamp, self._layout.index_stamp())
        if self._remembers(key, stamp):
            return
        verdicts = self._using(force, _Asked(digest, name, asked, connect, ram))
        _require(verdicts)
        aging = any(verdict.rule.max_age is not None for verdict in verdicts)
        with self._lock:
            if stamp != self._stamp or len(self._allowed) >= _KNOWN_MAX:
                self._stamp, self._allowed = stamp, {}
            self._allowed[key] = time.monotonic() + _FRESH if aging else math.inf

    def quick(self, digest: Digest, *, asked: str | None = None, ram: bool = False) -> bool:
        """Whether :meth:`allow` would let it pass at once, without a look at any signature."""
        force = self.policies.in_force()
        if not force.policies:
            return True
        return self._remembers((digest, asked, ram), (force.stamp, self._layout.index_stamp()))

    def using(
        self, digest: Digest, name: str, *, asked: str | None = None, connect: _Connect | None = None, ram: bool = False
    ) -> list[Verdict]:
        """What the policies make of an artifact in the store: the verdicts that decide it; none without a policy."""
        return self._using(self.policies.in_force(), _Asked(digest, name, asked, connect, ram))

    def _remembers(self, key: tuple[Digest, str | None, bool], stamp: tuple[object, object]) -> bool:
        with self._lock:
            return stamp[1] is not None and stamp == self._stamp and self._allowed.get(key, 0.0) > time.monotonic()

    def _using(self, force: InForce, asked: _Asked) -> list[Verdict]:
        return [verdict for one in force.policies for verdict in self._decide(one, asked, {})]

    def _decide(self, loaded: Loaded, asked: _Asked, seen: _Seen) -> list[Verdict]:
        # the verdicts that decide: all of them have to be good
        image = self._image(asked.digest)
        origin = origins.read(self._layout, asked.digest)
        # a name without a registry says nothing of where something comes from
        further = [place for place in _places([asked.asked or ""]) if place != LOCAL]
        if origin is None or not (origin.made or origin.places):
            places = [*_places(self._names(asked.digest)), *further] or [""]
            indexes = Origin(indexes=tuple(self._indexes(asked.digest)))
            return self._all(loaded, asked, image, indexes, dict.fromkeys(places))
        ways = []
        if origin.made:
            local = self._all(loaded, asked, image, origin, [LOCAL])
            ways.append([*local, *self._sources(loaded, asked, origin, seen)] if _good(local) else local)
        for place in origin.places:
            if ways and _good(ways[-1]):
                break
            ways.append(self._all(loaded, asked, image, origin, [place]))
        decided = next((way for way in ways if _good(way)), ways[0] if ways else [])
        if origin.made or not _good(decided):
            return decided
        further = [place for place in further if place != decided[-1].place]
        return [*decided, *self._all(loaded, asked, image, origin, further)]

    def _sources(self, loaded: Loaded, asked: _Asked, origin: Origin, seen: _Seen) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for source in origin.sources:
            name = f"{source.digest[:19]}…, from which {asked.name} was made,"
            of = _Asked(source.digest, name, None, asked.connect, asked.ram and source.ram)
            key = of.digest, of.ram
            if key not in seen:
                if len(seen) >= _SOURCES_MAX:
                    raise PolicyRefused(f"{asked.name} was made from more than {_SOURCES_MAX} artifacts")
                seen[key] = None
                seen[key] = self._decide(loaded, of, seen)
            if (known := seen[key]) is None:
                raise PolicyRefused(f"{asked.name} is said to be made from itself")
            verdicts += known
        return verdicts

    def _all(
        self, loaded: Loaded, asked: _Asked, image: ImageManifest | None, origin: Origin, places: Iterable[str]
    ) -> list[Verdict]:
        return [self._judge(loaded, asked, image, origin, place) for place in places]

    def _judge(self, loaded: Loaded, asked: _Asked, image: ImageManifest | None, origin: Origin, place: str) -> Verdict:
        from ovms.trust import judge
        from ovms.trust.sources import LocalSource

        subjects = [asked.digest, *(index for index in origin.indexes if self._lists(index, asked.digest))]

        def evidence() -> Evidence:
            return _gather([LocalSource(self._layout)], subjects)

        def statements() -> Evidence:
            return _gather([LocalSource(self._layout)], subjects, attested=True)

        ram = asked.ram and (image is None or has_ram(image))
        case = judge.Case(asked.name, asked.digest, place, ram, None if image is None else created(image))

        def ask() -> Verdict:
            return judge.judge(loaded.policy, loaded.signers, case, evidence, datetime.now(UTC), statements)

        verdict = ask()
        unsigned = isinstance(verdict.refusal, (SignatureMissing, SignatureInvalid))
        attested = bool(verdict.rule.attestations)
        if unsigned and image is not None and self._fetch(asked, image, place, subjects, attested=attested):
            verdict = ask()
        return verdict

    def _fetch(
        self, asked: _Asked, image: ImageManifest, place: str, subjects: Sequence[Digest], *, attested: bool
    ) -> bool:
        # signatures that came after the artifact, or were not asked for then
        registry = _registry(place)
        if registry is None or asked.connect is None or place in asked.fetched:
            return False
        asked.fetched.append(place)
        wanted = [image.descriptor(), *(self._index(index) for index in subjects if index != image.digest)]
        # where the registry can't be asked, there is none
        with contextlib.suppress(OvmsError):
            _keep(self._layout, asked.connect(registry), place, wanted, attested=attested)
            return True
        return False

    def _image(self, digest: Digest) -> ImageManifest | None:
        # one that another was made from may be gone
        if self._layout.size(digest) is None:
            return None
        manifest = self._layout.manifest(digest)
        return manifest if isinstance(manifest, ImageManifest) else None

    def _index(self, digest: Digest) -> Descriptor:
        return Descriptor(mediatypes.OCI_INDEX, digest, self._layout.size(digest) or 0)

    def _lists(self, index: Digest, digest: Digest) -> bool:
        if self._layout.size(index) is None:
            return False
        manifest = self._layout.manifest(index)
        return isinstance(manifest, ImageIndex) and any(one.digest == digest for one in manifest.manifests)

    def _names(self, digest: Digest) -> list[str]:
        tops = {digest, *self._indexes(digest)}
        return [entry.name for entry in self._layout.entries() if entry.name and entry.descriptor.digest in tops]

    def _indexes(self, digest: Digest) -> list[Digest]:
        tops = {e.descriptor.digest for e in self._layout.entries() if e.descriptor.media_type == mediatypes.OCI_INDEX}
        return [top for top in sorted(tops) if self._lists(top, digest)]


@dataclass(frozen=True)
class _Asked:
    """One question about an artifact in the store; *fetched* are the places whose signatures were fetched to answer it."""

    digest: Digest
    name: str
    asked: str | None
    connect: _Connect | None
    ram: bool
    fetched: list[str] = field(default_factory=list)


def has_ram(image: ImageManifest) -> bool:
    """Whether a RAM snapshot is among an artifact's parts."""
    return any(layer.media_type in mediatypes.RAM_SNAPSHOTS for layer in image.layers)


def created(image: ImageManifest) -> datetime | None:
    """When an artifact was made, as its manifest says; None where it does not."""
    from ovms.spec.document import check_time

    text = image.annotations.get(mediatypes.CREATED_ANNOTATION, "")
    if check_time(text) is not None or text[17:19] == "60":
        return None
    return datetime.fromisoformat(text.upper())


def _subjects(image: ImageManifest, top: Descriptor) -> list[Descriptor]:
    # A signature of an index stands for what it lists, as with Cosign.
    own = image.descriptor()
    return [own] if top.digest == own.digest else [own, top]


def _gather(places: Sequence[Source], subjects: Sequence[Digest], *, attested: bool = False) -> Evidence:
    return [
        (subject, one)
        for subject in subjects
        for place in places
        for one in place.signatures(subject, attested=attested)
    ]


def _keep(
    layout: Layout, client: RegistryClient, place: str, subjects: Sequence[Descriptor], *, attested: bool
) -> None:
    from ovms.trust import sources

    for subject in subjects:
        sources.keep(layout, client, _repository(place), subject)
        if attested:
            sources.keep(layout, client, _repository(place), subject, attested=True)


def _good(verdicts: Sequence[Verdict]) -> bool:
    return bool(verdicts) and all(verdict.allowed for verdict in verdicts)


def _require(verdicts: Sequence[Verdict]) -> None:
    for verdict in verdicts:
        if verdict.refusal is not None:
            raise verdict.refusal


def _places(names: Iterable[str]) -> list[str]:
    # the places that names stand for, where nobody knows where an artifact came from
    answer = []
    for name in names:
        with contextlib.suppress(OvmsError):
            reference = Reference.parse(name)
            answer.append(LOCAL if reference.registry is None else reference.name)
    return answer


def _registry(place: str) -> str | None:
    with contextlib.suppress(OvmsError):
        return Reference.parse(f"{place}:x").registry
    return None


def _repository(place: str) -> str:
    return Reference.parse(f"{place}:x").repository


#: The scope of what was made here (see :mod:`ovms.trust.policy`, which most hosts never read).
LOCAL: Final = "local"
