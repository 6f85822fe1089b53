"""What the specification fixes: media types, limits, the manifest, the RAM-snapshot codec. Pure: no files, no sockets."""

from __future__ import annotations

from typing import Final

#: The versions of the specification that this program conforms to.
SPEC_VERSIONS: Final = ("0.1",)
#: In which roles (GEN-1). The runtime contract has no server yet.
ROLES: Final = ("producer", "reader")
