"""A published model in use: embeddings, unit tokens, images. What is measured is what is served.

speech = load(Path("artifacts/model"))
[frames] = speech.embed([read_wave(Path("a.flac"))])   # (T, D), one frame every 20 ms
[units] = speech.units([read_wave(Path("a.flac"))])    # (T,)
frames = speech.embed_long(read_wave(Path("lecture.flac")))   # hours, in bounded memory but for the frames
[found] = speech.search([read_wave(Path("a.flac"))], top=5)   # the images it speaks of, best first

While somebody speaks, the same pieces one by one (`Speech.stream_units` puts them together):

listener, speller = Listener(STREAM), Speller(speech.codebook)
for window, wave in listener.feed(samples):            # and at the end listener.finish()
    units = speller.spell(speech.embed([wave])[0][window.kept])
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from sonorant.config import EncoderConfig
from sonorant.data.audio import Moments, TooLongError, check_wave, measure, read_wave, standardise
from sonorant.data.frames import FRAME_MS, SAMPLE_RATE, Ragged, frames_within, num_frames, pack_waves
from sonorant.data.windows import LONG, STREAM, Cut, Listener, Window
from sonorant.models.codebook import Codebook, Speller
from sonorant.models.encoder import Encoder, num_operations
from sonorant.models.gallery import Found, Gallery, Picture, can_search
from sonorant.models.grounding import Grounder, load_grounder
from sonorant.models.huggingface import from_transformers, load_encoder
from sonorant.models.reduced import at_precision
from sonorant.models.stem import FirstMoments

__all__ = [
    "FRAME_MS",
    "LONG",
    "SAMPLE_RATE",
    "STREAM",
    "Codebook",
    "Cut",
    "EncoderConfig",
    "Found",
    "Gallery",
    "Listener",
    "Moments",
    "Picture",
    "Speech",
    "Speller",
    "TooLongError",
    "Window",
    "check_wave",
    "frames_within",
    "load",
    "load_trained",
    "load_untrained",
    "measure",
    "num_frames",
    "num_operations",
    "read_wave",
]

BATCH_SECONDS = 60.0
LEAST_AGREEMENT = 0.99
"""Of the units of dev speech, the share that must stay the same for a model to be used at a lower precision."""
Wave = NDArray[np.float32]
Frames = NDArray[np.float32]
Units = NDArray[np.int64]
Layer = int | Sequence[float]
"""One layer, or a weight for each from 0 on."""


class Speech:
    """An encoder, the layer it is published for, its codebook, and the digest of the folder it came from.

    Where it was grounded, also what makes a query of an utterance, and the images that the query finds.
    """

    poolings = ("none", "mean")
    """What a request may ask to be made of an utterance's frames."""

    def __init__(
        self,
        encoder: Encoder,
        layer: int,
        codebook: Codebook | None = None,
        about: dict[str, Any] | None = None,
        digest: str | None = None,
        precision: str = "float32",
        grounder: Grounder | None = None,
        gallery: Gallery | None = None,
    ) -> None:
        self.encoder = encoder.eval()
        self.encoder.stem.arrange()
        self.layer, self.codebook, self.about = layer, codebook, about or {}
        self.digest, self.precision = digest, precision
        self.num_layers = encoder.config.num_layers
        self.dim = encoder.config.dim
        self.num_units = codebook.num_units if codebook else 0
        self.grounder, self.gallery = None if grounder is None else grounder.eval(), gallery

    @property
    def config(self) -> EncoderConfig:
        """The encoder's."""
        return self.encoder.config

    @property
    def device(self) -> str:
        """Where it runs."""
        return str(self.encoder.mask_embedding.device)

    def device_bytes(self) -> int:
        """GPU memory that this process holds."""
        device = self.encoder.mask_embedding.device
        return int(torch.cuda.memory_reserved(device)) if device.type == "cuda" else 0

    def embed(
        self, waves: Sequence[Wave], layer: Layer | None = None, moments: Sequence[Moments | None] | None = None
    ) -> list[Frames]:
        """Frames of one layer (default: the published one) of 16 kHz mono waves (S,): (T, D) each.

        num_layers + 1 weights instead of a layer ask for the sum of all layers' frames, each times its weight. A
        wave that is a window of a recording comes with the recording's `moments`, see `measure`.
        A wave's frames do not depend on the others. Raises ValueError where a wave is shorter than one window,
        the layer does not exist or the weights are not as many finite numbers.
        """
        weights = self._weights(self.layer if layer is None else layer)
        return [frames for [frames] in self._states(waves, [weights], moments)]

    def states(self, waves: Sequence[Wave], layers: Sequence[int]) -> list[list[Frames]]:
        """Frames of several layers from one pass: per wave a list of (T, D)."""
        return list(self._states(waves, [self._weights(layer) for layer in layers]))

    def units(self, waves: Sequence[Wave]) -> list[Units]:
        """Unit tokens of the published codebook: (T,) each."""
        codebook = self._wanted_codebook()
        return [codebook.assign(frames) for frames in self.embed(waves)]

    def query(self, waves: Sequence[Wave]) -> Frames:
        """Each wave's vector in the space of images, (B, E): what the gallery is searched with.

        Each is heard as one utterance, however long, and its vector does not depend on the others. Raises ValueError
        where a wave is shorter than one window or the model was not grounded.
        """
        if self.grounder is None:
            raise ValueError("model: found it not grounded, wanted it so to search: publish one that `ground` made")
        for wave in waves:
            check_wave(wave)
        vectors = [np.empty((0, self.grounder.config.dim), np.float32)]
        for batch in batches_of(waves):
            lengths = [len(wave) for wave in batch]
            with torch.inference_mode():
                z = self.encoder.project(self._packed(batch, repeat(None)), lengths)
                led, frames = self.grounder.prepend(z, Ragged.of_samples(lengths))
                states = self.encoder.context(led, frames, self.grounder.layer).states
                vectors.append(self.grounder.speech(states[-1].float(), frames).cpu().numpy())
        return np.concatenate(vectors)

    def search(self, waves: Sequence[Wave], top: int) -> list[list[Found]]:
        """The `top` images that each wave speaks of, best first, or all where there are fewer; ValueError as `query`
        or where no images were published."""
        vectors = self.query(waves)
        if self.gallery is None and not can_search():
            raise ValueError("model: found no module faiss, wanted it to search: pip install 'sonorant[serve]'")
        if self.gallery is None:
            raise ValueError("model: found no images, wanted some to search: publish it with a corpus that has some")
        return list(self.gallery.find(vectors, top))

    def measure(self, wave: Wave) -> Moments | None:
        """What `embed` must know of a recording (S,) to hear its windows as it hears all of it, if anything."""
        return measure(wave, self.encoder.config)

    def embed_long(self, wave: Wave, layer: Layer | None = None, cut: Cut = LONG) -> Frames:
        """Frames (T, D) of a recording of any length, in windows.

        Where the recording is one window (with LONG: up to 30 s) they are those of `embed`; see LONG for how near
        they come beyond. Raises ValueError as `embed` does.
        """
        check_wave(wave)
        joined = np.empty((num_frames(len(wave)), self.dim), np.float32)
        for window, frames in self._windows(wave, layer, cut):
            joined[window.frames] = frames
        return joined

    def units_long(self, wave: Wave, cut: Cut = LONG) -> Units:
        """Units (T,) of a recording of any length, in windows; a centred codebook centres by the whole of it."""
        codebook = self._wanted_codebook()
        if not codebook.centred:
            check_wave(wave)
            return np.concatenate([codebook.assign(frames) for _, frames in self._windows(wave, None, cut)])
        frames = self.embed_long(wave, cut=cut)
        mean = frames.mean(0, dtype=np.float64)
        return np.concatenate([codebook.assign(frames[w.frames], mean) for w in cut.windows(len(wave))])

    def stream_units(self, wave: Wave, cut: Cut = STREAM) -> Units:
        """Units (T,) as they come out while a recording is listened to, none where it is too short for a frame.

        Each window is heard as an utterance of its own, for what comes after it is not known.
        """
        speller = Speller(self._wanted_codebook())
        parts = [np.zeros(0, np.int64)]
        for window in cut.windows(len(wave)):
            # One by one, as they come in: in a batch the last digits may differ.
            [frames] = self.embed([wave[window.samples]])
            parts.append(speller.spell(frames[window.kept]))
        return np.concatenate(parts)

    def _windows(self, wave: Wave, layer: Layer | None, cut: Cut) -> Iterator[tuple[Window, Frames]]:
        """The windows of a recording and what each is kept for."""
        windows = cut.windows(len(wave))
        moments = self.measure(wave) if len(windows) > 1 else None
        for window in windows:
            [frames] = self.embed([wave[window.samples]], layer, [moments])
            yield window, frames[window.kept]

    def _wanted_codebook(self) -> Codebook:
        if self.codebook is None:
            raise ValueError("model: found no codebook, wanted one to make units: publish the model first")
        return self.codebook

    def _weights(self, layer: Layer) -> dict[int, float]:
        """The layers to be summed and their weights."""
        if isinstance(layer, int | np.integer):
            if not 0 <= layer <= self.num_layers:
                raise ValueError(f"layer: found {layer}, wanted 0 to {self.num_layers}: choose a layer of this model")
            return {int(layer): 1.0}
        if len(layer) != self.num_layers + 1 or not np.isfinite(layer).all():
            found = f"{len(layer)} weights" if np.isfinite(layer).all() else "weights that are not finite"
            raise ValueError(
                f"layer: found {found}, wanted {self.num_layers + 1} finite ones: weigh every layer from 0 on"
            )
        return {index: float(weight) for index, weight in enumerate(layer) if weight} or {0: 0.0}

    def _states(
        self,
        waves: Sequence[Wave],
        wanted: Sequence[dict[int, float]],
        moments: Sequence[Moments | None] | None = None,
    ) -> Iterator[list[Frames]]:
        """Per wave the weighted sums that are wanted of its layers, (T, D) each."""
        assert moments is None or len(moments) == len(waves)
        for wave in waves:
            check_wave(wave)
        given = iter(repeat(None) if moments is None else moments)
        device = self.encoder.mask_embedding.device
        last = max(layer for weights in wanted for layer in weights)
        for batch in batches_of(waves):
            lengths = [len(wave) for wave in batch]
            known = list(islice(given, len(batch)))
            with torch.inference_mode():
                first = [first_moments(of, device) for of in known]
                hidden = self.encoder(self._packed(batch, known), lengths, last=last, moments=first)
                sums = [weighted_sum(hidden.states, weights).cpu().numpy() for weights in wanted]
            for rows in Ragged.of_samples(lengths).slices():
                yield [np.ascontiguousarray(frames[rows]) for frames in sums]

    def _packed(self, waves: Sequence[Wave], moments: Iterable[Moments | None]) -> torch.Tensor:
        """The waves as the encoder wants them, on its device, (N,)."""
        if self.encoder.config.standardised:
            waves = [standardise(wave, of) for wave, of in zip(waves, moments, strict=False)]
        return torch.from_numpy(pack_waves(waves)).to(self.encoder.mask_embedding.device)


