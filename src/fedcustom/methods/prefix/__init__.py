"""Prefix-tuning on keys and values, with rules for merging prefixes (mean, matching, stacking)."""
