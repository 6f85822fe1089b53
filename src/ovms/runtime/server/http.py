"""HTTP/1.1 for callers that mean well, and for those that don't: everything has a limit, in bytes and in time.

The protocol itself is h11's; here are the connections. Each carries one request after the other. A request that is no HTTP, too
large or too slow is answered with a problem document where that can be, and its connection is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from http import HTTPStatus
from typing import Any, Final, Protocol

import h11

from ovms.errors import InputError, OvmsError, ResourceError
from ovms.lazy import dataclass, field
from ovms.spec import api, limits
from ovms.text import printable

#: Connections at once; one more is told so, and closed.
CONNECTIONS_MAX: Final = 1024
#: Bytes of a request's line and headers.
HEAD_MAX: Final = 16 * limits.KIB
#: Bytes of all bodies that are being read: what slow callers can make us hold.
BODIES_MAX: Final = 32 * limits.MIB
#: Seconds that a connection may be idle between requests.
IDLE_TIMEOUT: Final = 60.0
#: Seconds for a request's line and headers, from its first byte, and for its body.
HEAD_TIMEOUT: Final = 10.0
BODY_TIMEOUT: Final = 30.0
#: Seconds that a caller may take to read what fills its buffer.
WRITE_TIMEOUT: Final = 30.0
#: Bytes and seconds that are read on after an answer to a request whose body nobody wants: else the caller, still writing,
#: would see a reset and not the answer.
LINGER_MAX: Final = 8 * limits.MIB
LINGER_TIMEOUT: Final = 2.0
_READ: Final = 65536
_REASONS: Final = {int(status): status.phrase for status in HTTPStatus}


@dataclass(frozen=True)
class Request:
    """A request, without its body. Header names are lower case; of several of one name the last counts."""

    method: str
    target: str
    headers: Mapping[str, str]
    #: Over TCP: a token is needed.
    remote: bool


@dataclass(frozen=True)
class Answer:
    """What is answered: bytes, or a stream of them."""

    body: bytes | AsyncGenerator[bytes, None]
    media_type: str = api.JSON
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any) -> Answer:
        """A JSON document."""
        return cls(json.dumps(value).encode() + b"\n")


class HttpError(Exception):
    """An error whose status is not its code's own (405, 413, 415, 503), or that has headers."""

    def __init__(self, error: OvmsError, status: int | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.status = status
        self.headers = headers or {}

    def answer(self) -> Answer:
        """As a problem document."""
        document = api.problem(self.error, status=self.status)
        body = json.dumps(document).encode() + b"\n"
        return Answer(body, api.PROBLEM, document["status"], self.headers)


class Handler(Protocol):
    """What stands behind the connections. Both raise :class:`HttpError`."""

    def admit(self, request: Request) -> int:
        """Whether a request is worth its body, and how many bytes that may have."""

    async def answer(self, request: Request, body: bytes) -> Answer:
        """The answer to a request."""


class _Gone(Exception):
    """The caller has closed the connection, or does not read."""


class Http:
    """All connections of a server."""

    def __init__(
        self,
        handler: Handler,
        *,
        refuse: Callable[[asyncio.StreamWriter], OvmsError | None],
        most: int = CONNECTIONS_MAX,
    ) -> None:
        """*refuse* tells why a connection is not taken, or None. *most*: connections at once."""
        self._handler = handler
        self._refuse = refuse
        self._most = most
        self._open: dict[asyncio.Task[None], _Connection] = {}
        self._bodies = 0
        self.stopping = False

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._open)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, remote: bool) -> None:
        """Serves a connection to its end."""
        task = asyncio.current_task()
        assert task is not None
        connection = _Connection(self, reader, writer, remote)
        full = len(self._open) >= self._most
        self._open[task] = connection
        try:
            if full:
                error = ResourceError(f"the server has {self._most} connections already", hint="try again in a while")
                await connection.say_no(HttpError(error, 503, {"Retry-After": "1"}))
            elif (why := self._refuse(writer)) is not None:
                await connection.say_no(HttpError(why))
            else:
                await connection.run()
        except (TimeoutError, _Gone, OSError):
            pass
        except asyncio.CancelledError:
            if not self.stopping:
                raise
        except Exception as exc:  # noqa: BLE001 - no fault of ours, and no trick of a caller, may end the server
            print(  # noqa: T201
                f"ovm: internal error in a connection: {type(exc).__name__}: {printable(str(exc), 500)}",
                file=sys.stderr,
            )
        finally:
            del self._open[task]
            writer.transport.abort()

    def take_body(self, size: int) -> None:
        """Notes bytes of a body that is being read (or, negative, is no more)."""
        if size > 0 and self._bodies + size > BODIES_MAX:
            error = ResourceError("the server is reading too many requests at once", hint="try again in a while")
            raise HttpError(error, 503, {"Retry-After": "1"})
        self._bodies += size

    async def stop(self, grace: float) -> None:
        """Takes no further requests, lets those that are answered come to their end, and ends the rest after *grace* s."""
        self.stopping = True
        for task, connection in list(self._open.items()):
            if connection.idle:
                task.cancel()
        if self._open:
            _, rest = await asyncio.wait(list(self._open), timeout=grace)
            for task in rest:
                task.cancel()
            if rest:
                await asyncio.wait(rest, timeout=1.0)

    @property
    def handler(self) -> Handler:
        """What stands behind the connections."""
        return self._handler


