"""The version, in its one place: the build reads this file without importing the package."""

__version__ = "0.1.0.dev0"
