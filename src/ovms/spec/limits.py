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
#: Bytes in UTF-8: what Linux takes on x86, without the end.
KERNEL_ARGS_MAX: Final = 2047
KERNEL_MAX: Final = 512 * MIB
#: Program headers of an ELF kernel, and bytes of its notes.
ELF_HEADERS_MAX: Final = 64
ELF_NOTES_MAX: Final = 64 * KIB
INITRD_MAX: Final = 2 * GIB
DISK_LAYER_MAX: Final = 16 * TIB
#: The size that a disk shows to the guest.
DISK_VIRTUAL_MAX: Final = 16 * TIB
#: The tables of a qcow2 header, which cost memory before any other check.
QCOW2_L1_MAX: Final = 32 * MIB
QCOW2_REFCOUNTS_MAX: Final = 8 * MIB
QCOW2_EXTENSIONS_MAX: Final = 64
QCOW2_HEADER_MAX: Final = 4096
BOOTSTRAP_MAX: Final = 1 * MIB
#: Entries of ``env``, of ``entrypoint`` and ``cmd``, and ports (of a bootstrap config, or asked for at a start).
ENV_MAX: Final = 4096
ARGUMENTS_MAX: Final = 1024
PORTS_MAX: Final = 1024
#: What Linux containers know as a user's number: a signed 32-bit integer.
USER_ID_MAX: Final = 2**31 - 1
#: ``runtimeHints``.
RUNTIMES_MAX: Final = 32
COLD_START_MAX: Final = 2**31
#: A reference, and a tag of it.
REFERENCE_MAX: Final = 512
TAG_MAX: Final = 128
IVSHMEM_MAX: Final = 16 * GIB
IVSHMEM_MIN: Final = 4096
#: Where the manifest says no size.
IVSHMEM_DEFAULT: Final = 1 * MIB
#: A request body of the runtime contract.
API_BODY_MAX: Final = 1 * MIB
#: Problems that an error lists: a document of rubbish has one in every entry.
PROBLEMS_MAX: Final = 100
#: Characters of a log record: a guest may print for ever without a line end.
LOG_TEXT_MAX: Final = 64 * KIB
#: An ``Idempotency-Key``.
KEY_MAX: Final = 255
#: Clones that wait in one warm pool.
WARM_MAX: Final = 1000
#: Seconds that a caller may give a guest to power down, and those that it gets where the caller says nothing.
STOP_TIMEOUT_MAX: Final = 86400
STOP_TIMEOUT_DEFAULT: Final = 30
#: What a caller may ask for as the memory of an instance, at least.
MEMORY_MIN: Final = 16 * MIB

RAM_MIN: Final = 1 * MIB
RAM_MAX: Final = 1 * TIB
RAM_PAGE: Final = 4096
RAM_CHUNK_PAGES: Final = 16
RAM_CHUNK_PAGES_MAX: Final = 1024
#: Index entries: whoever restores holds the index in memory. 256 GiB of memory in chunks of RAM_CHUNK_PAGES.
RAM_CHUNKS_MAX: Final = 4 * MIB
RAM_HEADER_MAX: Final = 1 * MIB
#: Devices, and CPU flags, of a RAM snapshot's header.
RAM_LIST_MAX: Final = 1024
RAM_STATE_MAX: Final = 64 * MIB
#: Recipients of an encrypted RAM snapshot.
RAM_RECIPIENTS_MAX: Final = 16
#: Ancestors of a diff snapshot. (Ours get fewer: ``ovms.memory.chain.PARENTS``.)
RAM_PARENTS_MAX: Final = 16
VCPUS_MAX: Final = 255
