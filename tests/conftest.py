"""Every run of the suite draws the same examples, and a busy machine fails no test for being slow."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("same-every-time", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same-every-time")
