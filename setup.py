"""Shim for tools that still call setup.py. Everything it could say is in pyproject.toml."""

from setuptools import setup

setup()
