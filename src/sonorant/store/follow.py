"""The sidecar of a server: a folder that always holds what an alias stands for."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from sonorant.artifacts import RECORD
from sonorant.store.shelf import Store


def follow(store: Store, reference: str, folder: Path, every: float) -> None:
    """Keep in `folder` the artifact a reference stands for, looking every so many seconds, until the process is ended.

    A new one is fetched beside the folder and takes its place at one instant. Where that fails the folder stays as it
    is, the reason is told once, and it is tried again.
    """
    digest, trouble = "", ""
    while True:
        try:
            wanted = store.resolve(reference)
            if wanted != digest or not (folder / RECORD).is_file():
                store.fetch(reference, folder)
                digest = wanted
                print(f"follow: {folder} is {reference}, {digest}", flush=True)
            elif trouble:
                print(f"follow: {reference} is found again, {digest}", flush=True)
            trouble = ""
        except (ValueError, OSError) as error:
            line = " ".join(str(error).split())
            if line != trouble:
                print(f"follow: {line}; trying again every {every:g} s", file=sys.stderr, flush=True)
            trouble = line
        time.sleep(every)
