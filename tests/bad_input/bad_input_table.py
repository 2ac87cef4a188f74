"""All bad inputs: calls of the library, files, command lines."""

import importlib


def cases():
    """Return every case; names are distinct."""
    found = []
    for module in ("bad_input_calls", "bad_input_files", "bad_input_commands"):
        try:
            found += importlib.import_module(module).cases()
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    return found
