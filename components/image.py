"""The image every step runs in: $SONORANT_IMAGE when the pipeline is compiled, best given by digest."""

import os

from sonorant import __version__

IMAGE = os.environ.get("SONORANT_IMAGE", f"sonorant-train:{__version__}")
