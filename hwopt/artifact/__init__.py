"""The bundle that ships: writing it, reading it and running it."""

from hwopt.artifact.bundle import check_destination
from hwopt.artifact.manifest import package_versions
from hwopt.artifact.running import Artifact, write_artifact

__all__ = ["Artifact", "check_destination", "package_versions", "write_artifact"]
