"""These tests run only in ``make interop``, whose environment has the original libraries; a missing one is an error."""

import warnings

import pytest


@pytest.fixture(autouse=True)
def quiet():
    """Ignore deprecation warnings of the originals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
