"""House docstrings for mkdocstrings.

`Example:` is read as `Examples:`, a doctest. A field of a configuration, stated as
`Field(default, description=..., ...)`, is shown with that default and description.
"""

import ast
import re

import griffe

_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


class HouseDocstrings(griffe.Extension):
    """Reads the section `Example:` and the fields of configurations."""

    def on_object(self, *, obj, **arguments):
        """Rename the section in one object's docstring."""
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.M)

    def on_attribute(self, *, attr, **arguments):
        """Take a field's description for its docstring."""
        value = str(attr.value or "")
        if value.startswith("Field("):
            constants = {
                name: str(one.value)
                for name, one in attr.module.members.items()
                if name.isupper()
            }
            attr.value, text = default_and_description(value, constants)
            attr.docstring = griffe.Docstring(text, parent=attr)


def default_and_description(field, constants):
    """Return a field's default and what is said of it, both as text.

    Args:
        field: The field, as it stands in the source.
        constants: What an f-string in it may name, as text.

    Example:
        >>> default_and_description("Field(4, ge=1, description='Blocks.')", {})
        ('4', 'Blocks. At least 1.')
    """
    call = ast.parse(field, mode="eval").body
    facts = {part.arg: part.value for part in call.keywords}
    limits = [
        f"{words} {ast.unparse(facts[name])}"
        for name, words in _LIMITS.items()
        if name in facts
    ]
    said = []
    if "description" in facts:
        text = ast.unparse(facts["description"])
        said.append(eval(text, {"__builtins__": {}}, constants))
    if limits:
        ends = " and ".join(limits)
        said.append(f"{ends[0].upper()}{ends[1:]}.")
    return ast.unparse(call.args[0]), " ".join(said)
