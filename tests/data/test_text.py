"""Text as tokens: what is read, what comes after what, and which contexts are the same."""

import hashlib

import numpy as np
import pytest

from lplr_jax.data import DataError, load_text
from lplr_jax.experiments.next_token import causal_floor


@pytest.fixture
def text(tmp_path):
    """Two sequences of three bytes and the one after them; the rest is not used, and lines end as those of Windows."""
    path = tmp_path / "own.txt"
    path.write_bytes(b"ab\r\nabab\r\nnot used")
    return load_text(n=2, length=3, data=path)


def test_tokens_are_bytes_and_what_follows_them(text):
    assert text.vocabulary == b"\nab"
    assert text.x.tolist() == [[1, 2, 0], [1, 2, 1]]
    assert text.y.tolist() == [[2, 0, 1], [2, 1, 2]]
    assert text.checksum == f"sha256:{hashlib.sha256(b'ab' + bytes([10]) + b'abab').hexdigest()}"
    assert (text.n, text.length, text.c) == (2, 3, 3)
    assert text.provenance()["subject"] == "bytes 0 to 6 of the text"
    with pytest.raises(ValueError, match="read-only"):
        text.x[0, 0] = 2


def test_contexts_and_the_floor_of_causal_functions(text):
    # "a" and "ab" come twice; what follows "ab" differs: one half each, of two positions out of six.
    assert text.contexts().tolist() == [0, 1, 2, 0, 1, 3]
    assert causal_floor(text, "squared") == pytest.approx(2 * (0.5 * (0.25 + 0.25)) / 6)
    assert causal_floor(text, "softmax_cross_entropy") == pytest.approx(2 * np.log(2) / 6)


def test_the_text_that_comes_along_is_english_and_named():
    text = load_text(n=10, length=20)
    words = bytes(text.vocabulary[token] for token in text.x.reshape(-1)).decode()
    assert "The 20 newsgroups dataset comprises around 18000 newsgroups posts" in words
    assert text.source.startswith("scikit-learn ")
    assert text.provenance()["licence"] == "BSD-3-Clause"
    # The bytes of the locked version; those that later versions ship may differ, and their records say so.
    assert text.checksum == "sha256:09a3028a391335682a5ad32db7f10a604959c880d68e2549c73ec74792f0f1a2"


def test_a_text_that_cannot_be_used_is_refused(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes(b"aaaaaaaa")
    with pytest.raises(DataError, match="the first 5 bytes of the text are all equal"):
        load_text(n=2, length=2, data=path)
    with pytest.raises(
        DataError, match="2 sequences of 4 bytes need 9 bytes, a text of one's own has 8; ask for fewer"
    ):
        load_text(n=2, length=4, data=path)
    with pytest.raises(DataError, match="cannot be read"):
        load_text(n=2, length=4, data=tmp_path)


def test_pl_with_the_floor_of_the_contexts(text):
    """½‖∇L‖² >= (λ_P/s)(L - L_P) for a linear function of the context, and λ_min of all is 0; docs/theory.md."""
    rng, v, s = np.random.default_rng(0), text.c, 6.0
    contexts = text.contexts()
    of_contexts = rng.normal(size=(contexts.max() + 1, v, 40))
    jacobian = of_contexts[contexts].reshape(-1, 40)
    y = np.eye(v)[text.y.reshape(-1)].reshape(-1)
    least = np.linalg.eigvalsh(of_contexts.reshape(-1, 40) @ of_contexts.reshape(-1, 40).T)[0]
    assert np.linalg.eigvalsh(jacobian @ jacobian.T)[0] == pytest.approx(0, abs=1e-12)
    floor = causal_floor(text, "squared")
    fit = np.linalg.lstsq(jacobian, y, rcond=None)[0]
    for theta in (rng.normal(size=40), fit, fit + 1e-3 * rng.normal(size=40)):
        r = jacobian @ theta - y
        loss, slope = r @ r / (2 * s), jacobian.T @ r / s
        assert 0.5 * slope @ slope >= least / s * (loss - floor) * (1 - 1e-9) - 1e-14
    assert np.sum((jacobian @ fit - y) ** 2) / (2 * s) == pytest.approx(floor), "40 parameters reach the floor"
