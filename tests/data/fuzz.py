"""How property tests of this folder are run: the same examples every time, no clock, nothing written."""

from hypothesis import HealthCheck, settings

fuzz = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
