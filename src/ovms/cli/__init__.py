"""The ``ovm`` command line. Nothing else of ovms knows that it exists."""

from ovms.cli.main import main

__all__ = ["main"]
