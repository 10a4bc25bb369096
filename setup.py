"""Puts the folder `configs` into the wheel, as `mhe_dist/configs`; the rest: pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["launcher*", "mhe_dist*", "pipelines*"]),
        "mhe_dist.configs",
    ],
    package_dir={"mhe_dist.configs": "configs"},
    package_data={
        "": ["*.j2", "*.css", "*.js"],  # of pages, in whichever room; jobs get the same
        "mhe_dist.configs": ["*.yaml", "schema.json"],
    },
)
