"""The workflow on Kubeflow Pipelines: the graph, and the commands that compile, run and submit it."""
