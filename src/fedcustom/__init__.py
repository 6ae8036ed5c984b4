"""Customise a large pretrained model with data that stays with its owners."""