class _Connection:
    def __init__(self, http: Http, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, remote: bool) -> None:
        self._http = http
        self._reader = reader
        self._writer = writer
        self._remote = remote
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX)
        self.idle = True
        # an answer to HEAD has the headers alone
        self._headless = False

    async def run(self) -> None:
        while not self._http.stopping:
            self.idle, self._headless = True, False
            try:
                head = await self._head()
            except HttpError as exc:
                await self._send(exc.answer(), close=True)
                await self._linger()
                return
            if head is None:
                return
            self.idle = False
            await self._one(head)
            if self._h11.their_state not in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED):
                await self._linger()
                return
            if self._h11.our_state is not h11.DONE or self._h11.their_state is not h11.DONE:
                return
            self._h11.start_next_cycle()
            if self._h11.trailing_data[0]:
                # who sends many requests at once must not have all of them answered before anybody else's turn
                await asyncio.sleep(0)

    async def say_no(self, error: HttpError) -> None:
        """Answers whatever may come."""
        with contextlib.suppress(h11.LocalProtocolError):
            await self._send(error.answer(), close=True)
        await self._linger()

    async def _one(self, head: h11.Request) -> None:
        handler, size = self._http.handler, 0
        self._headless = head.method == b"HEAD"
        try:
            request = _request(head, self._remote)
            try:
                most = handler.admit(request)
            except HttpError:
                # without a body there is nothing more to come, and the connection can go on
                if not _has_body(request):
                    self._next()
                raise
            body = await self._body(request, most)
            size = len(body)
            answer = await handler.answer(request, bytes(body))
            del body
        except HttpError as exc:
            answer = exc.answer()
        finally:
            self._http.take_body(-size)
        # a caller that has not sent all it announced can't be understood any more
        await self._send(answer, close=self._http.stopping or self._h11.their_state is not h11.DONE)

    # --- reading -----------------------------------------------------------------------------------------------

    async def _head(self) -> h11.Request | None:
        # A request's line and headers; None when the caller has had enough.
        try:
            event = self._next()
            if event is h11.NEED_DATA and not self._h11.trailing_data[0]:
                try:
                    async with asyncio.timeout(IDLE_TIMEOUT):
                        await self._receive()
                except TimeoutError:
                    return None
                event = self._next()
            if event is h11.NEED_DATA:
                async with asyncio.timeout(HEAD_TIMEOUT):
                    while event is h11.NEED_DATA:
                        await self._receive()
                        event = self._next()
        except TimeoutError:
            raise HttpError(InputError(f"the request's head did not come within {HEAD_TIMEOUT:g} s"), 408) from None
        if not isinstance(event, h11.Request):
            return None
        # h11 counts only as long as the head is not whole: one that comes in a single piece it takes
        size = len(event.target) + sum(len(name) + len(value) for name, value in event.headers)
        if size > HEAD_MAX:
            raise HttpError(InputError(f"the request's head has more than {HEAD_MAX} bytes"))
        return event

    async def _body(self, request: Request, most: int) -> bytearray:
        body = bytearray()
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > most:
            raise _too_large(int(announced), most)
        if not _has_body(request) and isinstance(self._next(), h11.EndOfMessage):
            return body
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                if self._h11.they_are_waiting_for_100_continue:
                    await self._write(self._h11.send(h11.InformationalResponse(status_code=100, headers=[])))
                while True:
                    event = self._next()
                    if event is h11.NEED_DATA:
                        await self._receive()
                    elif isinstance(event, h11.Data):
                        if len(body) + len(event.data) > most:
                            raise _too_large(None, most)
                        self._http.take_body(len(event.data))
                        body += event.data
                    elif isinstance(event, h11.EndOfMessage):
                        return body
                    else:
                        raise _Gone
        except TimeoutError:
            self._http.take_body(-len(body))
            raise HttpError(InputError(f"the request's body did not come within {BODY_TIMEOUT:g} s"), 408) from None
        except BaseException:
            self._http.take_body(-len(body))
            raise

    def _next(self) -> Any:
        try:
            return self._h11.next_event()
        except h11.RemoteProtocolError as exc:
            error = InputError(f"this is no HTTP/1.1 request: {exc}", hint="see the OpenAPI document of the contract")
            raise HttpError(error) from None

    async def _receive(self) -> None:
        data = await self._reader.read(_READ)
        try:
            self._h11.receive_data(data)
        except RuntimeError:  # more after the end, which h11 takes as a fault of ours
            raise _Gone from None
        if not data and self._h11.their_state in (h11.IDLE, h11.SEND_BODY):
            raise _Gone

    async def _linger(self) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(LINGER_TIMEOUT):
                if self._writer.can_write_eof():
                    self._writer.write_eof()
                left = LINGER_MAX
                while left > 0 and (data := await self._reader.read(_READ)):
                    left -= len(data)

    # --- writing -----------------------------------------------------------------------------------------------

    async def _send(self, answer: Answer, *, close: bool) -> None:
        whole = isinstance(answer.body, bytes)
        headers = [
            ("Content-Type", answer.media_type),
            ("Cache-Control", "no-store"),
            *answer.headers.items(),
        ]
        if isinstance(answer.body, bytes):
            headers.append(("Content-Length", str(len(answer.body))))
        if close or not whole:
            headers.append(("Connection", "close"))
        head = self._h11.send(
            h11.Response(status_code=answer.status, headers=headers, reason=_REASONS.get(answer.status, ""))
        )
        if isinstance(answer.body, bytes):
            data = self._h11.send(h11.Data(data=answer.body)) if answer.body and not self._headless else b""
            await self._write((head or b"") + (data or b"") + (self._h11.send(h11.EndOfMessage()) or b""))
            return
        await self._write(head)
        await self._stream(answer.body)

    async def _stream(self, chunks: AsyncGenerator[bytes, None]) -> None:
        gone = asyncio.ensure_future(self._until_gone())
        stream = asyncio.ensure_future(self._copy(chunks))
        try:
            await asyncio.wait((gone, stream), return_when=asyncio.FIRST_COMPLETED)
            if stream.done():
                stream.result()
        finally:
            for task in (gone, stream):
                task.cancel()
            await asyncio.gather(gone, stream, return_exceptions=True)

    async def _copy(self, chunks: AsyncGenerator[bytes, None]) -> None:
        # closed here, also when we are broken off while we write: else the garbage collector would do it, some time
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                if chunk:
                    await self._write(self._h11.send(h11.Data(data=chunk)))
        await self._write(self._h11.send(h11.EndOfMessage()))

    async def _until_gone(self) -> None:
        # what comes after the request of a stream is nobody's: its connection is closed
        while await self._reader.read(_READ):
            pass

    async def _write(self, data: bytes | None) -> None:
        if data:
            self._writer.write(data)
            # mostly the kernel has taken it all
            transport = self._writer.transport
            if transport.get_write_buffer_size() == 0 and not transport.is_closing():
                return
            try:
                async with asyncio.timeout(WRITE_TIMEOUT):
                    await self._writer.drain()
            except TimeoutError:
                raise _Gone from None


def _request(head: h11.Request, remote: bool) -> Request:
    headers = {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers}
    return Request(head.method.decode("ascii"), head.target.decode("ascii", "replace"), headers, remote)


def _has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


def _too_large(size: int | None, most: int) -> HttpError:
    has = f"more than {most}" if size is None else str(size)
    return HttpError(InputError(f"the request has {has} bytes; at most {most} are allowed", rule="RUN-2"), 413)
