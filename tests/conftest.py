"""No test may need a network: what looks for one fails at once instead of waiting for it."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
