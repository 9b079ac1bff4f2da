"""Metrics count what the engine tells of itself."""

from serving.fakes import FakeEngine, FakeStore

from loralab.serving.http.metrics import Metrics


def test_loads_are_timed() -> None:
    metrics = Metrics(FakeEngine(FakeStore(), None))
    for seconds in (0.02, 0.04):
        metrics.observe({"kind": "loaded", "seconds": seconds})
    lines = metrics.text().decode().splitlines()
    assert "loralab_load_seconds_count 2.0" in lines
    assert 'loralab_load_seconds_bucket{le="0.025"} 1.0' in lines
