from __future__ import annotations

import pytest

from thimble.training.panel import Panel


def test_time_left_is_known_from_the_first_record_on() -> None:
    record = {
        "step": 10,
        "loss": 7.0,
        "learning_rate": 0.1,
        "grad_norm": 1.0,
        "tokens_per_second": 1.0,
        "seconds": 20.0,
    }
    panel = Panel("a run", 100, {})
    assert panel.left() == 0
    panel.trained(record)
    assert panel.left() == pytest.approx(180)
