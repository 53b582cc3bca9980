"""Run by ``make interop`` alone, in an environment that has the original libraries: one that is missing is an error."""

import warnings

import pytest


@pytest.fixture(autouse=True)
def quiet():
    """Deprecations inside the originals are theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
