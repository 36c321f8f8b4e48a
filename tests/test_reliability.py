"""The table of RELIABILITY.md equals the tests' declarations and the recorded figures."""

import json

import reliability


def test_reliability_document_equals_recorded_results():
    found = json.loads(reliability.FOUND.read_text())
    table = reliability.DOCUMENT.read_text().split(reliability.START)[1].split(reliability.END)[0]
    assert table.strip() == reliability.render(found).strip(), "run `python tests/reliability.py`"
    for sign in ("**failed**", "**still passes**", "not run yet", "not broken yet"):
        assert sign not in table
