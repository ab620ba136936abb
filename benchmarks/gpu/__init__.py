"""The real architectures on one GPU: `python -m benchmarks.gpu`."""
