"""What an artifact's bootstrap config asks for (profile cloud-init), and how that ended.

Source: ``spec/rfc/ovms-bootstrap.md``, sections 4, 6 and 8. Of a config nothing is run or looked up on the host: it becomes text on
the instance's seed disk.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from ovms import fsutil
from ovms.artifact.model import Artifact
from ovms.errors import InputError, Unsupported
from ovms.lazy import regex
from ovms.oci.layout import Layout
from ovms.spec import limits
from ovms.spec.digest import Digest
from ovms.vmm.model import VmFiles

if TYPE_CHECKING:
    from ovms.runtime.seeds import Seed

#: What of the console is looked at for the last words of a bootstrap, in bytes from its end.
_TAIL: Final = 64 * limits.KIB
_EXIT: Final = regex(rb"(?:^|\n)ovms-exit: ([0-9]{1,9})\r*(?=\n)")


def seed_for(layout: Layout, artifact: Artifact, told: Seed | None) -> Seed | None:
    """What the guest's cloud-init is to be told: by the artifact's config, else by the user (*told*).

    Raises:
        Unsupported: a profile that this version does not have.
        ManifestInvalid, JsonInvalid: the config breaks the specification.
        InputError: it names no program, or the user has other wishes.
    """
    manifest = artifact.manifest
    if manifest.bootstrap is None:
        return told
    from ovms.runtime.seeds import Seed
    from ovms.spec import bootstrap

    what = f"the bootstrap config of {manifest.name}"
    data = fsutil.read_input(layout.path(Digest(manifest.bootstrap.ref)), what, max_size=limits.BOOTSTRAP_MAX)
    config = bootstrap.parse(data, what)
    profile = config.profile or bootstrap.DEFAULT_PROFILE
    if profile != bootstrap.CLOUD_INIT:
        raise Unsupported(
            f"{manifest.name} needs the bootstrap profile {profile}, which this version does not run",
            hint=f"it runs {bootstrap.CLOUD_INIT}",
            rule="BOOT-10",
        )
    if told:
        raise InputError(
            f"{manifest.name} has a bootstrap config, which says all that its guest's cloud-init is told",
            hint="leave out --user-data, --ssh-key and --hostname",
        )
    return Seed(bootstrap.user_data(config).encode())


def exit_status(files: VmFiles) -> int | None:
    """The exit status of the workload, by the guest's own word: to be shown, and nothing else. None where it gave none."""
    try:
        with files.console_log.open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _TAIL))
            found = _EXIT.findall(log.read(_TAIL))
    except FileNotFoundError:
        return None
    return int(found[-1]) if found and int(found[-1]) <= 255 else None
