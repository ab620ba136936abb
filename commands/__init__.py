"""The groups of subcommands that `cli.py` mounts; each imports its side lazily."""
