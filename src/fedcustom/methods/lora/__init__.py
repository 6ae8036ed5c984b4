"""LoRA and its federated variants."""
