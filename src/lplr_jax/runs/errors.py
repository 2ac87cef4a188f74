"""What may be wrong with the folder of a run."""


class DirectoryInUseError(Exception):
    """Another process writes to the directory."""


class ConfigMismatchError(ValueError):
    """The directory holds a run of another config."""
