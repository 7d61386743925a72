"""Task families: the sources of few-shot tasks.

Your own tasks need no family: `TaskBatch.of` joins tensors, `FewShot` accepts a torch data set or a list of tensors,
one per class, and learners accept any TaskBatch. A class with `sample(index, tasks)` is a family like those in
FAMILIES.
"""

from typing import TYPE_CHECKING

from kfo_ext.lazy import lazily

if TYPE_CHECKING:
    from kfo_ext.tasks.batch import Examples, TaskBatch, TaskFamily, generator_for
    from kfo_ext.tasks.checks import SPLITS
    from kfo_ext.tasks.datasets.cifar_fs import CifarFs
    from kfo_ext.tasks.datasets.csv_images import CsvImages
    from kfo_ext.tasks.datasets.folders import Folders
    from kfo_ext.tasks.datasets.omniglot import Omniglot, download_omniglot
    from kfo_ext.tasks.few_shot import FewShot
    from kfo_ext.tasks.images import ImageClasses
    from kfo_ext.tasks.options import FamilyOptions
    from kfo_ext.tasks.stream import batches
    from kfo_ext.tasks.synthetic.glyphs import Glyphs
    from kfo_ext.tasks.synthetic.linear import Linear
    from kfo_ext.tasks.synthetic.logistic import Logistic
    from kfo_ext.tasks.synthetic.sinusoid import Sinusoid
    from kfo_ext.tasks.table import FAMILIES, Family, make_family

__all__ = [
    "FAMILIES",
    "SPLITS",
    "CifarFs",
    "CsvImages",
    "Examples",
    "Family",
    "FamilyOptions",
    "FewShot",
    "Folders",
    "Glyphs",
    "ImageClasses",
    "Linear",
    "Logistic",
    "Omniglot",
    "Sinusoid",
    "TaskBatch",
    "TaskFamily",
    "batches",
    "download_omniglot",
    "generator_for",
    "make_family",
]

__getattr__, __dir__ = lazily(
    globals(),
    {
        "batch": ["Examples", "TaskBatch", "TaskFamily", "generator_for"],
        "checks": ["SPLITS"],
        "datasets.cifar_fs": ["CifarFs"],
        "datasets.csv_images": ["CsvImages"],
        "datasets.folders": ["Folders"],
        "datasets.omniglot": ["Omniglot", "download_omniglot"],
        "few_shot": ["FewShot"],
        "images": ["ImageClasses"],
        "options": ["FamilyOptions"],
        "stream": ["batches"],
        "synthetic.glyphs": ["Glyphs"],
        "synthetic.linear": ["Linear"],
        "synthetic.logistic": ["Logistic"],
        "synthetic.sinusoid": ["Sinusoid"],
        "table": ["FAMILIES", "Family", "make_family"],
    },
)
