"""RAM snapshots: taking them from a paused VM, storing them, and making them ready to be mapped."""
