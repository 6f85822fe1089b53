"""A server as a :class:`~ovms.runtime.client.Client`, over its UNIX socket."""

from __future__ import annotations

import http.client
import json
import math
import socket
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ovms import errors, fsutil
from ovms.errors import HostError, ManifestInvalid, OvmsError, Problem, VmmTimeout
from ovms.progress import NULL, Progress, Task
from ovms.runtime.client import Document
from ovms.spec import limits

if TYPE_CHECKING:
    from ovms.runtime.runtime import RunOptions
    from ovms.vmm.model import PortForward

#: Seconds for an answer that takes no long work, and for one that does.
_TIMEOUT: Final = 60.0
_LONG: Final = 24 * 3600.0
_ANSWER_MAX: Final = 64 * limits.MIB
_LINE_MAX: Final = 1 * limits.MIB
#: Seconds beyond its deadline that an instance may take to end.
_END: Final = 30.0
#: States that a start comes to; one that we don't know is like ``starting`` (VER-4).
_SETTLED: Final = frozenset({"running", "paused", "stopping", "stopped", "error"})


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("unix", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock: socket.socket = fsutil.connect_unix(self._path, timeout=self.timeout)


class Remote:
    """The server on a UNIX socket."""

    def __init__(self, path: Path) -> None:
        self._path = path

    # --- calls -------------------------------------------------------------------------------------------------

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = _TIMEOUT,
    ) -> Any:
        """One call.

        Raises:
            OvmsError: what the server answered, or HostError where it does not.
        """
        answer, connection = self._request(method, path, body, headers or {}, timeout)
        try:
            data = answer.read(_ANSWER_MAX + 1)
            if len(data) > _ANSWER_MAX:
                raise HostError("the server's answer is too large")
            return json.loads(data)
        except (OSError, ValueError, http.client.HTTPException) as exc:
            raise self._gone(exc) from exc
        finally:
            connection.close()

    def _stream(self, path: str) -> Iterator[Document]:
        answer, connection = self._request("GET", path, None, {}, _LONG)
        try:
            while line := answer.readline(_LINE_MAX):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value
        except (OSError, ValueError, http.client.HTTPException) as exc:
            raise self._gone(exc) from exc
        finally:
            connection.close()

    def _request(
        self, method: str, path: str, body: Any, headers: Mapping[str, str], timeout: float
    ) -> tuple[http.client.HTTPResponse, http.client.HTTPConnection]:
        connection = _Connection(self._path, timeout)
        try:
            data = None if body is None else json.dumps(body).encode()
            sent = {**headers, **({} if data is None else {"Content-Type": "application/json"})}
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            if answer.status >= 400:
                raise from_problem(json.loads(answer.read(_LINE_MAX)))
        except (OSError, ValueError, http.client.HTTPException) as exc:
            connection.close()
            raise self._gone(exc) from exc
        except BaseException:
            connection.close()
            raise
        return answer, connection

    def _gone(self, exc: Exception) -> HostError:
        return HostError(
            f"the server on {self._path} does not answer: {str(exc) or type(exc).__name__}",
            hint="'--host local' does without it",
            path=str(self._path),
        )

    # --- the client --------------------------------------------------------------------------------------------

    def start(self, reference: str, options: RunOptions, progress: Progress = NULL) -> Document:
        """See :class:`~ovms.runtime.client.Client`."""
        return self.ask_to_start(reference, _overrides(options), progress)

    def ask_to_start(self, reference: str, overrides: Document, progress: Progress = NULL) -> Document:
        """:meth:`start`, with the overrides as the contract has them."""
        started = self.call("POST", "/start", {"manifest": reference, "overrides": overrides})
        if started["state"] == "running":  # of a warm pool: there is nothing to wait for
            return dict(started)
        instance_id = str(started["instance_id"])
        try:
            return self._started(instance_id, int(started.get("event_seq", 0)), progress)
        except OvmsError as exc:
            # as without a server: nothing is left of a start that fails, or was broken off
            if exc.code != "instance-not-found":
                self.remove(instance_id, force=True)
            raise
        except BaseException:
            self.remove(instance_id, force=True)
            raise

    def _started(self, instance_id: str, since: int, progress: Progress) -> Document:
        document = self.instance(instance_id)
        if document["state"] in _SETTLED:
            return _running(document)
        tasks: dict[str, tuple[Task, int]] = {}
        try:
            for event in self._stream(f"/events?follow=true&since={since}"):
                if event["type"] == "lost" or (event["type"] == "state" and event.get("instance_id") == instance_id):
                    document = self.instance(instance_id)
                    if document["state"] in _SETTLED:
                        return _running(document)
                elif event["type"] == "progress" and event.get("instance_id") == instance_id:
                    _show(tasks, event["progress"], progress)
        finally:
            for task, _ in tasks.values():
                task.__exit__(None, None, None)
        raise HostError("the server ended while the instance was starting", hint="'ovm ps -a' tells what became of it")

    def warm(self, reference: str, size: int) -> Document:
        """See :class:`~ovms.runtime.client.Client`."""
        return dict(self.call("POST", "/warm", {"manifest": reference, "size": size}, timeout=_LONG))

    def pools(self) -> list[Document]:
        """See :class:`~ovms.runtime.client.Client`."""
        return list(self.call("GET", "/warm")["pools"])

    def instances(self) -> list[Document]:
        """See :class:`~ovms.runtime.client.Client`."""
        return list(self.call("GET", "/instances")["instances"])

    def instance(self, text: str) -> Document:
        """See :class:`~ovms.runtime.client.Client`."""
        return dict(self.call("GET", f"/status/{_quoted(text)}"))

    def ask_to_stop(self, text: str, grace: float) -> None:
        """See :class:`~ovms.runtime.client.Client`. The server ends it itself, *grace* seconds from here."""
        timeout = math.ceil(grace)
        self.call("POST", "/stop", {"instance_id": text, "timeout_s": timeout, "force": timeout == 0})

    def stop(self, text: str, grace: float, *, asked: bool = False) -> Document:
        """See :class:`~ovms.runtime.client.Client`."""
        instance_id = self.instance(text)["instance_id"]
        timeout = max(0, math.ceil(grace))
        if not asked:
            self.ask_to_stop(instance_id, timeout)
        deadline = time.monotonic() + timeout + _END
        pause = 0.005
        while (document := self.instance(instance_id))["state"] not in ("stopped", "error"):
            if time.monotonic() > deadline:
                raise VmmTimeout(f"{document['name']} did not end within {timeout + _END:g} s")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.2)
        return document

    def remove(self, text: str, *, force: bool = False) -> None:
        """See :class:`~ovms.runtime.client.Client`."""
        self.call("POST", "/remove", {"instance_id": text, "force": force})

    def pause(self, text: str) -> Document:
        """See :class:`~ovms.runtime.client.Client`."""
        self.call("POST", "/pause", {"instance_id": text})
        return self.instance(text)

    def resume(self, text: str) -> Document:
        """See :class:`~ovms.runtime.client.Client`."""
        self.call("POST", "/resume", {"instance_id": text})
        return self.instance(text)

    def snapshot(self, text: str, tag: str | None, progress: Progress = NULL) -> Document:
        """See :class:`~ovms.runtime.client.Client`."""
        return dict(
            self.call(
                "POST", "/snapshot", {"instance_id": text, **({} if tag is None else {"tag": tag})}, timeout=_LONG
            )
        )

    def logs(self, text: str, *, follow: bool = False, tail: int | None = None) -> Iterator[Document]:
        """See :class:`~ovms.runtime.client.Client`."""
        query = urllib.parse.urlencode(
            {**({"follow": "true"} if follow else {}), **({} if tail is None else {"tail": tail})}
        )
        return self._stream(f"/logs/{_quoted(text)}?{query}")

    def events(self, *, follow: bool = False, since: int | None = None) -> Iterator[Document]:
        """See :class:`~ovms.runtime.client.Client`."""
        query = urllib.parse.urlencode(
            {**({"follow": "true"} if follow else {}), **({} if since is None else {"since": since})}
        )
        return self._stream(f"/events?{query}")


