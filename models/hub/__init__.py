"""Models on the Hugging Face Hub: which files an entry needs, fetching them, and the lock file. Torch-free."""
