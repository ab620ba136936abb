"""People who type at live sockets: `python -m benchmarks.typing`."""
