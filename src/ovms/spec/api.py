"""The runtime contract: its operations, request bodies and problem documents. No HTTP.

Source: ``spec/rfc/ovms-v0.1.md``, sections 8 to 10, and ``spec/api/ovms-runtime.openapi.yaml``; tests hold all three
against each other.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, TypeVar

from ovms.errors import InputError, NotFound, OvmsError, Problem, Unsupported
from ovms.lazy import dataclass, field, regex
from ovms.spec import limits, sizes, strictjson
from ovms.spec.choices import Accel, Leave, RestorePolicy
from ovms.spec.document import Reader, from_base64, kind_of, shown
from ovms.spec.ramheader import check_recipient

JSON: Final = "application/json"
NDJSON: Final = "application/x-ndjson"
PROBLEM: Final = "application/problem+json"
METRICS: Final = "text/plain; version=0.0.4"

# --- operations ------------------------------------------------------------------------------------------------------

_BODY: Final = ("invalid-input", "json-invalid")
_INSTANCE: Final = ("instance-not-found",)
_STATE: Final = ("state-conflict", "locked")
_VMM: Final = ("vmm-failed", "vmm-timeout")
_FAULT: Final = ("error",)


@dataclass(frozen=True)
class Operation:
    """One call. ``request`` and ``response`` name schemas of the OpenAPI document (None: no body, or no JSON).

    ``codes`` are the error codes that it answers with, beside those of any HTTP request (RUN-2, RUN-5).
    """

    method: str
    path: str
    name: str
    request: str | None
    response: str | None
    media_type: str
    codes: tuple[str, ...]


OPERATIONS: Final = (
    Operation(
        "POST", "/start", "start", "StartRequest", "StartResult", JSON,
        (*_BODY, "reference-invalid", "manifest-invalid", "kernel-invalid", "disk-invalid", "snapshot-invalid",
         "identity-missing", "unsupported", "reference-not-found", "blob-not-found", "file-missing", "file-unreadable", "conflict",
         "name-taken", "port-in-use", "locked", "snapshot-incompatible", "registry-error", "registry-unreachable",
         "registry-denied", "registry-protocol", "digest-mismatch", "store-corrupt", "resource", "disk-full",
         "tool-missing", "accel-unavailable", *_VMM, *_FAULT),
    ),
    Operation("POST", "/stop", "stop", "StopRequest", "OperationResult", JSON, (*_BODY, *_INSTANCE, "locked", *_FAULT)),
    Operation("POST", "/pause", "pause", "InstanceRequest", "OperationResult", JSON,
              (*_BODY, *_INSTANCE, *_STATE, *_VMM, *_FAULT)),
    Operation("POST", "/resume", "resume", "InstanceRequest", "OperationResult", JSON,
              (*_BODY, *_INSTANCE, *_STATE, *_VMM, *_FAULT)),
    Operation(
        "POST", "/snapshot", "snapshot", "SnapshotRequest", "SnapshotResult", JSON,
        (*_BODY, "reference-invalid", *_INSTANCE, *_STATE, "unsupported", "registry-error", "registry-unreachable",
         "registry-denied", "registry-protocol", "store-corrupt", "resource", "disk-full", "host", "agent-unavailable",
         "guest-failed", "guest-timeout", *_VMM, *_FAULT),
    ),
    Operation("POST", "/inject", "inject", "InjectRequest", "OperationResult", JSON,
              (*_BODY, *_INSTANCE, "not-found", *_STATE, *_FAULT)),
    Operation("POST", "/remove", "remove", "RemoveRequest", "OperationResult", JSON,
              (*_BODY, *_INSTANCE, *_STATE, *_FAULT)),
    Operation("GET", "/status/{instance_id}", "status", None, "Instance", JSON, (*_INSTANCE, "store-corrupt", *_FAULT)),
    Operation("GET", "/logs/{instance_id}", "logs", None, "LogRecord", NDJSON, ("usage", *_INSTANCE, *_FAULT)),
    Operation("GET", "/instances", "instances", None, "InstanceList", JSON, ("usage", *_FAULT)),
    Operation("GET", "/events", "events", None, "Event", NDJSON, ("usage", *_FAULT)),
    Operation("GET", "/warm", "pools", None, "PoolList", JSON, _FAULT),
    Operation(
        "POST", "/warm", "warm", "WarmRequest", "Pool", JSON,
        (*_BODY, "reference-invalid", "manifest-invalid", "unsupported", "reference-not-found", "snapshot-incompatible",
         "registry-error", "registry-unreachable", "registry-denied", "registry-protocol", "digest-mismatch",
         "store-corrupt", "disk-full", "host", *_FAULT),
    ),
    Operation("GET", "/healthz", "health", None, "OperationResult", JSON, _FAULT),
    Operation("GET", "/metrics", "metrics", None, None, METRICS, _FAULT),
    Operation("GET", "/version", "version", None, "Version", JSON, _FAULT),
)  # fmt: skip

# --- errors ----------------------------------------------------------------------------------------------------------

#: Code → (HTTP status, title): section 10.
CODES: Final[Mapping[str, tuple[int, str]]] = {
    "error": (500, "a fault of the program itself"),
    "usage": (400, "a command line or a query is wrong"),
    "unauthorized": (401, "a token is missing or wrong"),
    "invalid-input": (400, "what was handed in is not acceptable"),
    "file-missing": (422, "a file that is named does not exist"),
    "file-empty": (422, "a file is empty"),
    "file-not-regular": (422, "what is named is no regular file"),
    "file-unreadable": (422, "a file can't be read"),
    "file-too-large": (422, "a file is larger than its limit"),
    "manifest-invalid": (422, "a manifest or config breaks the specification"),
    "json-invalid": (400, "a document is not the strict JSON of section 4"),
    "reference-invalid": (400, "a reference or a digest is not of the grammar"),
    "kernel-invalid": (422, "a file is no kernel that x86-64 boots"),
    "disk-invalid": (422, "a disk layer is not of its format, or has what a layer must not have"),
    "snapshot-invalid": (422, "a RAM snapshot is malformed, or not one of this artifact"),
    "identity-missing": (422, "a RAM snapshot is encrypted, and no identity that is at hand decrypts it"),
    "unsupported": (422, "valid, but this runtime does not do it"),
    "not-found": (404, "what was named does not exist"),
    "reference-not-found": (404, "no artifact of that name"),
    "blob-not-found": (404, "no blob of that digest"),
    "instance-not-found": (404, "no instance of that ID"),
    "conflict": (409, "not in the present state of things"),
    "name-taken": (409, "another instance has that name"),
    "in-use": (409, "something still uses it"),
    "state-conflict": (409, "the instance's state does not allow the call"),
    "locked": (409, "another program holds the lock, and did not let go of it in time"),
    "registry-error": (502, "a registry did not do what was asked of it"),
    "registry-unreachable": (502, "a registry does not answer"),
    "registry-denied": (502, "a registry refuses: credentials are missing or not enough"),
    "registry-protocol": (502, "a registry's answer is not what the distribution specification allows"),
    "integrity": (422, "bytes are not those that their digest promises"),
    "digest-mismatch": (422, "content does not have its descriptor's digest or size"),
    "store-corrupt": (500, "the local store is damaged"),
    "untrusted": (403, "nobody who is trusted stands for it"),
    "signature-missing": (403, "there is no signature where one is needed"),
    "signature-invalid": (403, "there are signatures, and none of them is good"),
    "policy-refused": (403, "the policy does not allow it"),
    "resource": (507, "the host has too little of something"),
    "disk-full": (507, "the host has too little disk space"),
    "port-in-use": (409, "a host port that should be forwarded is taken"),
    "host": (503, "the host lacks something, or does not allow it"),
    "tool-missing": (503, "a program is not installed"),
    "accel-unavailable": (503, "the accelerator that was asked for does not run guests here"),
    "vmm-failed": (500, "the VMM failed"),
    "vmm-timeout": (504, "the VMM did not answer in time"),
    "snapshot-incompatible": (409, "the RAM snapshot can't be restored on this host"),
    "guest-failed": (502, "the guest's agent refused, or said what makes no sense"),
    "agent-unavailable": (503, "the guest runs no agent, or it does not answer"),
    "guest-timeout": (504, "what runs in the guest did not end in time"),
    "interrupted": (503, "the work was broken off"),
}


def problem(error: OvmsError, *, status: int | None = None) -> dict[str, Any]:
    """The problem document (RFC 9457) of an error; *status* where it is not the code's own, such as 413.

    Its context becomes extension members; ``instance``, which RFC 9457 keeps for itself, becomes ``instance_name``.
    """
    own, title = CODES[error.code]
    context = {key if key != "instance" else "instance_name": value for key, value in error.context.items()}
    return {
        **{key: value for key, value in context.items() if value is not None},
        **({} if error.hint is None else {"hint": error.hint}),
        "type": f"urn:ovms:problem:{error.code}",
        "title": title,
        "status": own if status is None else status,
        "detail": error.message,
        "code": error.code,
    }


# --- requests --------------------------------------------------------------------------------------------------------

_ID: Final = regex(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_NAME: Final = regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_OFFSET_MAX: Final = 2**63 - 1
#: Characters of a size that is a text, and of an IP address.
SIZE_TEXT_MAX: Final = 64
ADDRESS_MAX: Final = 64


class Protocol(StrEnum):
    """The protocol of a port."""

    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True)
class Port:
    """A port of the host that leads to one of the guest; ``host_port`` 0 is any free one."""

    guest_port: int
    host_port: int = 0
    host_ip: str = "127.0.0.1"
    protocol: Protocol = Protocol.TCP


@dataclass(frozen=True)
class Overrides:
    """What the caller wants otherwise than the artifact or the runtime would have it. ``memory`` in bytes."""

    memory: int | None = None
    cpus: int | None = None
    name: str | None = None
    ports: tuple[Port, ...] = ()
    accel: Accel | None = None
    restore: RestorePolicy = RestorePolicy.AUTO
    remove_on_exit: bool = False
    keep_identity: bool = False
    bootstrap: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class StartRequest:
    """``POST /start``; ``manifest`` is a reference, a path, or a transport and a path (RUN-7)."""

    manifest: str
    overrides: Overrides = field(default_factory=Overrides)

    @classmethod
    def from_json(cls, document: Any) -> StartRequest:
        """Raises InputError (every problem, by JSON path), or Unsupported for an override that is not known."""
        problems: list[Problem] = []
        top = _top(document, problems)
        manifest = top.string("manifest", required=True)
        overrides = _overrides(top.child("overrides"), problems)
        return _checked(problems, cls(manifest or "", overrides))


@dataclass(frozen=True)
class InstanceRequest:
    """``POST /pause`` and ``/resume``."""

    instance_id: str

    @classmethod
    def from_json(cls, document: Any) -> InstanceRequest:
        """Raises InputError (every problem, by JSON path)."""
        problems: list[Problem] = []
        return _checked(problems, cls(_instance_id(_top(document, problems))))


@dataclass(frozen=True)
class StopRequest:
    """``POST /stop``; the guest gets ``timeout_s`` seconds to power down, and none with ``force``."""

    instance_id: str
    timeout_s: int = limits.STOP_TIMEOUT_DEFAULT
    force: bool = False

    @classmethod
    def from_json(cls, document: Any) -> StopRequest:
        """Raises InputError (every problem, by JSON path)."""
        problems: list[Problem] = []
        top = _top(document, problems)
        timeout = top.integer("timeout_s", 0, limits.STOP_TIMEOUT_MAX)
        if timeout is None:
            timeout = limits.STOP_TIMEOUT_DEFAULT
        return _checked(problems, cls(_instance_id(top), timeout, top.boolean("force", False)))


@dataclass(frozen=True)
class RemoveRequest:
    """``POST /remove``; with ``force`` also what runs."""

    instance_id: str
    force: bool = False

    @classmethod
    def from_json(cls, document: Any) -> RemoveRequest:
        """Raises InputError (every problem, by JSON path)."""
        problems: list[Problem] = []
        top = _top(document, problems)
        return _checked(problems, cls(_instance_id(top), top.boolean("force", False)))


@dataclass(frozen=True)
class SnapshotRequest:
    """``POST /snapshot``; ``tag`` is the reference that the snapshot gets, in a registry where it names one.

    ``leave`` is what the instance does then; ``scrub``: its guest's agent makes its memory small before; ``encrypt``: who can
    restore it (none: everyone).
    """

    instance_id: str
    tag: str | None = None
    leave: Leave = Leave.RUNNING
    scrub: bool = False
    encrypt: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, document: Any) -> SnapshotRequest:
        """Raises InputError (every problem, by JSON path)."""
        problems: list[Problem] = []
        top = _top(document, problems)
        leave = top.choice("leave", Leave) or Leave.RUNNING
        encrypt = top.strings("encrypt", limits.RAM_RECIPIENTS_MAX, check_recipient, rule="RAM-59")
        request = cls(_instance_id(top), top.string("tag"), leave, top.boolean("scrub", False), encrypt)
        return _checked(problems, request)


@dataclass(frozen=True)
class InjectRequest:
    """``POST /inject``: ``data`` goes to ``offset`` (bytes) of the region of the ivshmem device ``device``."""

    instance_id: str
    device: str
    offset: int
    data: bytes

    @classmethod
    def from_json(cls, document: Any) -> InjectRequest:
        """Raises InputError (every problem, by JSON path)."""
        problems: list[Problem] = []
        top = _top(document, problems)
        instance_id = _instance_id(top)
        content = top.child("content", required=True)
        mmio = None if content is None else content.child("mmio", required=True)
        if mmio is None:
            return _checked(problems, cls(instance_id, "", 0, b""))
        device = mmio.string("device", required=True, max_length=limits.NAME_MAX)
        offset = mmio.integer("offset", 0, _OFFSET_MAX, required=True, rule="RUN-15")
        request = cls(instance_id, device or "", offset or 0, _base64(mmio, "data"))
        return _checked(problems, request)

    def check_bounds(self, sizes: Mapping[str, int]) -> None:
        """Whether the data fits into its region; *sizes* are those of the instance's regions, by name, in bytes.

        Raises:
            NotFound: there is no such device.
            InputError: it does not fit.
        """
        if self.device not in sizes:
            raise NotFound(f"the instance has no ivshmem device {shown(self.device)}", rule="RUN-15")
        if self.offset + len(self.data) > sizes[self.device]:
            raise InputError(
                f"{len(self.data)} bytes at offset {self.offset} do not fit into {sizes[self.device]} bytes of"
                f" {self.device}",
                rule="RUN-15",
            )


@dataclass(frozen=True)
class WarmRequest:
    """``POST /warm``: ``size`` clones of the RAM snapshot of ``manifest`` (a reference) are to wait for starts."""

    manifest: str
    size: int

    @classmethod
    def from_json(cls, document: Any) -> WarmRequest:
        """Raises InputError (every problem, by JSON path)."""
        problems: list[Problem] = []
        top = _top(document, problems)
        manifest = top.string("manifest", required=True)
        size = top.integer("size", 0, limits.WARM_MAX, required=True, rule="RUN-21")
        return _checked(problems, cls(manifest or "", size or 0))


Request = StartRequest | StopRequest | InstanceRequest | SnapshotRequest | InjectRequest | RemoveRequest | WarmRequest

#: The request of each schema's name.
REQUESTS: Final[Mapping[str, type[Request]]] = {
    "StartRequest": StartRequest,
    "StopRequest": StopRequest,
    "InstanceRequest": InstanceRequest,
    "SnapshotRequest": SnapshotRequest,
    "InjectRequest": InjectRequest,
    "RemoveRequest": RemoveRequest,
    "WarmRequest": WarmRequest,
}


def parse_body(operation: Operation, body: bytes) -> Request:
    """The request of *operation* from the bytes of its body.

    Raises:
        JsonInvalid: not strict JSON.
        InputError, Unsupported: it breaks the contract.
    """
    assert operation.request is not None
    document = strictjson.parse(body, "the request", max_size=limits.API_BODY_MAX)
    return REQUESTS[operation.request].from_json(document)


_R = TypeVar("_R", bound=Request)


def _top(document: Any, problems: list[Problem]) -> Reader:
    return Reader(document, "$", problems, rule="RUN-3", text_rule="RUN-3")


def _checked(problems: list[Problem], request: _R) -> _R:
    if problems:
        first = min(problems)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(
            f"the request's {first.path} {first.message}{more}",
            problems=[one.to_json() for one in sorted(problems, key=lambda one: one[:2])[: limits.PROBLEMS_MAX]],
        )
    return request


def _instance_id(top: Reader) -> str:
    def check(value: str) -> str | None:
        return None if _ID.fullmatch(value) else f"must be the ID or the name of an instance, not {shown(value)}"

    return top.string("instance_id", required=True, max_length=limits.NAME_MAX, check=check) or ""


def _base64(item: Reader, key: str) -> bytes:
    value = item.value.get(key)
    if not isinstance(value, str):
        item.problem(
            key, "is required" if key not in item.value else f"must be a string, not {kind_of(value)}", "RUN-15"
        )
        return b""
    if (data := from_base64(value)) is None:
        item.problem(key, "must be base64", "RUN-15")
    return data or b""


_KNOWN: Final = frozenset(Overrides.__match_args__)


def _overrides(item: Reader | None, problems: list[Problem]) -> Overrides:
    if item is None:
        return Overrides()
    if not problems and (unknown := sorted(set(item.value) - _KNOWN)):
        raise Unsupported(
            f"the override {shown(unknown[0])} is not known here",
            hint=f"known are {', '.join(sorted(_KNOWN))}",
            problems=[Problem(f"$.overrides.{key[:80]}", "is not known here", "RUN-10").to_json() for key in unknown],
        )
    bootstrap = item.child("bootstrap", rule="BOOT-29")
    return Overrides(
        memory=_memory(item),
        cpus=item.integer("cpus", 1, limits.VCPUS_MAX, rule="RUN-9"),
        name=item.string("name", check=_check_name),
        ports=tuple(_port(port) for port in item.children("ports", limits.PORTS_MAX)),
        accel=item.choice("accel", Accel),
        restore=item.choice("restore", RestorePolicy, rule="RUN-9") or RestorePolicy.AUTO,
        remove_on_exit=item.boolean("remove_on_exit", False),
        keep_identity=item.boolean("keep_identity", False),
        bootstrap=None if bootstrap is None else bootstrap.value,
    )


def _memory(item: Reader) -> int | None:
    if not isinstance(item.value.get("memory"), str):
        size = item.integer("memory", 0, 2**63 - 1, rule="RUN-9")
        if size is not None and (wrong := sizes.memory_problem(size)):
            item.problem("memory", wrong, "RUN-9")
        return size
    text = item.string("memory", max_length=SIZE_TEXT_MAX, rule="RUN-9")
    if text is None:
        return None
    exact = sizes.parse(text)
    if exact is None:
        item.problem("memory", f"must be a size such as 512M, not {shown(text)}", "RUN-9")
        return None
    if wrong := sizes.memory_problem(exact):
        item.problem("memory", wrong, "RUN-9")
        return None
    return int(exact)


def _check_name(value: str) -> str | None:
    if _NAME.fullmatch(value) is None:
        return (
            f"must be up to 63 letters, digits, '_', '.' and '-', and begin with a letter or digit, not {shown(value)}"
        )
    return None


def _check_address(value: str) -> str | None:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return f"must be an IP address, not {shown(value)}"
    return None


def _port(item: Reader) -> Port:
    return Port(
        item.integer("guest_port", 1, 65535, required=True) or 0,
        item.integer("host_port", 0, 65535) or 0,
        item.string("host_ip", max_length=ADDRESS_MAX, check=_check_address) or "127.0.0.1",
        item.choice("protocol", Protocol) or Protocol.TCP,
    )
