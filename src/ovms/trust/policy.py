"""The policy file: who must have signed what comes from where (``docs/policy.md``, ``spec/schemas/policy.v1.json``).

A policy is read strictly: a key twice, a key that is not known, a signer that is not there, and the whole file is refused, and
with it everything that would have been asked of it. Nothing here looks at an artifact; that is :mod:`ovms.trust.judge`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, Final

from ovms.errors import InputError, Problem
from ovms.lazy import dataclass, field, regex
from ovms.oci.cosign import SIGN_PREDICATE
from ovms.oci.reference import Reference
from ovms.spec import limits, strictjson
from ovms.spec.document import Reader, shown
from ovms.trust.keys import KEY_MAX

#: Bytes of a policy file, and how deep it may be nested.
SIZE_MAX: Final = 1 * limits.MIB
DEPTH_MAX: Final = 8
#: Signers, scopes and allowed registries of a policy; signers of one rule.
SIGNERS_MAX: Final = 256
SCOPES_MAX: Final = 4096
NEEDED_MAX: Final = 64
#: Statements that one rule asks for.
ATTESTATIONS_MAX: Final = 16
#: Characters of a path, an identity or an issuer.
_TEXT_MAX: Final = 4096
_SIGNER: Final = regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_AGE: Final = regex(r"([1-9][0-9]{0,5})([hd])")
_SECONDS: Final = {"h": 3600, "d": 86400}
_HINT: Final = "docs/policy.md tells what a policy holds"

#: The scope of what was made here, and of what has a name without a registry and no known origin; those of files.
LOCAL: Final = "local"
PLACES: Final = ("oci", "oci-archive")
#: What messages call the rule that holds where no scope fits.
DEFAULT: Final = "default"
_HTTPS: Final = 443


class Kind(StrEnum):
    """What a rule asks for."""

    ACCEPT = "accept"
    REJECT = "reject"
    SIGNED = "signed"


@dataclass(frozen=True)
class Requirement:
    """Accept, reject, or signatures of at least *needed* of the signers *names*."""

    kind: Kind
    names: tuple[str, ...] = ()
    needed: int = 0

    def __str__(self) -> str:
        if self.kind is not Kind.SIGNED:
            return str(self.kind)
        listed = ", ".join(self.names)
        if self.needed == 1:
            return f"signed by {listed}" if len(self.names) == 1 else f"signed by one of {listed}"
        return f"signed by {'all' if self.needed == len(self.names) else self.needed} of {listed}"


@dataclass(frozen=True)
class Attestation:
    """A statement that has to be there, about the artifact: its *predicate* is of this type (or begins so, where that ends with
    ``/``), and it is signed as the *requirement* says.
    """

    predicate: str
    requirement: Requirement

    def __str__(self) -> str:
        return f"{self.predicate} {self.requirement}"


@dataclass(frozen=True)
class Rule:
    """What is asked of artifacts from *scope*; of those whose RAM snapshot is used, *ram* too. *max_age* is in seconds."""

    scope: str
    requirement: Requirement
    ram: Requirement | None = None
    max_age: int | None = None
    attestations: tuple[Attestation, ...] = ()

    @property
    def age(self) -> str | None:
        """The maximum age, for people."""
        return None if self.max_age is None else shown_age(self.max_age)

    @property
    def wants_signatures(self) -> bool:
        """Whether signatures have to be known before it can be told what comes of it."""
        signed = any(r is not None and r.kind is Kind.SIGNED for r in (self.requirement, self.ram))
        return signed or bool(self.attestations)


@dataclass(frozen=True)
class SignerSpec:
    """A signer as the policy has it: a key (*pem*, or the file *key_path*), or an *identity* of an *issuer*."""

    name: str
    pem: str | None = None
    key_path: str | None = None
    identity: str | None = None
    issuer: str | None = None
    trust_root: str | None = None


@dataclass(frozen=True)
class Policy:
    """A policy file. *where* is its path; *enforced*: a system's, beside which a user's own can only ask for more."""

    where: str
    default: Rule
    scopes: dict[str, Rule] = field(default_factory=dict)
    signers: dict[str, SignerSpec] = field(default_factory=dict)
    registries: tuple[str, ...] | None = None
    enforced: bool = False

    def to_json(self) -> dict[str, Any]:
        """What it asks for, without its keys."""
        rules = (self.default, *(self.scopes[scope] for scope in sorted(self.scopes)))
        return {
            "path": self.where,
            "enforced": self.enforced,
            "registries": None if self.registries is None else list(self.registries),
            "signers": sorted(self.signers),
            "rules": [
                {
                    "scope": rule.scope,
                    "asks_for": str(rule.requirement),
                    "ram_asks_for": None if rule.ram is None else str(rule.ram),
                    "max_age_s": rule.max_age,
                    "attestations": [str(one) for one in rule.attestations],
                }
                for rule in rules
            ],
        }

    def rule(self, place: str) -> Rule:
        """The rule for a place: that of the longest scope that it is in, else the default.

        *place* is ``registry.example/team/web``, ``oci``, ``oci-archive`` or ``local``.
        """
        scope = canonical(place)
        while scope:
            if scope in self.scopes:
                return self.scopes[scope]
            scope = scope.rpartition("/")[0]
        return self.default

    def allows_registry(self, place: str) -> bool:
        """Whether artifacts may come from *place* at all; what is no registry is none of this list's matter."""
        if self.registries is None or place == LOCAL or place in PLACES:
            return True
        place = canonical(place)
        return any(place == allowed or place.startswith(allowed + "/") for allowed in self.registries)


