"""Exports of finished runs: a copy, a merged or a distilled model, with a model card; uploads to the hub."""
