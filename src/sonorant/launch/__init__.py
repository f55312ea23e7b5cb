"""A step's work handed to other processes: ranks under torchrun here, or the pods of a Kubeflow TrainJob.

Both start the step's own command, `sonorant STEP --config …`, through `sonorant.launch.ranks`. Who is told to stop
(SIGTERM) keeps a checkpoint, and the same command goes on.
"""

from sonorant.launch.work import Work, do_elsewhere, is_elsewhere

__all__ = ["Work", "do_elsewhere", "is_elsewhere"]
