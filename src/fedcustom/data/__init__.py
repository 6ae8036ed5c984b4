"""Examples: sources, templates, public sets, partitions over clients, perturbed texts, token batches."""
