"""What can go wrong with models and their files."""


class LoadError(Exception):
    """A model or LoRA that can't be loaded: the message names the model, the source or file, and the reason."""
