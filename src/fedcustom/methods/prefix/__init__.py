"""Prefix-tuning on keys and values, and the rules by which clients' prefixes are merged."""
