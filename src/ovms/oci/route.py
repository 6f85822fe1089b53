"""Where the requests for a repository go: to its mirrors in order and then to its registry, or to the one it is pushed to.

A mirror that cannot be reached, refuses, fails (5xx) or lacks the artifact is passed over, and not asked again; one that
lacks a blob, for that blob only. What a mirror sends is checked like anything else: wrong bytes are an error, and no
reason to ask elsewhere. A repository that was written to is read from where it was written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from ovms.errors import RegistryDenied, RegistryUnreachable
from ovms.oci.http import Answer, Asked
from ovms.oci.registries import Endpoint
from ovms.oci.session import BUSY, Busy, MakeBody, Place, Session

_PASS: Final = BUSY | {401, 403, 404}


class Find(Protocol):
    """Finds the places of a repository."""

    def __call__(self, repository: str, *, pull: bool) -> Sequence[Place]:
        """In the order in which to ask; the last is no mirror."""


class Route:
    """The way to the repositories of one registry. Several threads may use it at once."""

    def __init__(self, find: Find, say: Callable[[str], None] | None = None, host: str = "") -> None:
        """*say* is told which mirror serves, and which is passed over. *host* is what names call the registry."""
        self._host = host
        self._find = find
        self._say = say or (lambda _text: None)
        self._places: dict[tuple[str, bool], Sequence[Place]] = {}
        self._at: dict[str, int] = {}
        self._served: set[str] = set()
        self._written: set[str] = set()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the connections."""
        for session in {place.session for places in self._places.values() for place in places}:
            session.close()

    def request(
        self,
        method: str,
        path: str,
        repository: str,
        actions: str,
        headers: Mapping[str, str],
        body: MakeBody | None = None,
    ) -> Answer:
        """Sends a request to where it belongs: *path* is ``repository/…``, or a URL that an answer gave."""
        rest = path.removeprefix(repository)
        if "push" in actions or repository in self._written:
            self._written.add(repository)
            place = self._find_places(repository, pull=False)[0]
            return _ask(place, method, rest, repository, actions, headers, body)
        return self._pull(method, rest, repository, actions, headers)

    def send(self, path: str, repository: str) -> Asked | None:
        """Sends a GET for a part of an artifact that is being pulled, and does not wait for the answer.

        It goes to whoever serves the artifact. None where nobody does yet, or :meth:`~ovms.oci.session.Session.send` says so.
        """
        written = repository in self._written
        if not written and repository not in self._served:
            return None
        place = self._find_places(repository, pull=not written)[0 if written else self._at.get(repository, 0)]
        name = place.endpoint.rewrite(repository)
        return place.session.send(name + path.removeprefix(repository), name, f"repository:{name}:pull")

    def mount_source(self, repository: str, source: str) -> str | None:
        """What *source* is called where *repository* is pushed to; None where it is pushed to another registry."""
        own, other = (self._find_places(name, pull=False)[0] for name in (repository, source))
        return other.endpoint.rewrite(source) if other.session is own.session else None

    def broke(self, repository: str, asked: str, why: str) -> None:
        """Notes that *asked* broke off in the middle of an answer: where it is a mirror, the next one goes on."""
        if repository in self._written:
            return
        places = self._find_places(repository, pull=True)
        at = self._at.get(repository, 0)
        if places[at].endpoint.mirror and places[at].session.host == asked:
            self._pass_over(repository, at, why, "")

    def _pull(self, method: str, rest: str, repository: str, actions: str, headers: Mapping[str, str]) -> Answer:
        places = self._find_places(repository, pull=True)
        manifest = rest.startswith("/manifests/")
        first = self._at.get(repository, 0)
        if rest.startswith(("http://", "https://")):  # how an answer goes on: nobody else knows that
            own = next((place for place in places if place.session.owns(rest)), places[first])
            return _ask(own, method, rest, repository, actions, headers)
        for number, place in enumerate(places[first:], first):
            sticks = number == first and repository in self._served
            if manifest and not sticks and not place.endpoint.serves(by_digest=":" in rest):
                continue
            if not place.endpoint.mirror:
                answer = _ask(place, method, rest, repository, actions, headers)
                return self._taken(repository, number, place, rest, answer)
            try:
                answer = _ask(place, method, rest, repository, actions, headers)
            except (RegistryUnreachable, RegistryDenied, Busy) as exc:
                self._pass_over(repository, number, exc.message, rest)
                continue
            if answer.status not in _PASS:
                return self._taken(repository, number, place, rest, answer)
            with answer:
                if manifest or answer.status != 404:
                    why = "it does not have the artifact" if answer.status == 404 else f"it answers {answer.status}"
                    self._pass_over(repository, number, why, rest)
        raise AssertionError("the last place is no mirror")

    def _taken(self, repository: str, number: int, place: Place, rest: str, answer: Answer) -> Answer:
        manifest = rest.startswith("/manifests/")
        with self._lock:
            if manifest and answer.status == 200 and repository not in self._served:
                self._served.add(repository)
                self._at[repository] = max(number, self._at.get(repository, 0))
                if place.endpoint.mirror:
                    self._say(f"{self._asked(repository, rest)} is served by the mirror {place.session.host}")
        return answer

    def _asked(self, repository: str, rest: str) -> str:
        # as the user calls it
        name = f"{self._host}/{repository}" if self._host else repository
        _, manifest, target = rest.partition("/manifests/")
        return f"{name}{'@' if ':' in target else ':'}{target}" if manifest else name

    def _pass_over(self, repository: str, number: int, why: str, rest: str) -> None:
        with self._lock:
            if self._at.get(repository, 0) > number:
                return
            self._at[repository] = number + 1
            self._served.discard(repository)
            places = self._find_places(repository, pull=True)
            mirror = places[number].session.host
            self._say(f"the mirror {mirror} is passed over for {self._asked(repository, rest)}: {why}")

    def _find_places(self, repository: str, *, pull: bool) -> Sequence[Place]:
        key = (repository, pull)
        if key not in self._places:
            self._places[key] = self._find(repository, pull=pull)
        return self._places[key]


def _ask(
    place: Place,
    method: str,
    rest: str,
    repository: str,
    actions: str,
    headers: Mapping[str, str],
    body: MakeBody | None = None,
) -> Answer:
    name = place.endpoint.rewrite(repository)
    path = rest if rest.startswith(("http://", "https://")) else name + rest
    return place.session.request(method, path, name, f"repository:{name}:{actions}", headers, body)


class Alone:
    """A registry without any configuration: one place for every repository."""

    def __init__(self, session: Session) -> None:
        self._places = (Place(session, Endpoint(session.host, "", False, False, False)),)

    def __call__(self, repository: str, *, pull: bool) -> Sequence[Place]:
        """The one place."""
        return self._places
