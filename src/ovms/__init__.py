"""ovms: the reference implementation of the Open Virtual Machine Spec (OVMS)."""

__version__ = "0.1.0.dev0"