def from_problem(document: Any) -> OvmsError:
    """The error that a problem document tells of."""
    if not isinstance(document, dict) or not isinstance(document.get("code"), str):
        return HostError("the server's answer is no problem document")
    code, message = document["code"], str(document.get("detail"))
    hint = document.get("hint")
    standard = {"code", "detail", "hint", "type", "title", "status"}
    context = {key: value for key, value in document.items() if key not in standard and key.isidentifier()}
    if "instance_name" in context:
        context["instance"] = context.pop("instance_name")
    kind = _classes().get(code) or _by_status(document.get("status"))
    if issubclass(kind, ManifestInvalid):
        problems = [
            Problem(str(one.get("path")), str(one.get("message")), one.get("rule"))
            for one in context.get("problems", [])
            if isinstance(one, dict)
        ]
        return ManifestInvalid(message, problems=problems, hint=hint)
    exact = code if code in ({kind.code} | kind.more_codes) else None
    return kind(message, code=exact, hint=hint, **{k: v for k, v in context.items() if k not in ("message", "self")})


def _by_status(status: Any) -> type[OvmsError]:
    # of a code that we don't know (ERR-4)
    if not isinstance(status, int):
        return OvmsError
    known: dict[int, type[OvmsError]] = {404: errors.NotFound, 409: errors.Conflict}
    return known.get(status, errors.InputError if status < 500 else HostError)


def _classes() -> dict[str, type[OvmsError]]:
    found: dict[str, type[OvmsError]] = {}
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isinstance(kind, type) and issubclass(kind, OvmsError):
            found |= dict.fromkeys({kind.code, *kind.more_codes}, kind)
    return found


def _running(document: Document) -> Document:
    if document["state"] == "error":
        raise from_problem(document.get("error"))
    if document.get("pid") is None and document["state"] == "stopped" and document.get("started") is None:
        raise errors.Interrupted(f"the start of {document.get('name')} was broken off")
    return document


def _show(tasks: dict[str, tuple[Task, int]], value: Mapping[str, Any], progress: Progress) -> None:
    label, done = str(value["label"]), int(value["done"])
    if label not in tasks:
        task = progress.task(label, value.get("total"))
        tasks[label] = (task.__enter__(), 0)
    task, before = tasks[label]
    task.advance(max(0, done - before))
    tasks[label] = (task, max(done, before))


def _overrides(options: RunOptions) -> Document:
    values: Document = {
        "memory": options.memory,
        "cpus": options.vcpus,
        "name": options.name,
        "accel": None if options.accel is None else str(options.accel),
        "restore": str(options.restore),
        "remove_on_exit": options.remove_on_exit or None,
        "keep_identity": options.keep_identity or None,
        "ports": [port_override(port) for port in options.ports],
    }
    return {key: value for key, value in values.items() if value is not None}


def port_override(port: PortForward) -> Document:
    """A forward as the contract has it."""
    return {
        "guest_port": port.guest_port,
        "host_port": port.host_port,
        "host_ip": port.host_ip,
        "protocol": port.protocol,
    }


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="")
