"""Settings of hypothesis, and the proof that no test uses the network."""

import os

import no_network
import pytest
from hypothesis import HealthCheck, settings

# A slow or busy machine must not decide whether a test passes.
settings.register_profile(
    "kdlib",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("kdlib")

no_network.install()


@pytest.fixture(autouse=True)
def no_connection_leaves_this_machine():
    """Fail a test that tried, also where the code under test swallowed the refusal."""
    yield
    tried = list(no_network.attempts)
    no_network.attempts.clear()
    assert not tried, f"the test tried to reach {', '.join(tried)}"
