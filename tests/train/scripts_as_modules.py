"""Scripts of examples/ and tools/ as modules, for tests that call their functions in this process."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def load_script(path: str) -> Any:
    """A new module of the script at ``path`` below the repository's root, without running its ``__main__`` part."""
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(f"{file.stem}_script", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and tyro look their annotations up there
    spec.loader.exec_module(module)
    return module
