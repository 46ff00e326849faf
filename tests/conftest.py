"""What must be set before anything heavy is imported.

No test may need a network: what looks for one fails at once instead of waiting for it. Threads that
wait for each other sleep: spinning, they would take the cores from whatever else runs.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# How long an example takes says how busy a machine is, and nothing about the code.
settings.register_profile("attune", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("attune")
