"""Examples: sources, templates, conversations, public sets, partitions, perturbed texts, token batches."""
