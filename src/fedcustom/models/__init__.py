"""Base models (hub id, folder or built-in): loading, pooling, forward passes, inference."""

from .quiet import hear_errors_alone

hear_errors_alone()  # before anything imports transformers, which imports these libraries
