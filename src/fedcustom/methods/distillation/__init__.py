"""Knowledge distillation: clients send predictions on public texts; no weights travel."""
