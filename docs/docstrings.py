"""House docstrings for mkdocstrings: `Example:` is read as `Examples:`, a doctest."""

import re

import griffe


class HouseDocstrings(griffe.Extension):
    """Reads the section `Example:` as griffe's own `Examples:`."""

    def on_object(self, *, obj, **arguments):
        """Rename the section in one object's docstring."""
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
