"""A JSON document with one value changed, wherever in it that stands."""

import copy


def leaves(value, path=()):
    """Each value that holds no others, with the keys that lead to it."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def another(value):
    """Another number or text of the same kind."""
    return value + 1 if isinstance(value, int | float) else f"{value[:-1]}{'0' if value[-1:] != '0' else '1'}"


def edited(document, path, value):
    """A copy with this value at the end of the path."""
    found = copy.deepcopy(document)
    at = found
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return found
