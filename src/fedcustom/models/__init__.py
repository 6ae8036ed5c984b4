"""Base models: loading, and what they predict."""
