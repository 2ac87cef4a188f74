"""Matrix products and convolutions of fixed-point numbers."""

import math
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lplr_jax.proofs import fixed as fx
from lplr_jax.proofs.fixed import Fixed

_STACK_ENTRIES = 2**25
"""Entries of patches that are held at a time."""


def dot_general(settings: dict[str, Any], ins: list[Any], _: int) -> Fixed:
    """Return the product that `lax.dot_general` means; arguments as for every rule of `primitives.RULES`."""
    a, b = ins
    (of_a, of_b), (batch_a, batch_b) = settings["dimension_numbers"]
    free_a = [axis for axis in range(len(a.shape)) if axis not in (*of_a, *batch_a)]
    free_b = [axis for axis in range(len(b.shape)) if axis not in (*of_b, *batch_b)]
    batch, m = [a.shape[axis] for axis in batch_a], [a.shape[axis] for axis in free_a]
    n, terms = [b.shape[axis] for axis in free_b], math.prod(a.shape[axis] for axis in of_a)

    def form(stack: np.ndarray, other: np.ndarray) -> np.ndarray:
        g, axes = stack.shape[0], [axis + 1 for axis in (*batch_a,)]
        order = [*axes, 0, *(axis + 1 for axis in free_a), *(axis + 1 for axis in of_a)]
        left = stack.transpose(order).reshape(math.prod(batch), g * math.prod(m), terms)
        right = other.transpose(*batch_b, *of_b, *free_b).reshape(math.prod(batch), terms, math.prod(n))
        out = np.matmul(left, right).reshape(*batch, g, *m, *n)
        return np.moveaxis(out, len(batch), 0)

    return fx.contract(a, b, form, terms)


def convolution(settings: dict[str, Any], ins: list[Any], _: int) -> Fixed:
    """Return the convolution that `lax.conv_general_dilated` means; arguments as for every rule."""
    a, b = ins
    numbers = settings["dimension_numbers"]
    kernel = [b.shape[axis] for axis in numbers.rhs_spec]
    groups, batches = settings["feature_group_count"], settings["batch_group_count"]
    window, inputs, outputs = kernel[2:], kernel[1], kernel[0]
    strides, spread = settings["window_strides"], settings["rhs_dilation"]
    terms = inputs * math.prod(window)

    def patches(stack: np.ndarray) -> np.ndarray:
        x = stack.transpose(0, *(axis + 1 for axis in numbers.lhs_spec))
        for axis, step in enumerate(settings["lhs_dilation"], start=3):
            if step > 1:
                shape = list(x.shape)
                shape[axis] = (shape[axis] - 1) * step + 1
                wide = np.zeros(shape)
                wide[(slice(None),) * axis + (slice(None, None, step),)] = x
                x = wide
        padding = settings["padding"]
        x = np.pad(x, [(0, 0)] * 3 + [(max(low, 0), max(high, 0)) for low, high in padding])
        cropped = [slice(max(-low, 0), x.shape[i + 3] - max(-high, 0)) for i, (low, high) in enumerate(padding)]
        x = x[(slice(None),) * 3 + tuple(cropped)]
        reach = [(size - 1) * step + 1 for size, step in zip(window, spread, strict=True)]
        views = sliding_window_view(x, reach, axis=tuple(range(3, x.ndim)))
        inner = tuple(slice(None, None, step) for step in spread)
        return views[(slice(None),) * 3 + tuple(slice(None, None, step) for step in strides) + inner]

    def form(stack: np.ndarray, other: np.ndarray) -> np.ndarray:
        weight = other.transpose(numbers.rhs_spec)
        size = max(1, _STACK_ENTRIES // max(1, stack[0].size * math.prod(window)))
        found = [once(stack[i : i + size], weight) for i in range(0, stack.shape[0], size)]
        return np.concatenate(found)

    def once(stack: np.ndarray, weight: np.ndarray) -> np.ndarray:
        view = patches(stack)
        g, n, c = view.shape[:3]
        places = view.shape[3 : 3 + len(window)]
        d = len(window)
        parts = max(groups, batches)
        # (group, stack, batch, positions, terms)
        if batches > 1:
            view = view.reshape(g, batches, n // batches, c, *places, *window)
            order = (1, 0, 2, *range(4, 4 + d), 3, *range(4 + d, 4 + 2 * d))
            n //= batches
        else:
            view = view.reshape(g, n, groups, c // groups, *places, *window)
            order = (2, 0, 1, *range(4, 4 + d), 3, *range(4 + d, 4 + 2 * d))
        left = view.transpose(order).reshape(parts, -1, terms)
        right = weight.reshape(parts, outputs // parts, terms).transpose(0, 2, 1)
        out = np.matmul(left, right).reshape(parts, g, n, *places, outputs // parts)
        # (stack, batch, features, positions), then as it is asked for
        out = out.transpose(1, 2, 0, 3 + d, *range(3, 3 + d)).reshape(g, n, outputs, *places)
        back = np.argsort(numbers.out_spec)
        return out.transpose(0, *(axis + 1 for axis in back))

    return fx.contract(a, b, form, terms)
