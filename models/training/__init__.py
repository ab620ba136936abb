"""Training of the miniature model: data, autoencoders, teacher, LCM-LoRA distillation, evaluation, export."""
