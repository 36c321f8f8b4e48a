"""Fills one feature cache with all processes and notes who encoded what; started by `test_feature_cache.py`."""

import sys
from pathlib import Path

from accelerate import PartialState
from test_feature_cache import numbered

from pvlf_hf.commands.arguments import leave
from pvlf_hf.digests import sequence_digest
from pvlf_hf.training.feature_cache import FeatureCache

if __name__ == "__main__":
    folder, encoded = Path(sys.argv[1]), []
    rank = PartialState(cpu=True).process_index

    def encode(places):
        encoded.extend(places)
        return numbered(places)

    cache = FeatureCache(folder, "model")
    digests = [sequence_digest(str(n)) for n in range(21)]
    cache.fill(digests, encode, 4, "samples", progress=False)
    assert all(name in cache for name in digests)  # every process sees what the other wrote
    (folder / f"rank{rank}.txt").write_text(" ".join(map(str, encoded)))
    leave()
