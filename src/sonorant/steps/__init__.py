"""The steps of the workflow, in order. Importing them loads no torch: heavy imports are inside the functions."""

from sonorant.steps.align import align
from sonorant.steps.cluster import cluster
from sonorant.steps.evaluate import evaluate
from sonorant.steps.ground import ground
from sonorant.steps.prepare import convert, prepare
from sonorant.steps.pretrain import pretrain
from sonorant.steps.publish import publish
from sonorant.steps.weigh import weigh

STEPS = {step.name: step for step in (prepare, cluster, pretrain, ground, align, publish, evaluate)}
SHARED = {step.name: step for step in (convert,)}
"""What does a part of a step's work, where many machines share it."""

__all__ = [
    "SHARED",
    "STEPS",
    "align",
    "cluster",
    "convert",
    "evaluate",
    "ground",
    "prepare",
    "pretrain",
    "publish",
    "weigh",
]
