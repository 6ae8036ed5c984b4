"""LoRA and its federated variants (FFA, FLoRA, FedEx, FlexLoRA, HetLoRA, Fed-SB and others)."""
