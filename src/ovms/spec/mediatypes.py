"""The media types and annotation names of OVMS and OCI (fixed points: others build on them)."""

from __future__ import annotations

from typing import Final

OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_EMPTY: Final = "application/vnd.oci.empty.v1+json"

#: The OVMS manifest; also the ``artifactType`` of the OCI manifest around it.
MANIFEST: Final = "application/vnd.ovms.manifest.v1+json"
KERNEL: Final = "application/vnd.ovms.kernel.v1"
INITRD: Final = "application/vnd.ovms.initrd.v1"
#: The draft's choice for disk layers, odd as it is; the real format is said by :data:`DISK_FORMAT_ANNOTATION`.
DISK_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
DISK_LAYER_OVMS: Final = "application/vnd.ovms.disk.layer.v1"
DISK_LAYERS_READ: Final = frozenset({DISK_LAYER, DISK_LAYER_OVMS})
#: What may stand after a disk layer's type: the layer is compressed as a whole.
DISK_LAYER_SUFFIXES: Final = ("+gzip", "+zstd")
RAM_SNAPSHOT_LZ4: Final = "application/vnd.ovms.ramsnap.v1+lz4"
RAM_SNAPSHOT_ZSTD: Final = "application/vnd.ovms.ramsnap.v1+zstd"
#: What stands behind either where device state and memory are encrypted.
RAM_ENCRYPTED_SUFFIX: Final = "+age"
#: All that a RAM snapshot's layer may have.
RAM_SNAPSHOTS: Final = frozenset(
    media_type + suffix for media_type in (RAM_SNAPSHOT_LZ4, RAM_SNAPSHOT_ZSTD) for suffix in ("", RAM_ENCRYPTED_SUFFIX)
)
BOOTSTRAP: Final = "application/vnd.ovms.bootstrap.config.v1+json"

DISK_FORMAT_ANNOTATION: Final = "ovms.format"
#: On the RAM snapshot's descriptor: the digest of everything before its chunks, so that this part can be fetched and
#: checked by itself.
RAM_CONTROL_ANNOTATION: Final = "ovms.ramsnap.control"
RAM_CONTROL_SIZE_ANNOTATION: Final = "ovms.ramsnap.control-size"

REF_NAME_ANNOTATION: Final = "org.opencontainers.image.ref.name"
TITLE_ANNOTATION: Final = "org.opencontainers.image.title"
VERSION_ANNOTATION: Final = "org.opencontainers.image.version"
CREATED_ANNOTATION: Final = "org.opencontainers.image.created"