def canonical(place: str) -> str:
    """*place* with its host written as it is compared: in small letters, without HTTPS's own port."""
    host, slash, path = place.partition("/")
    host = host.lower()
    name, colon, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
    if colon and port.isdecimal():
        host = name if int(port) == _HTTPS else f"{name}:{int(port)}"
    if host.startswith("["):
        import ipaddress

        address, bracket, rest = host[1:].partition("]")
        with contextlib.suppress(ValueError):  # of what is no address, nothing is made
            host = f"[{ipaddress.IPv6Address(address).compressed}{bracket}{rest}"
    return host + slash + path


def shown_age(seconds: int) -> str:
    """``90 days``, ``12 hours``"""
    return f"{seconds // 86400} days" if seconds % 86400 == 0 else f"{seconds // 3600} hours"


def parse(data: bytes, where: str) -> Policy:
    """Reads a policy; *where* names it in errors.

    Raises:
        JsonInvalid: it is no strict JSON.
        InputError: it is no policy; every mistake is named with its JSON path.
    """
    document = strictjson.parse(data, where, max_size=SIZE_MAX, max_depth=DEPTH_MAX)
    problems: list[Problem] = []
    reader = Reader(document, "$", problems, rule="", text_rule="")
    policy = _read(reader, where)
    if problems or policy is None:
        listed = sorted(problems, key=lambda problem: problem[:2])[: limits.PROBLEMS_MAX]
        raise InputError(
            f"{where} is no policy: " + "; ".join(f"{p.path} {p.message}" for p in listed[:3]),
            hint=_HINT,
            path=where,
            problems=[{"path": p.path, "message": p.message} for p in listed],
        )
    return policy


def _read(reader: Reader, where: str) -> Policy | None:
    _known(reader, {"version", "enforced", "registries", "signers", "default", "scopes"})
    reader.integer("version", 1, 1, required=True)
    signers = {}
    if (table := reader.child("signers")) is not None:
        _few(table, SIGNERS_MAX)
        for name in list(table.value)[:SIGNERS_MAX]:
            if not _SIGNER.fullmatch(name):
                reader.problem("signers", f"{shown(name)} is no name for a signer: letters, digits, '.', '_' and '-'")
            elif (item := table.child(name)) is not None:
                signers[name] = _signer(item, name)
    if "default" not in reader.value and reader.ok:
        reader.problem("default", "is required: what holds where no scope fits")
    item = reader.child("default")
    default = None if item is None else _rule(item, DEFAULT, signers)
    scopes = {}
    if (table := reader.child("scopes")) is not None:
        _few(table, SCOPES_MAX)
        for scope in list(table.value)[:SCOPES_MAX]:
            if (wrong := _check_scope(scope)) is not None:
                reader.problem("scopes", f"{shown(scope)} {wrong}")
            elif (item := table.child(scope)) is not None:
                if canonical(scope) in scopes:
                    reader.problem("scopes", f"has {shown(scope)} twice, written in two ways")
                scopes[canonical(scope)] = _rule(item, scope, signers)
    registries = None
    if "registries" in reader.value:
        listed = reader.strings("registries", SCOPES_MAX, _check_registry)
        registries = () if reader.problems else tuple(map(canonical, listed))
    enforced = reader.boolean("enforced", False)
    return None if default is None else Policy(where, default, scopes, signers, registries, enforced)


