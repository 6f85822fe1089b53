"""The one error tree of ovms.

Every error that leaves the library is an :class:`OvmsError`. It carries a stable kebab-case ``code`` (part of the
public interface: the HTTP API answers with it, scripts match on it), a message that says what is wrong and where, a
``hint`` that says what to do, and the ``context`` as plain values. Only the CLI turns errors into exit codes, and it
does so in one table (``ovms.cli.exitcodes``).

::

    OvmsError                       code
    ├── UsageError                  usage
    ├── Unauthorized                unauthorized
    ├── InputError                  invalid-input
    │   ├── FileProblem             file-missing · file-empty · file-not-regular · file-unreadable · file-too-large
    │   ├── ManifestInvalid         manifest-invalid        (``problems``: every one, each with its JSON path)
    │   ├── JsonInvalid             json-invalid
    │   ├── ReferenceInvalid        reference-invalid
    │   ├── KernelInvalid           kernel-invalid
    │   ├── DiskInvalid             disk-invalid
    │   ├── SnapshotInvalid         snapshot-invalid
    │   ├── IdentityMissing         identity-missing
    │   └── Unsupported             unsupported
    ├── NotFound                    not-found
    │   ├── ReferenceNotFound       reference-not-found
    │   ├── BlobNotFound            blob-not-found
    │   └── InstanceNotFound        instance-not-found
    ├── Conflict                    conflict
    │   ├── NameTaken               name-taken
    │   ├── InUse                   in-use
    │   ├── StateConflict           state-conflict
    │   └── Locked                  locked
    ├── RegistryError               registry-error
    │   ├── RegistryUnreachable     registry-unreachable
    │   ├── RegistryDenied          registry-denied
    │   └── RegistryProtocol        registry-protocol
    ├── IntegrityError              integrity
    │   ├── DigestMismatch          digest-mismatch
    │   └── StoreCorrupt            store-corrupt
    ├── Untrusted                   untrusted
    │   ├── SignatureMissing        signature-missing
    │   ├── SignatureInvalid        signature-invalid
    │   └── PolicyRefused           policy-refused
    ├── ResourceError               resource
    │   ├── DiskFull                disk-full
    │   └── PortInUse               port-in-use
    ├── HostError                   host
    │   ├── ToolMissing             tool-missing
    │   └── AccelUnavailable        accel-unavailable
    ├── VmmError                    vmm-failed
    │   ├── VmmTimeout              vmm-timeout
    │   └── SnapshotIncompatible    snapshot-incompatible
    ├── GuestError                  guest-failed
    │   ├── AgentUnavailable        agent-unavailable
    │   └── GuestTimeout            guest-timeout
    └── Interrupted                 interrupted
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

__all__ = [
    "AccelUnavailable",
    "AgentUnavailable",
    "BlobNotFound",
    "Conflict",
    "DigestMismatch",
    "DiskFull",
    "DiskInvalid",
    "FileProblem",
    "GuestError",
    "GuestTimeout",
    "HostError",
    "IdentityMissing",
    "InUse",
    "InputError",
    "InstanceNotFound",
    "IntegrityError",
    "Interrupted",
    "JsonInvalid",
    "KernelInvalid",
    "Locked",
    "ManifestInvalid",
    "NameTaken",
    "NotFound",
    "OvmsError",
    "PolicyRefused",
    "PortInUse",
    "Problem",
    "ReferenceInvalid",
    "ReferenceNotFound",
    "RegistryDenied",
    "RegistryError",
    "RegistryProtocol",
    "RegistryUnreachable",
    "ResourceError",
    "SignatureInvalid",
    "SignatureMissing",
    "SnapshotIncompatible",
    "SnapshotInvalid",
    "StateConflict",
    "StoreCorrupt",
    "ToolMissing",
    "Unauthorized",
    "Unsupported",
    "Untrusted",
    "UsageError",
    "VmmError",
    "VmmTimeout",
]


class Problem(NamedTuple):
    """One thing that is wrong in a document: where (a JSON path), what, and which rule of the specification says so."""

    path: str
    message: str
    rule: str | None = None

    def to_json(self) -> dict[str, str]:
        """As a problem document lists it."""
        rule = {} if self.rule is None else {"rule": self.rule}
        return {"path": self.path, **rule, "message": self.message}


class OvmsError(Exception):
    """Base of all errors of ovms.

    Args:
        message: what is wrong, and where (path, offset, JSON path, host), in one line.
        code: a more exact code than the class's own, from the tree in this module's docstring.
        hint: what the user can do about it.
        context: plain values (str, int, list) that a program may want: digests, sizes, paths.
    """

    code: str = "error"
    #: Further codes that instances of this class may carry beside the class's own.
    more_codes: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, message: str, *, code: str | None = None, hint: str | None = None, **context: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.context = context
        if code is not None:
            if code != type(self).code and code not in self.more_codes:
                raise AssertionError(f"{type(self).__name__} has no code {code!r}")
            self.code = code

    def to_json(self) -> dict[str, Any]:
        """The error as a JSON object: ``{"code", "message", "hint"?, …context}``."""
        answer: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.hint is not None:
            answer["hint"] = self.hint
        answer.update({k: v for k, v in self.context.items() if v is not None})
        return answer


class UsageError(OvmsError):
    """The command line itself is wrong."""

    code = "usage"


class Unauthorized(OvmsError):
    """A call of the runtime contract came without a token, or with a wrong one."""

    code = "unauthorized"


class InputError(OvmsError):
    """Something that the user, or an artifact, handed us is not acceptable."""

    code = "invalid-input"


class FileProblem(InputError):
    """A file that is named as an input cannot be used as one."""

    code = "file-unreadable"
    more_codes = frozenset({"file-missing", "file-empty", "file-not-regular", "file-too-large"})


class ManifestInvalid(InputError):
    """A manifest breaks the specification; ``problems`` lists every break, sorted by JSON path."""

    code = "manifest-invalid"

    def __init__(self, message: str, *, problems: Sequence[Problem], hint: str | None = None) -> None:
        self.problems = sorted(problems, key=lambda problem: problem[:2])
        super().__init__(message, hint=hint, problems=[problem.to_json() for problem in self.problems])


class JsonInvalid(InputError):
    """A document is not the strict JSON (or YAML) that we read: syntax, depth, size, duplicate keys."""

    code = "json-invalid"


class ReferenceInvalid(InputError):
    """A reference or digest is not of the form that the grammar asks for."""

    code = "reference-invalid"


class KernelInvalid(InputError):
    """A file is neither a bzImage nor an x86-64 ELF kernel."""

    code = "kernel-invalid"


class DiskInvalid(InputError):
    """A disk layer breaks a rule that keeps it from harming the host, or is not of the format that it claims."""

    code = "disk-invalid"


class SnapshotInvalid(InputError):
    """A RAM snapshot blob is malformed."""

    code = "snapshot-invalid"


class IdentityMissing(InputError):
    """A RAM snapshot is encrypted, and no identity that is at hand decrypts it."""

    code = "identity-missing"


class Unsupported(InputError):
    """Valid by the specification, but this runtime does not do it."""

    code = "unsupported"


class NotFound(OvmsError):
    """What was named does not exist."""

    code = "not-found"


class ReferenceNotFound(NotFound):
    """No artifact of that name, locally or in the registry."""

    code = "reference-not-found"


class BlobNotFound(NotFound):
    """No blob of that digest."""

    code = "blob-not-found"


class InstanceNotFound(NotFound):
    """No instance of that name or ID."""

    code = "instance-not-found"


class Conflict(OvmsError):
    """The request is sound, but not in the present state of things."""

    code = "conflict"


class NameTaken(Conflict):
    """Another instance has that name."""

    code = "name-taken"


class InUse(Conflict):
    """Something still uses what would be removed."""

    code = "in-use"


class StateConflict(Conflict):
    """The instance's state does not allow the call."""

    code = "state-conflict"


