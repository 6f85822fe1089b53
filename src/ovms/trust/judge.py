"""What a policy's rule makes of an artifact: whether it is met, and if not, why not. Pure but for the signers' own files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ovms import fsutil
from ovms.errors import HostError, InputError, PolicyRefused, SignatureInvalid, SignatureMissing, Untrusted
from ovms.lazy import dataclass
from ovms.oci.cosign import SIGN_PREDICATE
from ovms.spec.digest import Digest
from ovms.trust import keys
from ovms.trust.model import Bad, Found, Good, Signer, Unreadable
from ovms.trust.policy import Kind, Policy, Requirement, Rule, SignerSpec, shown_age
from ovms.trust.signers import KeySigner

if TYPE_CHECKING:
    from ovms.trust.identity import TrustRoot

#: How far ahead the clock of whoever made an artifact may be.
_AHEAD: Final = timedelta(minutes=5)
#: Lines of a refusal that say what was found.
_LINES_MAX: Final = 8
#: Signatures of an artifact that are looked at, from all the places where they were found.
_LOOKED_AT_MAX: Final = 1024

#: A signature, and which digest it has to be over: the manifest's, or that of an index which lists it.
Evidence = Sequence[tuple[Digest, Found | Unreadable]]


class Signers:
    """The signers of one policy, read from their files when they are first asked."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._known: dict[str, Signer] = {}
        self._roots: dict[Path, TrustRoot] = {}

    def get(self, names: Sequence[str]) -> list[Signer]:
        """The signers of these names.

        Raises:
            HostError: a key or trust root can't be read; or two of the names are one signer, who would count twice.
            ToolMissing: identities are asked for, and the package that checks them is not installed.
        """
        try:
            signers = [self._signer(self._policy.signers[name]) for name in names]
        except InputError as exc:  # which is this host's to mend, and not of whoever asks for a start
            hint = "nothing that needs this signer is accepted until it can be asked"
            raise HostError(exc.message, hint=hint) from exc
        seen: dict[object, str] = {}
        for name, signer in zip(names, signers, strict=True):
            spec = self._policy.signers[name]
            who = signer.key.fingerprint if isinstance(signer, KeySigner) else (spec.identity, spec.issuer)
            if (other := seen.setdefault(who, name)) != name:
                what = "key" if isinstance(signer, KeySigner) else "identity"
                raise HostError(
                    f"{self._policy.where}: {other} and {name} are the same {what}, and one rule names both",
                    hint="a rule that counts signers needs different ones",
                )
        return signers

    def _signer(self, spec: SignerSpec) -> Signer:
        if spec.name not in self._known:
            self._known[spec.name] = self._load(spec)
        return self._known[spec.name]

    def _load(self, spec: SignerSpec) -> Signer:
        what = f"the key of {spec.name} in {self._policy.where}"
        if spec.pem is not None:
            return KeySigner(spec.name, keys.load_public(spec.pem.encode(), what))
        if spec.key_path is not None:
            data = fsutil.read_input(self._path(spec.key_path), what, max_size=keys.KEY_MAX)
            return KeySigner(spec.name, keys.load_public(data, what))
        return self._identity(spec)

    def _identity(self, spec: SignerSpec) -> Signer:
        from ovms.trust.identity import IdentitySigner, TrustRoot

        path = self._path(spec.trust_root or "")
        if path not in self._roots:
            self._roots[path] = TrustRoot.load(path)
        return IdentitySigner(spec.name, self._roots[path], spec.identity or "", spec.issuer or "")

    def _path(self, text: str) -> Path:
        # beside the policy, where it is relative
        return Path(self._policy.where).parent / text

    def described(self, name: str) -> str:
        """A signer as messages have it: its name, and which key that is."""
        signer = self._known.get(name)
        if isinstance(signer, KeySigner):
            return f"{name} (key {signer.key.fingerprint[:16]})"
        spec = self._policy.signers[name]
        return name if spec.identity is None else f"{name} ({spec.identity[:200]!a} of {(spec.issuer or '')[:200]!a})"


@dataclass(frozen=True)
class Verdict:
    """What came of a rule. ``refusal`` is None where it is met; *signed* are the signers whose signatures counted."""

    policy: str
    rule: Rule
    place: str
    signed: tuple[str, ...] = ()
    found: tuple[str, ...] = ()
    refusal: Untrusted | None = None

    @property
    def allowed(self) -> bool:
        """Whether the artifact is allowed."""
        return self.refusal is None

    def to_json(self) -> dict[str, Any]:
        """As ``ovm policy check --json`` has it."""
        return {
            "policy": self.policy,
            "rule": self.rule.scope,
            "place": self.place,
            "asks_for": str(self.rule.requirement),
            "ram_asks_for": None if self.rule.ram is None else str(self.rule.ram),
            "allowed": self.allowed,
            "signed_by": list(self.signed),
            "found": list(self.found),
            "error": None if self.refusal is None else self.refusal.to_json(),
        }


@dataclass(frozen=True)
class Case:
    """An artifact that is judged: what it is called, from which *place* it is, whether its RAM snapshot is used, and when it was made (None: it does not say)."""

    name: str
    digest: Digest
    place: str
    ram: bool
    created: datetime | None


