"""``python -m ovms.cli``."""

from ovms.cli.entry import entry

entry()
