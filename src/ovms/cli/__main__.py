"""``python -m ovms.cli``."""

import sys

from ovms.cli.main import main

sys.exit(main())
