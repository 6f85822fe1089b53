"""The ``ovm`` command line. Nothing else of ovms knows that it exists."""
