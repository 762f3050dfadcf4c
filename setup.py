"""Packaging lives in pyproject.toml; nothing is compiled at install.

The kernels travel as source and are compiled at first use (see
dis_ssm.ops.cpu), so one pure-Python wheel serves every platform and every torch.
"""

from setuptools import setup

setup()
