"""Key-value pairs in front of attention, with slots beside the feed-forward networks."""
