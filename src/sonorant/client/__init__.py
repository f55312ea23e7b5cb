"""The embedding server from afar: needs the extra `client`, and no torch.

client = Client("http://127.0.0.1:8000")     # the key, where one is needed, from $SONORANT_API_KEY
frames = client.embed("a.flac", layer=2)     # (T, D), one frame every 20 ms
units, durations_ms = client.units("a.flac", deduplicate=True)
images = client.search("a.flac", top=5)      # what a grounded model finds, the best first
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sonorant.client.service import Answer, Client, FoundImage, ServiceError

__all__ = ["Answer", "Client", "FoundImage", "ServiceError"]


def __getattr__(name: str) -> Any:
    """The names above when they are asked for: the command line is made without the extra."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from sonorant.client import service

    return getattr(service, name)
