"""kdlib: knowledge distillation for language models, proven right."""

__version__ = "0.1.0"
