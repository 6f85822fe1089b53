"""Whether an artifact is signed by whom it should be: what was found, against those who may sign.

Pure: what :mod:`ovms.trust.sources` finds comes in, a verdict goes out. A signature counts for one digest alone, that which was
asked for; what lies beside it and is no good takes nothing away from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ovms.errors import SignatureInvalid, SignatureMissing
from ovms.lazy import dataclass
from ovms.spec.digest import Digest
from ovms.trust.model import Bad, Found, Good, Signer, Unreadable

#: Lines of an error's message that say what is wrong with the signatures.
_SHOWN: Final = 4


@dataclass(frozen=True)
class Verdict:
    """What became of the signatures of *subject*.

    *good* has an entry for each signature and signer that fit. *bad* has those signatures that fit nobody, with what each signer
    says of it. *signers* are the names of all that were asked.
    """

    subject: Digest
    signers: tuple[str, ...]
    good: tuple[Good, ...] = ()
    bad: tuple[Bad, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()

    @property
    def by(self) -> tuple[str, ...]:
        """The signers who signed, each once, in the order in which they were asked."""
        signed = {one.signer for one in self.good}
        return tuple(name for name in self.signers if name in signed)

    @property
    def without(self) -> tuple[str, ...]:
        """The signers of whom there is no good signature."""
        return tuple(name for name in self.signers if name not in self.by)

    @property
    def any_found(self) -> bool:
        """Whether there is anything where signatures are looked for."""
        return bool(self.good or self.bad or self.unreadable)

    def to_json(self) -> dict[str, Any]:
        """The verdict as plain values: every signature, whether it counts, and why not."""
        good = [
            {**_where(one.found), "signer": one.signer, "good": True}
            | ({} if one.signed_at is None else {"signed_at": one.signed_at.isoformat()})
            for one in self.good
        ]
        bad = [{**_where(one.found), "signer": one.signer, "good": False, "detail": one.detail} for one in self.bad]
        strange = [{"manifest": one.manifest, "good": False, "detail": one.detail} for one in self.unreadable]
        return {"digest": self.subject, "signers": list(self.by), "signatures": good + bad + strange}

    def details(self) -> list[str]:
        """A line about each signature that does not count, without control characters."""
        # several keys mostly say the same of a signature
        said = dict.fromkeys(f"{one.found}: {one.detail}" for one in self.bad)
        return [*said, *(f"{one.manifest[:19]}…: {one.detail}" for one in self.unreadable)]


def check(found: Sequence[Found | Unreadable], subject: Digest, signers: Sequence[Signer]) -> Verdict:
    """Holds each signature that was found against each of *signers*, whose names are all different. Raises nothing."""
    good: list[Good] = []
    bad: list[Bad] = []
    for one in found:
        if isinstance(one, Unreadable):
            continue
        results = [signer.check(one, subject) for signer in signers]
        fitting = [result for result in results if isinstance(result, Good)]
        good += fitting
        if not fitting:
            bad += [result for result in results if isinstance(result, Bad)]
    strange = tuple(one for one in found if isinstance(one, Unreadable))
    return Verdict(subject, tuple(signer.name for signer in signers), tuple(good), tuple(bad), strange)


def require(verdict: Verdict, needed: int, what: str) -> None:
    """Returns where at least *needed* different signers signed. *what* names the artifact in errors.

    Raises:
        SignatureMissing: nothing is where signatures are looked for.
        SignatureInvalid: what is there is not enough.
    """
    if len(verdict.by) >= needed:
        return
    if not verdict.any_found:
        raise SignatureMissing(
            f"{what} has no signature",
            hint="signatures lie beside an artifact, and a copy elsewhere has none; 'ovm referrers' lists what is there",
            **verdict.to_json(),
        )
    asked = len(verdict.signers)
    wanted = "" if asked == 1 else f", and {'all' if needed == asked else needed} of {asked} are needed"
    details = verdict.details()
    more = f"; and {len(details) - _SHOWN} more" if len(details) > _SHOWN else ""
    said = "; ".join(details[:_SHOWN]) + more
    raise SignatureInvalid(
        f"{what} has no good signature by {', '.join(verdict.without)}{wanted}" + (f": {said}" if said else ""),
        hint="do not use it unless you know why; 'ovm verify --json' tells of each signature",
        **verdict.to_json(),
    )


def _where(found: Found) -> dict[str, Any]:
    return {"format": found.format.value, "manifest": found.manifest, "layer": found.layer}
