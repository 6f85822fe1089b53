"""Artifacts: local files ↔ OVMS manifest ↔ OCI artifact in the local store."""