def _signer(item: Reader, name: str) -> SignerSpec:
    _known(item, {"key", "keyPath", "identity", "issuer", "trustRoot"})
    pem = item.value.get("key")
    if pem is not None and not (isinstance(pem, str) and 0 < len(pem) <= KEY_MAX):
        item.problem("key", f"must be a public key in PEM, of at most {KEY_MAX} characters")
        pem = None
    spec = SignerSpec(
        name,
        pem,
        *(item.string(key, max_length=_TEXT_MAX) for key in ("keyPath", "identity", "issuer", "trustRoot")),
    )
    kinds = [key for key in ("key", "keyPath", "identity") if key in item.value]
    if len(kinds) != 1:
        item.problem("key", "one of 'key', 'keyPath' and 'identity' must be there, and no two")
    for key in ("issuer", "trustRoot"):
        if ("identity" in item.value) != (key in item.value):
            item.problem(key, "goes with 'identity', which needs it")
    return spec


def _rule(item: Reader, scope: str, signers: dict[str, SignerSpec]) -> Rule:
    _known(item, {"type", "anyOf", "allOf", "atLeast", "of", "ramSnapshots", "maxAge", "attestations"})
    requirement = _requirement(item, signers)
    ram = None
    if (child := item.child("ramSnapshots")) is not None:
        _known(child, {"type", "anyOf", "allOf", "atLeast", "of"})
        ram = _requirement(child, signers)
    max_age = None
    if (text := item.string("maxAge")) is not None:
        if (match := _AGE.fullmatch(text)) is None:
            item.problem("maxAge", f"must be a number of hours or days, such as 12h or 90d, not {shown(text)}")
        else:
            max_age = int(match[1]) * _SECONDS[match[2]]
    attestations = tuple(_attestation(one, signers) for one in item.children("attestations", ATTESTATIONS_MAX))
    return Rule(scope, requirement, ram, max_age, attestations)


def _attestation(item: Reader, signers: dict[str, SignerSpec]) -> Attestation:
    _known(item, {"predicateType", "anyOf", "allOf", "atLeast", "of"})
    predicate = item.string("predicateType", required=True, max_length=limits.NAME_MAX) or ""
    if "://" not in predicate or predicate == SIGN_PREDICATE:
        item.problem("predicateType", "must be the type of a predicate, such as https://slsa.dev/provenance/v1")
    return Attestation(predicate, _signed(item, signers, "predicateType"))


def _requirement(item: Reader, signers: dict[str, SignerSpec]) -> Requirement:
    kind = item.choice("type", Kind, required=True)
    if kind is not Kind.SIGNED:
        lists = [key for key in ("anyOf", "allOf", "of") if key in item.value]
        for key in [*lists, *(["atLeast"] if "atLeast" in item.value else [])]:
            item.problem(key, "goes with the type 'signed'")
        return Requirement(kind or Kind.REJECT)
    return _signed(item, signers, "type")


def _signed(item: Reader, signers: dict[str, SignerSpec], where: str) -> Requirement:
    # what is wrong with the lists as a whole is told at *where*
    lists = [key for key in ("anyOf", "allOf", "of") if key in item.value]
    if len(lists) != 1 or ("atLeast" in item.value) != (lists == ["of"]):
        item.problem(where, "'signed' needs one of 'anyOf', 'allOf', and 'atLeast' with 'of'")
        return Requirement(Kind.REJECT)

    def check(name: str) -> str | None:
        return None if name in signers else f"names the signer {shown(name)}, which is not in $.signers"

    names = item.strings(lists[0], NEEDED_MAX, check)
    if not names and not item.problems:
        item.problem(lists[0], "must name a signer")
    if len(set(names)) < len(names):
        item.problem(lists[0], "names a signer twice")
    if lists == ["of"]:
        needed = item.integer("atLeast", 1, max(1, len(names))) or 1
    else:
        needed = 1 if lists == ["anyOf"] else len(names)
    return Requirement(Kind.SIGNED, names, needed)


def _known(reader: Reader, keys: Iterable[str]) -> None:
    for key in sorted(set(reader.value) - set(keys))[:10]:
        reader.problems.append(Problem(reader.path, f"has the key {shown(key)}, which is not known"))


def _few(reader: Reader, most: int) -> None:
    if len(reader.value) > most:
        reader.problems.append(Problem(reader.path, f"has {len(reader.value)} entries; at most {most} are allowed"))


def _check_scope(scope: str) -> str | None:
    if scope == LOCAL or scope in PLACES:
        return None
    return _check_registry(scope)


def _check_registry(text: str) -> str | None:
    # what a reference would have before its tag, or its registry alone
    wrong = "is no HOST[:PORT][/PATH], as names of artifacts have it"
    path = text if "/" in text else f"{text}/x"
    try:
        reference = Reference.parse(f"{path}:x")
    except InputError:
        return wrong
    return None if reference.registry is not None and reference.name == path else wrong
