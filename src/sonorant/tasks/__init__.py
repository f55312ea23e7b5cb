"""What pulls on the encoder: one file per task, named as recipes name it."""

from __future__ import annotations

from collections.abc import Callable

from sonorant.config import AlignConfig, EncoderConfig, GroundConfig, TrainConfig
from sonorant.tasks.alignment import Alignment
from sonorant.tasks.codebooks import Codebooks
from sonorant.tasks.contrast import Contrast
from sonorant.tasks.diversity import Diversity
from sonorant.tasks.grounding import Grounding
from sonorant.tasks.magnitude import Magnitude
from sonorant.tasks.spectrum import Spectrum
from sonorant.tasks.task import Task
from sonorant.tasks.teacher import Regression
from sonorant.tasks.units import Units
from sonorant.tasks.utterance import Utterance
from sonorant.tasks.waveform import Waveform


def build_tasks(config: TrainConfig, encoder: EncoderConfig, num_units: int) -> dict[str, Task]:
    """A task for every name that has a weight above zero at some time, on an encoder of this shape."""
    quantiser, target_layers = config.quantiser, config.teacher.targets(encoder.num_layers)
    num_target_dims = quantiser.dim if config.contrast.targets == "quantised" else encoder.dim
    builders: dict[str, Callable[[], Task]] = {
        "units": lambda: Units(encoder.dim, num_units, config.units),
        "teacher": lambda: Regression(encoder.dim),
        "codebooks": lambda: Codebooks(encoder.dim, target_layers, config.codebooks),
        "contrast": lambda: Contrast(
            encoder.dim, num_target_dims, (quantiser.num_groups, quantiser.num_codes), config.contrast
        ),
        "diversity": Diversity,
        "magnitude": Magnitude,
        "waveform": lambda: Waveform(encoder.stem_widths, config.waveform.channels),
        "spectrum": lambda: Spectrum(encoder.dim, encoder.num_layers, config.spectrum),
        "utterance": lambda: Utterance(encoder.dim, config.utterance),
    }
    if isinstance(config, GroundConfig):
        builders["grounding"] = lambda: Grounding(config.grounding)
    if isinstance(config, AlignConfig):
        builders["alignment"] = lambda: Alignment(encoder.dim, config.alignment)
    return {name: build() for name, build in builders.items() if name in config.tasks}
