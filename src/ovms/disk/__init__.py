"""Disk layers: header checks that keep a hostile image from reading the host, new overlays, chains."""
