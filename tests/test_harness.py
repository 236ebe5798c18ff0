"""`tests/stress/harness.py`: a case that raises or ends its process is reported, others go on."""

import os

import harness


class Cases(harness.Cases):
    """Cases 1 and 3 go wrong."""

    def run(self, seed: int) -> str:
        if seed == 1:
            raise ValueError("one")
        if seed == 3:
            os._exit(7)
        return "even" if seed % 2 == 0 else "odd"


def test_failures_are_reported():
    ended, wrong = harness.run(Cases, range(6), minutes=1)
    assert ended == {"even": 3, "WRONG": 1, "odd": 1}
    raised, died = wrong
    assert raised.startswith("case 1: ") and raised.endswith("ValueError: one\n")
    assert died == "case 3: the process ended with 7"