def judge(
    policy: Policy,
    signers: Signers,
    case: Case,
    evidence: Callable[[], Evidence],
    now: datetime,
    statements: Callable[[], Evidence] = tuple,
) -> Verdict:
    """What *policy* makes of *case*. *evidence* is asked for signatures only where the rule wants some, *statements* for signed
    statements of other kinds.

    Raises:
        HostError: a signer of the policy can't be asked.
        RegistryError: and its kinds: *evidence* could not be had.
    """
    rule = policy.rule(case.place)
    if not policy.allows_registry(case.place):
        allowed = ", ".join(policy.registries or ()) or "none"
        return _refused(
            policy,
            rule,
            case,
            PolicyRefused,
            f"{case.place or 'an unknown place'} is none of the allowed registries ({allowed})",
        )
    wanted = [rule.requirement, *([rule.ram] if case.ram and rule.ram is not None else [])]
    for number, requirement in enumerate(wanted):
        if requirement.kind is Kind.REJECT:
            what = "artifacts" if number == 0 else "RAM snapshots"
            return _refused(policy, rule, case, PolicyRefused, f"it rejects {what} from there")
    if rule.max_age is not None and not any(r.kind is Kind.SIGNED for r in wanted):
        why = _too_old(rule.max_age, case.created, now)
        if why is not None:
            return _refused(policy, rule, case, PolicyRefused, why)
    signed: dict[str, None] = {}
    lines: list[str] = []
    for number, requirement in enumerate(wanted):
        if requirement.kind is not Kind.SIGNED:
            continue
        good, lines = _count(signers, requirement, rule.max_age, case, evidence(), now)
        signed.update(dict.fromkeys(good))
        if len(good) < requirement.needed:
            what = "its RAM snapshot has to be signed by" if number > 0 else "it has to be signed by"
            return _unsigned(policy, signers, rule, requirement, case, good, lines, what, ram=number > 0)
    for one in rule.attestations:
        good, said = _count(signers, one.requirement, rule.max_age, case, statements(), now, one.predicate)
        lines += said
        signed.update(dict.fromkeys(good))
        if len(good) < one.requirement.needed:
            what = f"a statement about it of the type {one.predicate} has to be there, signed by"
            return _unsigned(policy, signers, rule, one.requirement, case, good, said, what)
    return Verdict(policy.where, rule, case.place, tuple(signed), tuple(lines))


def _count(
    signers: Signers,
    requirement: Requirement,
    max_age: int | None,
    case: Case,
    evidence: Evidence,
    now: datetime,
    predicate: str = SIGN_PREDICATE,
) -> tuple[list[str], list[str]]:
    # who of the required has signed, and a line for everything that was found
    good: list[str] = []
    lines: list[str] = []
    asked = signers.get(requirement.names)
    for subject, one in evidence[:_LOOKED_AT_MAX]:
        if isinstance(one, Unreadable):
            lines.append(f"{one.manifest[:19]}…: {one.detail}")
            continue
        details: list[str] = []
        for signer in asked:
            result = signer.check(one, subject, predicate)
            if isinstance(result, Bad):
                details.append(f"{signers.described(signer.name)}: {result.detail}")
                continue
            why = None if max_age is None else _too_old(max_age, _time_of(result, case), now)
            if why is not None:
                details.append(f"{signers.described(signer.name)}: {why}")
                continue
            if signer.name not in good:
                good.append(signer.name)
            details = [f"good, by {signers.described(signer.name)}"]
            break
        lines.append(f"{one}: {'; '.join(details)}")
    return good, lines


def _time_of(result: Good, case: Case) -> datetime | None:
    return result.signed_at if result.signed_at is not None else case.created


def _too_old(max_age: int, made: datetime | None, now: datetime) -> str | None:
    if made is None:
        return "it does not say when it was made, and the rule has a maximum age"
    if made > now + _AHEAD:
        return f"it is from the future ({_shown(made)})"
    if now - made > timedelta(seconds=max_age):
        return f"it is from {_shown(made)}, and the rule allows {shown_age(max_age)}"
    return None


def _shown(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _unsigned(
    policy: Policy,
    signers: Signers,
    rule: Rule,
    requirement: Requirement,
    case: Case,
    good: list[str],
    lines: list[str],
    what: str,
    *,
    ram: bool = False,
) -> Verdict:
    listed = ", ".join(signers.described(name) for name in requirement.names)
    many = len(requirement.names) > 1
    wanted = f"{requirement.needed} of {listed}" if many else listed
    if good:
        kind: type[Untrusted] = SignatureMissing
        found = f"only {', '.join(good)} has signed it" if len(good) == 1 else f"only {', '.join(good)} have signed it"
    elif lines:
        kind = SignatureInvalid
        more = f"; and {len(lines) - _LINES_MAX} more" if len(lines) > _LINES_MAX else ""
        found = f"no signature counts: {'; '.join(lines[:_LINES_MAX])}{more}"
    else:
        kind, found = SignatureMissing, "there is no signature"
    hint = None
    if ram:
        hint = (
            "'ovm pull' fetches signatures that came later; 'ovm run --cold' boots from the disk, and 'ovm pull --no-ram' leaves the"
            " RAM snapshot out"
        )
    return _refused(policy, rule, case, kind, f"{what} {wanted}, and {found}", lines, good, hint)


def _refused(
    policy: Policy,
    rule: Rule,
    case: Case,
    kind: type[Untrusted],
    why: str,
    lines: Sequence[str] = (),
    good: Sequence[str] = (),
    hint: str | None = None,
) -> Verdict:
    text = f"{case.name} is refused by the rule for {rule.scope} in {policy.where}: {why}"
    refusal = kind(
        text,
        hint=hint or "'ovm policy check' tells more, and docs/policy.md what a rule asks for",
        policy=policy.where,
        scope=rule.scope,
        place=case.place,
        digest=case.digest,
        found=list(lines[:_LINES_MAX]),
    )
    return Verdict(policy.where, rule, case.place, tuple(good), tuple(lines), refusal)


__all__ = ["Case", "Evidence", "Signers", "Verdict", "judge"]
