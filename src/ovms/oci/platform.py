"""Platforms as OCI writes them, ``OS/ARCHITECTURE[/VARIANT]`` in Go's names, and what an index has for one."""

from __future__ import annotations

from typing import Any, Final, Self

from ovms.errors import InputError, Unsupported
from ovms.lazy import dataclass, regex
from ovms.oci.descriptor import Descriptor, ImageIndex, ImageManifest
from ovms.spec import mediatypes

#: What others call an architecture that Go has another name for.
_ALIASES: Final = {"x86_64": "amd64", "aarch64": "arm64", "armhf": "arm", "i386": "386", "i686": "386"}
#: The variant that is meant where none is written.
_DEFAULT_VARIANTS: Final = {"arm64": "v8", "arm": "v7"}
_FORM: Final = regex(r"([a-z0-9]{1,32})/([a-z0-9_]{1,32})(?:/([a-z0-9.]{1,32}))?")
#: So many platforms of an index are named in an error.
_LISTED_MAX: Final = 20

CONTAINER_HINT: Final = "container images cannot be run as they are; 'ovm build' makes an OVMS artifact"


@dataclass(frozen=True)
class Platform:
    """What a machine is."""

    system: str
    architecture: str
    variant: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads ``linux/amd64``, ``linux/arm64/v8``, ``linux/x86_64``.

        Raises:
            InputError: another form.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise InputError(
                f"{text[:80]!a} is no platform",
                hint="write it as OS/ARCH[/VARIANT], such as linux/amd64 or linux/arm64",
            )
        return cls(match[1], _ALIASES.get(match[2], match[2]), match[3])

    @classmethod
    def of_guest(cls, arch: str) -> Self:
        """The platform of an OVMS manifest's ``metadata.platform.arch``."""
        return cls("linux", _ALIASES.get(arch, arch))

    def __str__(self) -> str:
        return "/".join(filter(None, (self.system, self.architecture, self.variant)))

    def takes(self, other: Platform) -> bool:
        """Whether what is made for *other* is what is asked for here; where no variant is, each one will do."""
        if (self.system, self.architecture) != (other.system, other.architecture):
            return False
        usual = _DEFAULT_VARIANTS.get(self.architecture)
        return self.variant is None or self.variant == (other.variant or usual)


#: The only one that version 0.1 runs.
HOST: Final = Platform("linux", "amd64")


def fitting(index: ImageIndex, platform: Platform | None, where: object) -> list[Descriptor]:
    """The manifests of *index* that may be an OVMS artifact for *platform* (None: this host's), the likeliest first.

    One that says that it is an OVMS artifact comes before one that says nothing: an index may hold both kinds. One
    that names no platform fits every one, after those that name it.

    Raises:
        Unsupported: there is none; the error lists what there is.
    """
    wanted = platform or HOST
    may_be = [
        (d, _platform_of(d.platform))
        for d in index.manifests
        if d.media_type == mediatypes.OCI_MANIFEST and d.artifact_type in (None, mediatypes.MANIFEST)
    ]
    answer = [d for d, has in may_be if d.platform is None or (has is not None and wanted.takes(has))]
    if not answer:
        has = sorted({str(p) for _, p in may_be if p is not None})[:_LISTED_MAX]
        raise Unsupported(
            f"{where} holds nothing for {wanted}" + (f", but for {', '.join(has)}" if has else ""),
            hint="choose one with --platform" if has and platform is None else CONTAINER_HINT if not has else None,
            platforms=has,
            rule="OCI-16",
        )
    return sorted(answer, key=lambda d: (d.artifact_type != mediatypes.MANIFEST, d.platform is None))


def check_guest(platform: Platform | None, arch: str, where: object) -> None:
    """Whether the guest, as its OVMS manifest says, is of the *platform* that was asked for (None: whichever).

    Raises:
        Unsupported: it is of another.
    """
    guest = Platform.of_guest(arch)
    if platform is not None and (platform.system, platform.architecture) != (guest.system, guest.architecture):
        raise Unsupported(
            f"{where} is for {guest}, not for {platform}", hint="leave --platform out, or choose that one"
        )


def check_runnable(platform: Platform | None) -> None:
    """Whether a VM of *platform* (None: this host's) can be run.

    Raises:
        Unsupported: it cannot.
    """
    if platform is not None and not HOST.takes(platform):
        raise Unsupported(
            f"a VM of {platform} cannot be run here: ovms runs {HOST}",
            hint="'ovm pull --platform' fetches it, to be copied or looked at",
            rule="BIN-4",
        )


def is_artifact(image: ImageManifest) -> bool:
    """Whether an image manifest is an OVMS artifact: the config, or exactly one layer, is an OVMS manifest (OCI-4)."""
    claims = [layer for layer in image.layers if layer.media_type == mediatypes.MANIFEST]
    return image.config.media_type == mediatypes.MANIFEST or len(claims) == 1


def _platform_of(value: Any) -> Platform | None:
    if value is None:
        return None
    system, architecture, variant = (value.get(key) for key in ("os", "architecture", "variant"))
    try:
        return Platform.parse("/".join(filter(None, (system, architecture, variant))))
    except (InputError, TypeError):  # of a form that nobody can ask for
        return None
