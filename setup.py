"""Everything that is not code lives in pyproject.toml."""

from setuptools import setup

setup()
