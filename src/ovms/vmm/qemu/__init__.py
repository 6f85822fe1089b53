"""QEMU: ``qemu-system-x86_64`` with the versioned ``pc`` machine."""
