"""The object store: artifacts under their digests, and the aliases that say which of them is in use."""

from sonorant.store.shelf import Artifact, Store

__all__ = ["Artifact", "Store"]
