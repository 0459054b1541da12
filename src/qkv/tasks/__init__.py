"""What runs learn, one file each."""

from qkv.tasks.classes import ClassDataConfig
from qkv.tasks.described import DescribedDataConfig
from qkv.tasks.documents import DataConfig
from qkv.tasks.evaluation import Evaluation, Measure, Report, evaluate
from qkv.tasks.masked import MaskedDataConfig
from qkv.tasks.pairs import PairDataConfig
from qkv.tasks.task import Asked, Recipe, SampleConfig, Start, Task, TaskConfig, task_named, task_of