def weighted_sum(states: Sequence[torch.Tensor], weights: dict[int, float]) -> torch.Tensor:
    """Of some layers' frames, in float32; one layer at weight 1 is left as it is."""
    [first, *others] = weights
    total = states[first].float()
    if weights[first] != 1:
        total = total * weights[first]
    for layer in others:
        total = torch.add(total, states[layer].float(), alpha=weights[layer])
    return total


def first_moments(moments: Moments | None, device: torch.device) -> FirstMoments | None:
    """Those of the first convolution's windows, if they are known."""
    if moments is None or moments.first_mean is None or moments.first_covariance is None:
        return None
    return FirstMoments(*(torch.from_numpy(m).to(device) for m in (moments.first_mean, moments.first_covariance)))


def batches_of(waves: Sequence[Wave], seconds: float = BATCH_SECONDS) -> Iterator[list[Wave]]:
    """Consecutive waves that together last at most so long, at least one."""
    batch: list[Wave] = []
    for wave in waves:
        if batch and sum(map(len, batch)) + len(wave) > seconds * SAMPLE_RATE:
            yield batch
            batch = []
        batch.append(wave)
    if batch:
        yield batch


def load(folder: Path, precision: str = "float32", device: str = "cpu") -> Speech:
    """The model that `sonorant publish` wrote, its encoder at a precision of `models.reduced`.

    Raises ValueError where the folder holds none, there is no such precision, or `publish` found that too many units
    become others at it.
    """
    encoder, about = load_encoder(folder)
    if "layer" not in about:
        raise ValueError(f"model {folder}: found an encoder without a layer, wanted a model: run `sonorant publish`")
    kept = about.get("agreement", {}).get(precision, 1.0)
    if kept < LEAST_AGREEMENT:
        raise ValueError(
            f"precision: found {precision} for model {folder}, which keeps {kept:.2%} of its units at it, wanted at "
            f"least {LEAST_AGREEMENT:.0%}: take float32"
        )
    codebook = Codebook.load(folder / "codebook.safetensors")
    grounder, wanted = load_grounder(folder), about.get("num_images", 0)
    # Whoever only embeds needs no faiss.
    is_searched = not wanted or can_search()
    gallery = Gallery.load(folder) if is_searched else None
    found = 0 if gallery is None else len(gallery)
    if is_searched and (found != wanted or (gallery and (grounder is None or grounder.config.dim != gallery.dim))):
        raise ValueError(
            f"model {folder}: found {found} images, wanted {wanted} in the space of its grounding: copy it again whole"
        )
    encoder = at_precision(encoder, precision).to(device)
    grounder = None if grounder is None else grounder.to(device)
    return Speech(encoder, about["layer"], codebook, about, digest_of(folder), precision, grounder, gallery)


def digest_of(folder: Path) -> str | None:
    """The digest in an artifact's record, None where there is no record."""
    path = folder / "artifact.json"
    return str(json.loads(path.read_text())["digest"]) if path.is_file() else None


def load_trained(folder: Path, network: str = "student") -> Speech:
    """The student or the teacher of an encoder that `sonorant pretrain` wrote, without a codebook."""
    encoder, about = load_encoder(folder)
    if network == "teacher":
        path = folder / "teacher.safetensors"
        if not path.is_file():
            raise ValueError(
                f"encoder {folder}: found no teacher, wanted one: publish the student or train with a teacher"
            )
        names = [name for name, _ in encoder.named_parameters()]
        encoder.load_state_dict(from_transformers(load_file(path), names))
    return Speech(encoder, encoder.config.num_layers, about=about)


def load_untrained(folder: Path, seed: int = 0) -> Speech:
    """The same architecture and layer with random weights: what training is measured against."""
    encoder, about = load_encoder(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = Encoder(encoder.config)
    return Speech(fresh, about.get("layer", encoder.config.num_layers), about=about)
