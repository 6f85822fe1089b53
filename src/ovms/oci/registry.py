"""A client for one registry: the distribution API, as far as ovms needs it.

Source: the OCI distribution specification 1.1.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Mapping
from types import TracebackType
from typing import IO, Final, Self, TypeVar
from urllib.parse import quote, urlencode

from ovms.errors import (
    BlobNotFound,
    DigestMismatch,
    JsonInvalid,
    ReferenceNotFound,
    RegistryDenied,
    RegistryError,
    RegistryProtocol,
)
from ovms.lazy import dataclass, regex
from ovms.oci import appending, auth
from ovms.oci.descriptor import Descriptor
from ovms.oci.http import (
    BUFFER,
    CONNECT_TIMEOUT,
    READ_TIMEOUT,
    REDIRECTS,
    Answer,
    Asked,
    Broken,
    Refused,
    host_of,
    next_url,
    origin,
    shown,
)
from ovms.oci.patience import BACKOFF, Patience
from ovms.oci.ranges import NoRanges
from ovms.oci.reference import Reference
from ovms.oci.route import Alone, Find, Route
from ovms.oci.session import BUSY, Busy, CredentialSource, Session, Settings, busy, refused_elsewhere
from ovms.spec import limits, mediatypes, strictjson
from ovms.spec.digest import Digest, is_digest, of_bytes

T = TypeVar("T")


class Elsewhere(Exception):
    """A request is sent elsewhere. ``send`` asks there; None where that has to be done in the usual way."""

    def __init__(self, send: Callable[[], Asked | None]) -> None:
        super().__init__()
        self.send = send


#: Seconds that a small blob may be waited for by whom others wait for.
_SMALL_TIME: Final = 10.0
#: What docker-registry says of a blob that is there, in the moment in which another client uploads it, too.
_BLOB_UNKNOWN: Final = "blob unknown to registry"
_ERROR_BODY_MAX: Final = 64 * limits.KIB
_ERROR_BODY_TIME: Final = 10.0
_GZIP: Final = b"\x1f\x8b"
#: What no manifest is of, and a captive portal's answer is.
_PAGES: Final = frozenset({"text/html", "application/xhtml+xml"})
#: Docker's types are no artifact of ours, and asked for all the same: some registries answer that there is nothing, or fail, where
#: they have nothing else, and what came can be named.
_MANIFEST_TYPES: Final = ", ".join(
    (
        mediatypes.OCI_MANIFEST,
        mediatypes.OCI_INDEX,
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)


#: Opens the content of a blob at an offset, to give so many bytes.
Body = Callable[[int, int], "IO[bytes]"]

#: Blobs above this are uploaded in chunks: what has arrived need not be sent again.
CHUNKED_FROM: Final = 128 * limits.MIB
CHUNK: Final = 64 * limits.MIB
#: Answers to a first chunk by registries that take none, or none of that size.
_NO_CHUNKS: Final = frozenset({400, 404, 405, 411, 413, 416, 501})
#: Answers to a later one by registries that have forgotten the upload, or are at another place of it.
_ASTRAY: Final = frozenset({404, 416})


#: What can be done about some statuses.
_HINTS: Final = {
    413: "that is too large for it, or for what lies before it: raise its limit (nginx: client_max_body_size)",
    507: "it has no room left: ask its owner",
}
#: Answers by registries without the referrers API.
_NO_REFERRERS: Final = frozenset({400, 404, 405, 501})
#: ``Link: <url>; rel="next"``: which parameters stand before ``rel`` does not matter.
_NEXT: Final = regex(r'<([^<>]{1,4096})>\s*(?:;[^<>,;]{1,300}){0,4};\s*rel="?next"?')


@dataclass(frozen=True)
class ReferrersPage:
    """An answer of the referrers API, not looked into, and where the list goes on."""

    raw: bytes
    next: str | None


class _NoChunks(Exception):
    """The registry takes no chunked upload."""


class RegistryClient:
    """One registry. Connections are kept open until :meth:`close`. Several threads may use it at once."""

    def __init__(
        self,
        host: str,
        *,
        credentials: CredentialSource | None = None,
        connect_timeout: float = CONNECT_TIMEOUT,
        read_timeout: float = READ_TIMEOUT,
        backoff: float = BACKOFF,
        find: Find | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Connects to nothing yet. *host* is what names call the registry, ``host[:port]``.

        *find* says where its repositories are, and how to speak to those places (:mod:`ovms.oci.connect` makes it of the
        user's configuration; *credentials* and the timeouts are then its matter). *say* is told which mirror serves, and
        for whom we wait.
        """
        self.host = host
        settings = Settings(credentials, connect_timeout=connect_timeout, read_timeout=read_timeout)
        self._route = Route(find or Alone(Session(host, settings)), say, host)
        self._say = say or (lambda _text: None)
        self._backoff = backoff
        self._worked = False
        self._chunk_size = CHUNK

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._route.close()

    # --- manifests ---------------------------------------------------------------------------------------------

    def get_manifest(self, reference: Reference, *, accept: str = _MANIFEST_TYPES) -> tuple[bytes, Descriptor]:
        """A manifest or index, and its descriptor. For what is of no type in *accept*, some registries say that
        there is nothing.

        Raises:
            ReferenceNotFound: the registry has none of that name.
            DigestMismatch: it is not the one that the reference's digest promises.
            RegistryError: and its kinds: as the registry met us.
        """
        return self.retrying(lambda: self._get_manifest(reference, accept))

    def _get_manifest(self, reference: Reference, accept: str) -> tuple[bytes, Descriptor]:
        path = f"{reference.repository}/manifests/{reference.target}"
        with self._request("GET", path, reference.repository, "pull", {"Accept": accept}) as answer:
            if answer.status == 404:
                raise ReferenceNotFound(
                    f"the registry {answer.asked} has no artifact {reference}",
                    hint="check the name and the tag",
                    reference=str(reference),
                )
            what = f"the manifest of {reference}"
            self._expect(answer, 200, what, reference.repository)
            raw = answer.read(limits.OCI_MANIFEST_MAX, what=what)
            media_type = (answer.header("content-type") or mediatypes.OCI_MANIFEST).partition(";")[0].strip()
            _refuse_page(answer, media_type, what)
            _refuse_compressed(answer, raw, what)
            promised = reference.digest or answer.header("docker-content-digest")
        digest = of_bytes(raw)
        # a digest of another algorithm in the header is none of our business
        if promised is not None and is_digest(promised) and promised != digest:
            raise DigestMismatch(
                f"{answer.asked} sent a manifest with digest {digest} for {reference}, which should have {promised}",
                hint="the registry is damaged, or what lies between changed it",
                expected=promised,
                got=digest,
            )
        return raw, Descriptor(shown(media_type), digest, len(raw))

    def put_manifest(self, repository: str, target: str, raw: bytes, media_type: str, *, retry: bool = True) -> bool:
        """Uploads a manifest under a tag or its digest. Whether the registry takes care of its ``subject``.

        Without *retry*: one attempt, for what may be out of date a moment later.
        """

        def attempt() -> bool:
            return self._put_manifest(repository, target, raw, media_type)

        return self.retrying(attempt) if retry else attempt()

    def _put_manifest(self, repository: str, target: str, raw: bytes, media_type: str) -> bool:
        path = f"{repository}/manifests/{target}"
        headers = {"Content-Type": media_type}
        with self._request("PUT", path, repository, "pull,push", headers, lambda: raw) as answer:
            self._expect(answer, 201, f"the manifest {repository}:{target}", repository)
            return answer.header("oci-subject") is not None

    # --- blobs -------------------------------------------------------------------------------------------------

    def has_blob(self, repository: str, digest: Digest) -> bool:
        """Whether the registry has a blob in this repository."""
        return self.retrying(lambda: self._has_blob(repository, digest))

    def _has_blob(self, repository: str, digest: Digest) -> bool:
        with self._request("HEAD", f"{repository}/blobs/{digest}", repository, "pull,push") as answer:
            if answer.status == 404:
                return False
            self._expect(answer, 200, f"the blob {digest}", repository)
            return True

    def read_blob(self, repository: str, descriptor: Descriptor, offset: int = 0) -> Generator[memoryview, None, None]:
        """A blob's bytes from *offset* on, as they come: as many as the descriptor says, not yet checked.

        A piece is overwritten when the next is asked for. One attempt: the caller goes on where it broke off.

        Raises:
            BlobNotFound: the registry does not have it.
            DigestMismatch: it is of another size.
            Broken, Busy: another try may go better.
        """
        # with its end: go-containerregistry refuses a range without one
        headers = {"Range": f"bytes={offset}-{descriptor.size - 1}"} if offset else {}
        with self._request("GET", f"{repository}/blobs/{descriptor.digest}", repository, "pull", headers) as answer:
            _refuse_lost(answer, repository, descriptor)
            if offset and answer.status == 416:
                # some announce the whole blob's length with it: the body can't be read
                raise _wrong_size(answer, descriptor, offset)
            resumed = bool(offset) and answer.status == 206
            if not resumed:
                self._expect(answer, 200, f"the blob {descriptor.digest}", repository)
            elif not (answer.header("content-range") or "").startswith(f"bytes {offset}-"):
                raise RegistryProtocol(f"{answer.asked} answers with another part of a blob than was asked for")
            # a registry that knows no ranges sends it all: what is here is skipped
            received, skip = (offset, 0) if resumed else (0, offset)
            length = answer.length()
            if length is not None and length != descriptor.size - received:
                raise _wrong_size(answer, descriptor, received + length)
            try:
                buffer = appending.pages(appending.BUFFER) if appending.past_cache(descriptor) else None
                for data in answer.chunks(buffer=buffer):
                    received += len(data)
                    if received > descriptor.size:
                        raise _wrong_size(answer, descriptor, received)
                    if skip >= len(data):
                        skip -= len(data)
                        continue
                    yield data[skip:] if skip else data
                    skip = 0
                if received < descriptor.size:
                    raise Broken(f"the registry {answer.asked} closes the connection too early", hint="try again")
            except Broken as exc:
                self._route.broke(repository, answer.asked, exc.message)
                raise

    def small_blob(self, repository: str, descriptor: Descriptor) -> bytes:
        """All of a blob, checked against its digest; the caller has seen to it that its size is one for memory.

        Raises:
            BlobNotFound: the registry does not have it.
            DigestMismatch: what came is another.
            RegistryError: and its kinds: as the registry met us.
        """

        def attempt() -> bytes:
            with contextlib.closing(self.read_blob(repository, descriptor)) as stream:
                return b"".join(bytes(piece) for piece in stream)

        data = self.retrying(attempt)
        if (got := of_bytes(data)) != descriptor.digest:
            raise DigestMismatch(
                f"the content of {descriptor.digest} is another",
                hint="the registry's copy is damaged or was tampered with",
                expected=descriptor.digest,
                got=got,
            )
        return data

    def send_blob(self, repository: str, descriptor: Descriptor) -> Asked | None:
        """Asks for a small blob, and does not wait for the answer. It is taken as it comes, or :meth:`receive_blob` reads it.

        None where :meth:`read_blob` has to ask for it. Raises as that.
        """
        return self._route.send(f"{repository}/blobs/{descriptor.digest}", repository)

    def receive_blob(self, asked: Asked, descriptor: Descriptor) -> bytes | None:
        """All of the blob that was asked for, not yet checked; None for any other answer than a blob of this size.

        Raises:
            Broken: the connection broke, or brings nothing.
            Busy: the registry is.
            Elsewhere: the registry sends us there.
        """
        with asked.answer() as answer:
            if answer.status in BUSY:
                raise busy(answer, f"the blob {descriptor.digest}")
            if answer.status == 200 and answer.length() in (descriptor.size, None):
                data = bytearray()
                for piece in answer.chunks(_SMALL_TIME):
                    data += piece
                    if len(data) > descriptor.size:
                        return None
                return bytes(data) if len(data) == descriptor.size else None
            location = answer.header("location")
        # when the connection is free again
        if answer.status in REDIRECTS:
            raise Elsewhere(lambda: asked.follow(location))
        return None

    def read_range(self, repository: str, descriptor: Descriptor, offset: int, size: int) -> bytes:
        """*size* bytes of a blob from *offset* on, which lie within it; not yet checked. One attempt.

        Raises:
            BlobNotFound: the registry does not have it.
            NoRanges: the registry sends whole blobs only, or another part than was asked for.
            Broken, Busy: another try may go better.
            RegistryError: and its kinds: as the registry met us.
        """
        headers = {"Range": f"bytes={offset}-{offset + size - 1}"}
        with self._request("GET", f"{repository}/blobs/{descriptor.digest}", repository, "pull", headers) as answer:
            _refuse_lost(answer, repository, descriptor)
            if answer.status != 206:
                self._expect(answer, 200, f"the blob {descriptor.digest}", repository)
                raise NoRanges
            span = f"bytes {offset}-{offset + size - 1}/"
            if not (answer.header("content-range") or "").startswith(span) or answer.length() not in (size, None):
                raise NoRanges
            data = bytearray()
            try:
                for piece in answer.chunks():
                    data += piece
                    if len(data) > size:
                        raise NoRanges
                if len(data) < size:
                    raise Broken(f"the registry {answer.asked} closes the connection too early", hint="try again")
            except Broken as exc:
                self._route.broke(repository, answer.asked, exc.message)
                raise
        return bytes(data)

    def mount_blob(self, repository: str, digest: Digest, source: str) -> bool:
        """Whether the registry takes the blob over from the repository *source* without a transfer."""
        there = self._route.mount_source(repository, source)
        if there is None:
            return False
        path = f"{repository}/blobs/uploads/?{urlencode({'mount': digest, 'from': there})}"
        actions = f"pull,push repository:{there}:pull"
        try:
            with self._request("POST", path, repository, actions, {}, lambda: b"") as answer:
                return answer.status == 201
        except RegistryDenied:
            return False

    def push_blob(
        self, repository: str, descriptor: Descriptor, body: Body, *, tell: Callable[[str], None] | None = None
    ) -> None:
        """Uploads a blob: in one request, or, a large one, in chunks that need not be sent again.

        *body* opens the content anew, at an offset, for each attempt. *tell* is told of waits (see :meth:`patience`).

        Raises:
            RegistryError: and its kinds: as the registry met us.
        """
        if descriptor.size > CHUNKED_FROM and self._chunk_size:
            try:
                self._push_chunked(repository, descriptor, body, tell)
                return
            except _NoChunks:
                self._chunk_size = 0
        tries = 0

        def attempt() -> None:
            nonlocal tries
            tries += 1
            if tries == 1 or not self._has_blob(repository, descriptor.digest):  # else it was the answer that got lost
                self._push_whole(repository, descriptor, body)

        self.retrying(attempt, tell=tell)

    def _begin_upload(self, repository: str, what: str) -> str:
        with self._request("POST", f"{repository}/blobs/uploads/", repository, "pull,push", {}, lambda: b"") as answer:
            self._expect(answer, 202, what, repository)
            return next_url(answer.url, answer.header("location"))

    def _push_whole(self, repository: str, descriptor: Descriptor, body: Body) -> None:
        what = f"the blob {descriptor.digest}"
        url = _with_digest(self._begin_upload(repository, what), descriptor.digest)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(descriptor.size)}
        with self._request("PUT", url, repository, "pull,push", headers, lambda: body(0, descriptor.size)) as answer:
            self._expect(answer, 201, what, repository)

    def _push_chunked(
        self, repository: str, descriptor: Descriptor, body: Body, tell: Callable[[str], None] | None
    ) -> None:
        # What a finished chunk has brought stays: after a failure the registry is asked how far it is.
        what = f"the blob {descriptor.digest}"
        patience = self.patience(tell)
        url, at, furthest = self._begin_patiently(repository, what, tell), 0, 0
        while True:
            size = min(self._chunk_size, descriptor.size - at)
            try:
                if not size:
                    self._finish_upload(repository, url, descriptor, what)
                    return
                url = self._push_chunk(repository, url, at, size, body, what)
            except (Broken, Refused, Busy) as exc:
                patience.bear(exc)
                if not size and self.has_blob(repository, descriptor.digest):
                    return  # it was the answer that got lost
                found = self.retrying(lambda: self._upload_state(repository, url), tell=tell)  # noqa: B023
                if found is None:
                    url, at = self._begin_patiently(repository, what, tell), 0
                else:
                    url, at = found[0], min(found[1], at + size)
                continue
            at += size
            # what a registry that forgets its uploads gets once more is no progress
            if at > furthest:
                furthest = at
                patience.progressed()

    def _begin_patiently(self, repository: str, what: str, tell: Callable[[str], None] | None) -> str:
        return self.retrying(lambda: self._begin_upload(repository, what), tell=tell)

    def _finish_upload(self, repository: str, url: str, descriptor: Descriptor, what: str) -> None:
        final = _with_digest(url, descriptor.digest)
        with self._request("PUT", final, repository, "pull,push", {"Content-Length": "0"}, lambda: b"") as answer:
            self._expect(answer, 201, what, repository)

    def _push_chunk(self, repository: str, url: str, at: int, size: int, body: Body, what: str) -> str:
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(size),
            "Content-Range": f"{at}-{at + size - 1}",
        }
        with self._request("PATCH", url, repository, "pull,push", headers, lambda: body(at, size)) as answer:
            if at == 0 and answer.status in _NO_CHUNKS:
                raise _NoChunks
            if answer.status in _ASTRAY:
                raise Busy(f"{answer.who} has lost count of an upload of {what} ({answer.status})", None)
            self._expect(answer, 202, what, repository)
            return next_url(answer.url, answer.header("location"))

    def _upload_state(self, repository: str, url: str) -> tuple[str, int] | None:
        """Where an upload goes on, and how many bytes have arrived; None when the registry has forgotten it.

        Raises:
            Broken, Refused, Busy: that can't be told just now.
        """
        with self._request("GET", url, repository, "pull,push") as answer:
            if answer.status in BUSY:
                raise busy(answer, "the state of an upload")
            match = re.fullmatch(r"(?:bytes=)?0-([0-9]{1,18})", answer.header("range") or "")
            if answer.status != 204 or match is None:
                return None
            location = answer.header("location")
            # "0-0" is what some say of an upload without a byte
            end = int(match[1])
            return (next_url(answer.url, location) if location else url), end + 1 if end else 0

    # --- referrers ---------------------------------------------------------------------------------------------

    def referrers_page(
        self, repository: str, digest: Digest, *, artifact_type: str | None = None, url: str | None = None
    ) -> ReferrersPage | None:
        """A page of what names *digest* as its subject: the first, or that at *url*. None: there is no such API.

        *artifact_type* is a wish: not every registry filters.

        Raises:
            RegistryError: and its kinds: as the registry met us; the next page would be another server's.
        """
        path = f"{repository}/referrers/{digest}"
        if artifact_type is not None:
            path += f"?{urlencode({'artifactType': artifact_type})}"

        def attempt() -> ReferrersPage | None:
            headers = {"Accept": mediatypes.OCI_INDEX}
            with self._request("GET", url or path, repository, "pull", headers) as answer:
                if answer.status in _NO_REFERRERS:
                    return None
                self._expect(answer, 200, f"the referrers of {digest}", repository)
                raw = answer.read(limits.OCI_MANIFEST_MAX, what=f"the referrers of {digest}")
                return ReferrersPage(raw, self._next_page(answer))

        return self.retrying(attempt)

    def _next_page(self, answer: Answer) -> str | None:
        match = _NEXT.search(", ".join(answer.headers("link")))
        if match is None:
            return None
        target = next_url(answer.url, match[1])
        if origin(target) != answer.home:
            raise RegistryProtocol(f"{answer.asked} continues its list at another server, {host_of(target)}")
        return target

    # --- requests ----------------------------------------------------------------------------------------------

    def retrying(
        self,
        attempt: Callable[[], T],
        *,
        tell: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> T:
        """Tries *attempt* again while the registry is busy or the connection breaks, waiting longer each time."""
        patience = self.patience(tell, stopped)
        while True:
            try:
                return attempt()
            except (Broken, Refused, Busy) as exc:
                patience.bear(exc)

    def patience(
        self, tell: Callable[[str], None] | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> Patience:
        """What bears the failures of one piece of work. *tell* hears of waits, else who is told of mirrors does."""
        return Patience(
            self.host,
            worked=lambda: self._worked,
            backoff=self._backoff,
            tell=tell or (lambda text: self._say(text) if text else None),
            stopped=stopped,
        )

    def _request(
        self,
        method: str,
        path: str,
        repository: str,
        actions: str,
        headers: Mapping[str, str] | None = None,
        body: Callable[[], bytes | IO[bytes]] | None = None,
    ) -> Answer:
        answer = self._route.request(method, path, repository, actions, headers or {}, body)
        self._worked = self._worked or answer.status not in BUSY
        return answer

    def _expect(self, answer: Answer, status: int, what: str, repository: str) -> None:
        if answer.status == status:
            return
        if answer.status in BUSY:
            raise busy(answer, what)
        said = _error_text(answer)
        if _BLOB_UNKNOWN in said:
            raise Busy(f"{answer.who} has not all blobs for {what}: {said}", None)
        if answer.status in (401, 403):
            if answer.elsewhere:
                raise refused_elsewhere(answer, what, said)
            raise auth.denied(answer.asked, f"repository:{repository}:", has_credential=answer.authorized, said=said)
        raise RegistryProtocol(
            f"{answer.who} answers with {answer.status} to a request for {what}" + (f": {said}" if said else ""),
            hint=_HINTS.get(answer.status),
        )


def _refuse_page(answer: Answer, media_type: str, what: str) -> None:
    if media_type.lower() in _PAGES:
        raise RegistryProtocol(
            f"{answer.who} answers with an HTML page to a request for {what}",
            hint="it may be no registry, or what lies between (a proxy, a network that asks for a login) answers for it: "
            "look at the host in a browser",
            rule="OCI-1",
        )


def _refuse_compressed(answer: Answer, raw: bytes, what: str) -> None:
    # nobody asked for that, and nothing is unpacked whose size nobody knows
    if raw.startswith(_GZIP):
        raise RegistryProtocol(
            f"{answer.who} answers with compressed bytes to a request for {what}",
            hint="what lies between (a proxy) may compress what nobody asked it to: have it leave the registry's answers alone",
            rule="OCI-1",
        )


def _refuse_lost(answer: Answer, repository: str, descriptor: Descriptor) -> None:
    if answer.status == 404:
        raise BlobNotFound(
            f"{answer.who} has lost the blob {descriptor.digest} of {repository}",
            hint="push the artifact again",
            digest=descriptor.digest,
        )


def _wrong_size(answer: Answer, descriptor: Descriptor, size: int) -> DigestMismatch:
    return DigestMismatch(
        f"{answer.asked} sends {size} bytes or more for the blob {descriptor.digest}, which has {descriptor.size}",
        hint="the registry is damaged or was tampered with",
        expected=descriptor.size,
        got=size,
    )


def _with_digest(url: str, digest: Digest) -> str:
    return f"{url}{'&' if '?' in url else '?'}digest={quote(digest, safe='')}"


def _error_text(answer: Answer) -> str:
    # {"errors": [{"code", "message", "detail"}]}
    try:
        value = strictjson.parse(answer.read(_ERROR_BODY_MAX, _ERROR_BODY_TIME), "the answer", max_size=_ERROR_BODY_MAX)
        errors = value["errors"]
        return "; ".join(shown(str(e.get("message") or e.get("code"))) for e in errors[:3])
    except (JsonInvalid, RegistryError, KeyError, TypeError, AttributeError):
        return ""


__all__ = ["BUFFER", "Busy", "CredentialSource", "ReferrersPage", "RegistryClient"]
