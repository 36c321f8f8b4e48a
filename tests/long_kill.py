"""Long run of `kill.py`."""

import pytest
from test_interruption import kill


@pytest.mark.reliability(
    1,
    "30 kills (`python tests/kill.py --kills 30`) over training, pushing, evaluating, indexing and caching: results "
    "as without kills",
    broken=("src/pvlf_hf/training/atomic_checkpoints.py", "def _save_checkpoint(", "def _not_save_checkpoint("),
)
def test_thirty_killed_runs_resume_bit_equal(figure):
    figure(kill("--kills=30"))
