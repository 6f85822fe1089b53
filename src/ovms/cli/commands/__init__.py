"""One thin file for each command: ``add_arguments(parser)`` and ``run(args, context) -> exit code``."""
