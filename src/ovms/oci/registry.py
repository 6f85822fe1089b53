"""A client for one registry: the distribution API, as far as ovms needs it.

Source: the OCI distribution specification 1.1.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import IO, Final, Protocol, Self, TypeVar
from urllib.parse import quote

from ovms.errors import (
    BlobNotFound,
    DigestMismatch,
    JsonInvalid,
    ReferenceNotFound,
    RegistryError,
    RegistryProtocol,
)
from ovms.oci import auth
from ovms.oci.credentials import Credential
from ovms.oci.descriptor import Descriptor
from ovms.oci.http import BUFFER, CONNECT_TIMEOUT, READ_TIMEOUT, Answer, Broken, Refused, Transport, next_url, shown
from ovms.oci.reference import Reference
from ovms.spec import limits, mediatypes, strictjson
from ovms.spec.digest import Digest, is_digest, of_bytes

T = TypeVar("T")

ATTEMPTS_MAX: Final = 5
#: Seconds before the second try; doubled each time.
_BACKOFF: Final = 0.2
#: The most that a Retry-After may ask of us.
_WAIT_MAX: Final = 30.0
#: Statuses after which another try may go better.
_BUSY: Final = frozenset({429, 500, 502, 503, 504})
_ERROR_BODY_MAX: Final = 64 * limits.KIB
_MANIFEST_TYPES: Final = ", ".join((mediatypes.OCI_MANIFEST, mediatypes.OCI_INDEX))


class Busy(RegistryError):
    """429 or 5xx: another try may go better, after *wait* seconds where the registry says so."""

    def __init__(self, message: str, wait: float | None) -> None:
        super().__init__(message, hint="try again later")
        self.wait = wait


class CredentialSource(Protocol):
    """Where credentials come from."""

    def get(self, host: str, repository: str) -> Credential | None:
        """The credential for a repository of a host, None where there is none."""


class RegistryClient:
    """One registry. Connections are kept open until :meth:`close`. Not for several threads at once."""

    def __init__(
        self,
        host: str,
        *,
        credentials: CredentialSource | None = None,
        connect_timeout: float = CONNECT_TIMEOUT,
        read_timeout: float = READ_TIMEOUT,
        backoff: float = _BACKOFF,
    ) -> None:
        """Connects to nothing yet. *host* is ``host[:port]``; loopback is spoken to in plain HTTP, all else over TLS."""
        self.host = host
        self._credentials = credentials
        plain = auth.is_loopback(host)
        self._base = f"{'http' if plain else 'https'}://{host}/v2/"
        self._transport = Transport(connect_timeout=connect_timeout, read_timeout=read_timeout)
        self._auth = auth.Authenticator(host, plain_http=plain, fetch=self._fetch)
        self._backoff = backoff
        self._known: dict[str, Credential | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    # --- manifests ---------------------------------------------------------------------------------------------

    def get_manifest(self, reference: Reference) -> tuple[bytes, Descriptor]:
        """A manifest or index, and its descriptor.

        Raises:
            ReferenceNotFound: the registry has none of that name.
            DigestMismatch: it is not the one that the reference's digest promises.
            RegistryError: and its kinds: as the registry met us.
        """
        return self.retrying(lambda: self._get_manifest(reference))

    def _get_manifest(self, reference: Reference) -> tuple[bytes, Descriptor]:
        path = f"{reference.repository}/manifests/{reference.target}"
        with self._request("GET", path, reference.repository, "pull", {"Accept": _MANIFEST_TYPES}) as answer:
            if answer.status == 404:
                raise ReferenceNotFound(
                    f"the registry {self.host} has no artifact {reference}",
                    hint="check the name and the tag",
                    reference=str(reference),
                )
            self._expect(answer, 200, f"the manifest of {reference}", reference.repository)
            raw = answer.read(limits.OCI_MANIFEST_MAX)
            media_type = (answer.header("content-type") or mediatypes.OCI_MANIFEST).partition(";")[0].strip()
            promised = reference.digest or answer.header("docker-content-digest")
        digest = of_bytes(raw)
        # a digest of another algorithm in the header is none of our business
        if promised is not None and is_digest(promised) and promised != digest:
            raise DigestMismatch(
                f"{self.host} sent a manifest with digest {digest} for {reference}, which should have {promised}",
                hint="the registry is damaged, or what lies between changed it",
                expected=promised,
                got=digest,
            )
        return raw, Descriptor(shown(media_type), digest, len(raw))

    def put_manifest(self, repository: str, target: str, raw: bytes, media_type: str) -> bool:
        """Uploads a manifest under a tag or its digest. Whether the registry takes care of its ``subject``."""
        return self.retrying(lambda: self._put_manifest(repository, target, raw, media_type))

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

    def read_blob(self, repository: str, descriptor: Descriptor) -> Iterator[bytes]:
        """A blob's bytes, as they come: exactly as many as the descriptor says, not yet checked against its digest.

        One attempt: the caller starts over with :meth:`retrying`.

        Raises:
            BlobNotFound: the registry does not have it.
            DigestMismatch: it is of another size.
        """
        with self._request("GET", f"{repository}/blobs/{descriptor.digest}", repository, "pull") as answer:
            if answer.status == 404:
                raise BlobNotFound(
                    f"the registry {self.host} has lost the blob {descriptor.digest} of {repository}",
                    hint="push the artifact again",
                    digest=descriptor.digest,
                )
            self._expect(answer, 200, f"the blob {descriptor.digest}", repository)
            length, received = answer.length(), 0
            if length is not None and length != descriptor.size:
                raise self._wrong_size(descriptor, length)
            for data in answer.chunks():
                received += len(data)
                if received > descriptor.size:
                    raise self._wrong_size(descriptor, received)
                yield data

    def _wrong_size(self, descriptor: Descriptor, size: int) -> DigestMismatch:
        return DigestMismatch(
            f"{self.host} sends {size} bytes or more for the blob {descriptor.digest}, which has {descriptor.size}",
            hint="the registry is damaged or was tampered with",
            expected=descriptor.size,
            got=size,
        )

    def push_blob(self, repository: str, descriptor: Descriptor, body: Callable[[], IO[bytes]]) -> None:
        """Uploads a blob in one request. *body* opens the content anew for each attempt."""
        self.retrying(lambda: self._push_blob(repository, descriptor, body))

    def _push_blob(self, repository: str, descriptor: Descriptor, body: Callable[[], IO[bytes]]) -> None:
        what = f"the blob {descriptor.digest}"
        with self._request("POST", f"{repository}/blobs/uploads/", repository, "pull,push", {}, lambda: b"") as answer:
            self._expect(answer, 202, what, repository)
            location = next_url(answer.url, answer.header("location"))
        url = f"{location}{'&' if '?' in location else '?'}digest={quote(descriptor.digest, safe='')}"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(descriptor.size)}
        with self._request("PUT", url, repository, "pull,push", headers, body) as answer:
            self._expect(answer, 201, what, repository)

    # --- requests ----------------------------------------------------------------------------------------------

    def retrying(self, attempt: Callable[[], T]) -> T:
        """Tries *attempt* again while the registry is busy or the connection breaks, a few times, waiting longer."""
        for number in range(1, ATTEMPTS_MAX + 1):
            try:
                return attempt()
            except (Broken, Refused, Busy) as exc:
                if number == ATTEMPTS_MAX:
                    raise
                wait = self._backoff * 2 ** (number - 1) * random.uniform(0.75, 1.0)  # noqa: S311 - no secret
                if isinstance(exc, Busy) and exc.wait is not None:
                    wait = min(exc.wait, _WAIT_MAX)
            time.sleep(wait)
        raise AssertionError

    def _request(
        self,
        method: str,
        path: str,
        repository: str,
        actions: str,
        headers: Mapping[str, str] | None = None,
        body: Callable[[], bytes | IO[bytes]] | None = None,
    ) -> Answer:
        url = path if path.startswith(("http://", "https://")) else self._base + path
        scope = f"repository:{repository}:{actions}"
        ours = url.startswith(self._base)
        for last in (False, True):
            sent = dict(headers or {})
            authorization = self._auth.header(scope, lambda: self._credential(repository)) if ours else None
            if authorization is not None:
                sent["Authorization"] = authorization
            content = None if body is None else body()
            try:
                answer = self._transport.request(method, url, sent, content)
            finally:
                if content is not None and not isinstance(content, bytes):
                    content.close()
            if answer.status != 401 or last or not ours:
                return answer
            with answer:
                if not self._auth.challenged(answer.headers("www-authenticate"), scope):
                    return answer
        raise AssertionError

    def _credential(self, repository: str) -> Credential | None:
        if repository not in self._known:
            self._known[repository] = (
                None if self._credentials is None else self._credentials.get(self.host, repository)
            )
        return self._known[repository]

    def _fetch(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, limit: int
    ) -> tuple[int, bytes]:
        with self._transport.request(method, url, headers, body) as answer:
            if answer.status in _BUSY:
                raise self._busy(answer, "the token service")
            return answer.status, answer.read(limit)

    def _expect(self, answer: Answer, status: int, what: str, repository: str) -> None:
        if answer.status == status:
            return
        if answer.status in _BUSY:
            raise self._busy(answer, what)
        said = _error_text(answer)
        if answer.status in (401, 403):
            known = self._known.get(repository) is not None
            raise auth.denied(self.host, f"repository:{repository}:", has_credential=known, said=said)
        raise RegistryProtocol(
            f"the registry {self.host} answers with {answer.status} to a request for {what}"
            + (f": {said}" if said else "")
        )

    def _busy(self, answer: Answer, what: str) -> Busy:
        after = answer.header("retry-after") or ""
        wait = float(after) if after.isdigit() and len(after) < 6 else None
        return Busy(f"the registry {self.host} answers with {answer.status} to a request for {what}", wait)


def _error_text(answer: Answer) -> str:
    # {"errors": [{"code", "message", "detail"}]}
    try:
        value = strictjson.parse(answer.read(_ERROR_BODY_MAX), "the answer", max_size=_ERROR_BODY_MAX)
        errors = value["errors"]
        return "; ".join(shown(str(e.get("message") or e.get("code"))) for e in errors[:3])
    except (JsonInvalid, RegistryError, KeyError, TypeError, AttributeError):
        return ""


__all__ = ["BUFFER", "Busy", "CredentialSource", "RegistryClient"]
