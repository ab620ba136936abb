"""diffusers' parts behind the one meaning of models.pipeline, a file per family."""
