"""How the built-in language models are pretrained: corpus, model, optimisers, training, export."""
