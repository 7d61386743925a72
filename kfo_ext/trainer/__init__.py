"""Meta-training: configuration, trainer, evaluation."""

from typing import TYPE_CHECKING

from kfo_ext.lazy import lazily

if TYPE_CHECKING:
    from .config import Config
    from .evaluation import Evaluation, Interval, evaluate, mean_interval, paired_difference
    from .export import export_run, from_pretrained
    from .loop import Outcome, Trainer
    from .run_evaluation import RunScore, compare_runs, compare_scores, evaluate_run, load_learner

__all__ = [
    "Config",
    "Evaluation",
    "Interval",
    "Outcome",
    "RunScore",
    "Trainer",
    "compare_runs",
    "compare_scores",
    "evaluate",
    "evaluate_run",
    "export_run",
    "from_pretrained",
    "load_learner",
    "mean_interval",
    "paired_difference",
]

__getattr__, __dir__ = lazily(
    globals(),
    {
        "config": ["Config"],
        "evaluation": ["Evaluation", "Interval", "evaluate", "mean_interval", "paired_difference"],
        "export": ["export_run", "from_pretrained"],
        "loop": ["Outcome", "Trainer"],
        "run_evaluation": ["RunScore", "compare_runs", "compare_scores", "evaluate_run", "load_learner"],
    },
)
