"""The engine in a thread or in a process: `python -m benchmarks.process`."""
