"""Sources of examples, partitions over clients and tokenised batches."""
