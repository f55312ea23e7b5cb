"""Self-supervised speech representations: data in, embeddings and unit tokens out."""

__version__ = "0.1.0"
