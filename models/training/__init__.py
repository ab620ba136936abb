"""Model making: distillation of few-step models, and, in `mini`, the miniatures that ship."""
