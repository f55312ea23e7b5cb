"""The steps as Kubeflow components, one file a step."""

from components.align import align
from components.cluster import cluster
from components.convert import convert
from components.evaluate import evaluate
from components.ground import ground
from components.prepare import prepare
from components.pretrain import pretrain
from components.publish import publish
from components.weigh import weigh

__all__ = ["align", "cluster", "convert", "evaluate", "ground", "prepare", "pretrain", "publish", "weigh"]
