"""Knowledge distillation: models stay where they are; what they say of public texts travels."""
