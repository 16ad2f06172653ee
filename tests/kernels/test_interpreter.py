"""The Triton kernels under Triton's interpreter against the references in float64: outputs, gradients, canaries."""

from __future__ import annotations

import interpreted_cases
import pytest
from interpreter_worker import NO_TRITON, run_cases

pytestmark = pytest.mark.skipif(bool(NO_TRITON), reason=NO_TRITON)


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return run_cases(interpreted_cases.__file__)


def test_every_case_ran(results: dict[str, str]) -> None:
    assert list(results) == list(interpreted_cases.CASES) and len(results) > 100


@pytest.mark.parametrize("name", list(interpreted_cases.CASES))
def test_triton_equals_the_reference(name: str, results: dict[str, str]) -> None:
    assert not results[name], results[name]
