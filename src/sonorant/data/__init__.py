"""Audio, corpora, the time grid, and how utterances become batches."""
