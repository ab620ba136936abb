"""Networks compiled by AOTInductor in a process of their own, kept on disk, and swapped in while a model serves.

A package is code without weights: it holds for every checkpoint and LoRA of the same architecture, and it computes with
the very tensors of the network that runs already.
"""
