"""What reading a corpus in the store costs: seconds of audio a second of the loader's batches, here and from there.

    sonorant store shard artifacts/corpus artifacts/streamed  # $SONORANT_STORE and the AWS_ variables say where
    OMP_NUM_THREADS=1 python benchmarks/streaming.py --here artifacts/corpus --there artifacts/streamed

Each round loads an epoch of the train split from both, in turn, with params.yaml's batches; nothing is learned from
them, so the loader is all that works. The batches must be the same to the bit. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import closing
from pathlib import Path

from sonorant.config import PretrainConfig
from sonorant.data.batching import Cursor, Loader
from sonorant.data.corpus import read_corpus
from sonorant.params import parse_section, read_params


def load_epoch(corpus: Path, config: PretrainConfig) -> tuple[float, float, list[int]]:
    """Seconds it took, seconds of audio, and a hash of each batch's samples."""
    loader = Loader(read_corpus(corpus, "train"), None, config.batching, config.masking, config.seed)
    start, seconds, hashes = time.perf_counter(), 0.0, []
    with closing(loader.updates(Cursor())) as updates:
        for batches, after in updates:
            seconds += sum(batch.seconds for batch in batches)
            hashes += [hash(batch.waves.numpy().tobytes()) for batch in batches]
            if after.epoch:
                break
        took = time.perf_counter() - start
    return took, seconds, hashes


def main() -> None:
    """Load from both in turn, and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--here", type=Path, required=True)
    parser.add_argument("--there", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path("params.yaml"))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    config = parse_section("pretrain", PretrainConfig, read_params([given.config])["pretrain"])
    speeds: dict[str, list[float]] = {"here": [], "there": []}
    print(f"{'round':>5} {'here':>10} {'there':>10}   seconds of audio a second")
    for number in range(1, given.rounds + 1):
        found = {name: load_epoch(getattr(given, name), config) for name in speeds}
        if found["here"][2] != found["there"][2]:
            raise SystemExit(
                f"{given.there}: found other batches than of {given.here}, wanted the same: shard it again"
            )
        for name, (took, seconds, _) in found.items():
            speeds[name].append(seconds / took)
        print(f"{number:>5} {speeds['here'][-1]:>10.0f} {speeds['there'][-1]:>10.0f}", flush=True)
    medians = {name: round(statistics.median(values)) for name, values in speeds.items()}
    ratio = statistics.median(b / a for a, b in zip(speeds["here"], speeds["there"], strict=True))
    rows = {"audio_seconds_a_second": medians, "ratios": {"there/here": round(ratio, 3)}}
    print(json.dumps({"benchmark": "streaming", **rows}))


if __name__ == "__main__":
    main()
