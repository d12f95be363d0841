"""How many KV groups of a layer a share stands for, and which layers leave none out.

A model has few KV groups a layer, so a share is rounded to whole ones. The first layers stay dense:
nothing can be known of layer 0's attention before it runs, and what goes wrong in a first layer
goes wrong in all that follow.
"""

DENSE_LAYERS_DEFAULT = 2
LOOKAHEAD_MIN = 1  # with the state that enters a layer it would be too late to stage its groups


def kept_groups(share: float, groups: int) -> int:
    """`share` of `groups`, rounded to whole ones, one at least: 0.67 of 3 are 2."""
    return min(groups, max(1, round(share * groups)))


def kept_fraction(kept: int, groups: int) -> float:
    """A fraction that a drive rounds up to `kept` of `groups`, whatever became of it in floats."""
    return 1.0 if kept == groups else (kept - 0.5) / groups


def kept_by_layer(share: float, groups: int, layers: int, dense_layers: int) -> list[int]:
    """KV groups that each layer keeps; the first `dense_layers`, one at least, keep all."""
    dense = min(layers, max(1, dense_layers))
    return [groups] * dense + [kept_groups(share, groups)] * (layers - dense)
