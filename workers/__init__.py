"""The GPU process: takes jobs from the broker, batches them step by step, gives pictures back."""
