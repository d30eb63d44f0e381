"""Three top-level folders form one import package, ``kvmesh`` (see docs/architecture.md, "Folders")."""

from setuptools import find_packages, setup


def packages(folder: str, package: str) -> list[str]:
    """The import names of `folder` and of the packages below it."""
    return [package, *(f"{package}.{name}" for name in find_packages(folder))]


setup(
    packages=packages("mesh", "kvmesh")
    + packages("transport", "kvmesh.transport")
    + packages("discovery", "kvmesh.discovery"),
    package_dir={"kvmesh": "mesh", "kvmesh.transport": "transport", "kvmesh.discovery": "discovery"},
    package_data={"kvmesh": ["py.typed"]},
)
