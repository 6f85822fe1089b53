"""Every maximum of the format, by name. They are enforced while reading, not after.

Sizes are bytes unless the name says otherwise.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB

#: OCI manifests and indexes; registries take 4 MiB.
OCI_MANIFEST_MAX: Final = 4 * MIB
#: The OVMS manifest.
MANIFEST_MAX: Final = 1 * MIB
#: Nested arrays and objects of any JSON document that we read.
JSON_DEPTH_MAX: Final = 32
DISK_LAYERS_MAX: Final = 64
DEVICES_MAX: Final = 32
#: Layers of an OCI manifest: disk layers, kernel, initrd, RAM snapshot, bootstrap config, and a reserve.
OCI_LAYERS_MAX: Final = 128
NAME_MAX: Final = 255
STRING_MAX: Final = 4096
#: Of an entry of ``env``, ``entrypoint`` or ``cmd``: what Linux takes as one argument of a program.
ARGUMENT_MAX: Final = 128 * KIB
KERNEL_ARGS_MAX: Final = 2047
KERNEL_MAX: Final = 512 * MIB
INITRD_MAX: Final = 2 * GIB
DISK_LAYER_MAX: Final = 16 * TIB
#: The size that a disk shows to the guest.
DISK_VIRTUAL_MAX: Final = 16 * TIB
BOOTSTRAP_MAX: Final = 1 * MIB
IVSHMEM_MAX: Final = 16 * GIB
IVSHMEM_MIN: Final = 4096
#: Where the manifest says no size.
IVSHMEM_DEFAULT: Final = 1 * MIB
#: A request body of the runtime contract.
API_BODY_MAX: Final = 1 * MIB

RAM_MIN: Final = 1 * MIB
RAM_MAX: Final = 1 * TIB
RAM_PAGE: Final = 4096
RAM_CHUNK_PAGES: Final = 16
RAM_CHUNK_PAGES_MAX: Final = 1024
#: Index entries: whoever restores holds the index in memory. 256 GiB of memory in chunks of RAM_CHUNK_PAGES.
RAM_CHUNKS_MAX: Final = 4 * MIB
RAM_HEADER_MAX: Final = 1 * MIB
RAM_STATE_MAX: Final = 64 * MIB
#: Ancestors of a diff snapshot.
RAM_PARENTS_MAX: Final = 16
VCPUS_MAX: Final = 255
