"""Records and data files that several tests want."""

import numpy as np

from lplr_jax.records import Record


def make(epochs=6, probes=3, **changes):
    arrays = {
        "epoch": np.arange(epochs + 1),
        "loss": np.exp(-0.3 * np.arange(epochs + 1.0)),
        "grad_sq_norm": np.full(epochs + 1, 0.5),
        "drift": np.linspace(0, 1, epochs + 1),
        "probe_epoch": np.linspace(0, epochs, probes).astype(np.int64),
        "ntk_min_eig": np.full(probes, 0.25),
        "loss_scale": np.array(4.0),
        "learning_rate": np.array(0.1),
        "n": np.array(4),
        "c": np.array(1),
        "p": np.array(9),
    }
    arrays.update({name: value for name, value in changes.items() if value is not None})
    for name, value in changes.items():
        if value is None:
            arrays.pop(name, None)
    return Record("mnist", arrays, {"width": 3, "seed": 0}, {"device": "cpu"})


def cifar_like(n, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return images, (np.arange(n) * 7 % 10).astype(np.uint8)


def write_batch(path, images, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    planes = np.moveaxis(images, 3, 1).reshape(len(images), -1)
    path.write_bytes(np.concatenate([labels[:, None], planes], axis=1).astype(np.uint8).tobytes())
    return path


def dealt_by_hand(labels, classes, n_train):
    """The rule of selection as a card dealer plays it: one of each class in turn, past a class that has run out."""
    piles = [[i for i, label in enumerate(labels) if label == k] for k in classes]
    hands = [[] for _ in classes]
    while sum(map(len, hands)) < n_train:
        for pile, hand in zip(piles, hands, strict=True):
            if pile and sum(map(len, hands)) < n_train:
                hand.append(pile.pop(0))
    return [i for hand in hands for i in hand]