class Locked(Conflict):
    """Another ovms process holds the lock and did not let go of it in time, or another VM has the disk."""

    code = "locked"


class RegistryError(OvmsError):
    """A registry did not do what was asked of it."""

    code = "registry-error"


class RegistryUnreachable(RegistryError):
    """No connection, or it broke and stayed broken."""

    code = "registry-unreachable"


class RegistryDenied(RegistryError):
    """401 or 403: credentials are missing, wrong or not enough."""

    code = "registry-denied"


class RegistryProtocol(RegistryError):
    """The registry's answer is not what the distribution specification allows."""

    code = "registry-protocol"


class IntegrityError(OvmsError):
    """Bytes are not those that their digest promises."""

    code = "integrity"


class DigestMismatch(IntegrityError):
    """Content does not have the digest or the size that its descriptor promises."""

    code = "digest-mismatch"


class StoreCorrupt(IntegrityError):
    """The local store, or an instance's record, does not hold what it should."""

    code = "store-corrupt"


class Untrusted(OvmsError):
    """What was asked for may be whole, but nobody who is trusted stands for it."""

    code = "untrusted"


class SignatureMissing(Untrusted):
    """There is no signature where one is needed."""

    code = "signature-missing"


class SignatureInvalid(Untrusted):
    """There are signatures, and none of them is good."""

    code = "signature-invalid"


class PolicyRefused(Untrusted):
    """The policy does not allow it."""

    code = "policy-refused"


class ResourceError(OvmsError):
    """The host has too little of something."""

    code = "resource"


class DiskFull(ResourceError):
    """Too little disk space; said before the work starts wherever the need is known."""

    code = "disk-full"


class PortInUse(ResourceError):
    """A host port that should be forwarded is taken."""

    code = "port-in-use"


class HostError(OvmsError):
    """The host lacks something that the work needs."""

    code = "host"


class ToolMissing(HostError):
    """A program that we call is not installed; the hint names the package."""

    code = "tool-missing"


class AccelUnavailable(HostError):
    """The accelerator that was asked for does not run guests here."""

    code = "accel-unavailable"


class VmmError(OvmsError):
    """The virtual machine monitor failed."""

    code = "vmm-failed"


class VmmTimeout(VmmError):
    """The virtual machine monitor did not answer in time."""

    code = "vmm-timeout"


class SnapshotIncompatible(VmmError):
    """The snapshot was taken on a machine of another shape than the one that it would be restored on."""

    code = "snapshot-incompatible"


class GuestError(OvmsError):
    """The guest's agent refused what was asked of it, or said what makes no sense."""

    code = "guest-failed"


class AgentUnavailable(GuestError):
    """The guest runs no agent, or it does not answer."""

    code = "agent-unavailable"


class GuestTimeout(GuestError):
    """What runs in the guest did not end in time."""

    code = "guest-timeout"


class Interrupted(OvmsError):
    """The user broke it off."""

    code = "interrupted"
