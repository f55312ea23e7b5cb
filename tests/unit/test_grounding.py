"""Grounding: its loss against a loop, the queue, both sides of the model, and what is written and read again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sonorant.config import GroundConfig, GroundingConfig, ImageConfig
from sonorant.data.frames import Ragged
from sonorant.models.grounding import Grounder, Residual, carry_grounder, load_grounder, save_grounder
from sonorant.models.images import Foreign, Regions, load_foreign
from sonorant.tasks.grounding import MAX_SCALE, Grounding, matching_loss
from sonorant.tasks.task import Outcome, Views
from sonorant.training.engine import Engine, build_engine
from sonorant.training.optim import build_optimizer
from tests.references import grounding as slow
from tests.tiny import encoder_config, make_batch, make_encoder, shaken

DIM = 16
IMAGE: dict[str, Any] = {"side": 12, "patch": 6, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 32}
REGIONS: dict[str, Any] = {**IMAGE, "kind": "regions", "region_dim": 5}
NONE = (torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
"""A queue of width 4 that is empty."""


def config(image: dict[str, Any] | None = None, **changes: Any) -> GroundingConfig:
    """Tiny, with two stages of convolutions."""
    values = {"dim": 8, "branch_widths": (6, 10), "branch_heads": 2, "image": image or IMAGE, **changes}
    return GroundingConfig.model_validate(values)


def make_grounder(image: dict[str, Any] | None = None, **changes: Any) -> Grounder:
    """A random one on three layers of 16, in evaluation mode."""
    torch.manual_seed(0)
    grounder = Grounder(DIM, 3, config(image, **changes))
    shaken(grounder)
    return grounder.eval()


def states(lengths: tuple[int, ...], seed: int = 0, dim: int = DIM) -> tuple[Tensor, Ragged]:
    """Random states of utterances of so many rows each."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((sum(lengths), dim)).astype(np.float32)), Ragged(lengths)


def random_pixels(count: int, side: int = 12, seed: int = 0) -> Tensor:
    """Noise, (I, 3, S, S) bytes."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, side, side)).astype(np.uint8))


def random_regions(count: int) -> tuple[Tensor, Tensor]:
    """Four regions each."""
    rng = np.random.default_rng(1)
    arrays = rng.standard_normal((count, 4, 5)), rng.random((count, 4, 4))
    return torch.from_numpy(arrays[0]).float(), torch.from_numpy(arrays[1]).float()


# ------------------------------------------------------------------------------------------------------- loss


@settings(deadline=None)
@given(
    st.integers(1, 7), st.integers(0, 5), st.integers(1, 4), st.floats(0.1, 20), st.floats(0, 3), st.integers(0, 10_000)
)
@example(1, 0, 1, 1.0, 0.0, 0)
@example(4, 3, 1, 1.0, 1.0, 0)
def test_the_loss_is_the_loop(pairs: int, more: int, images: int, scale: float, margin: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spoken, seen, more_spoken, more_seen = (
        torch.from_numpy(rng.standard_normal((rows, 3))) for rows in (pairs, pairs, more, more)
    )
    ids, more_ids = (torch.from_numpy(rng.integers(0, images, rows)) for rows in (pairs, more))
    wanted = slow.matching(
        spoken.tolist(), seen.tolist(), ids.tolist(),
        (more_spoken.tolist(), more_seen.tolist(), more_ids.tolist()), scale, margin,
    )  # fmt: skip
    queued = (more_spoken, more_seen, more_ids)
    found = matching_loss(spoken, seen, ids, queued, torch.tensor(scale, dtype=torch.float64), margin)
    assert [float(value) for value in found] == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_gradients_are_right() -> None:
    rng = np.random.default_rng(0)
    spoken, seen, more, others = (torch.from_numpy(rng.standard_normal((rows, 3))) for rows in (4, 4, 2, 2))
    ids, queued = torch.tensor([0, 1, 0, 2]), (more, others, torch.tensor([1, 5]))

    def loss(spoken: Tensor, seen: Tensor, scale: Tensor) -> Tensor:
        return matching_loss(spoken, seen, ids, queued, scale, 0.5)[0]

    inputs = (spoken.requires_grad_(), seen.requires_grad_(), torch.tensor(1.5, dtype=torch.float64).requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


def test_other_captions_of_an_image_are_told_from_nothing() -> None:
    """Of three captions of one image, none is pushed away from it or its other captions, however near they lie."""
    spoken = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seen = spoken.detach().clone().requires_grad_()
    loss, found, heard = matching_loss(spoken, seen, torch.tensor([7, 7, 7]), NONE, torch.tensor(1.0), 0.0)
    loss.backward()
    assert (loss.item(), found.item(), heard.item()) == (0, 1, 1)
    assert spoken.grad is not None
    assert not spoken.grad.any()


@pytest.mark.parametrize("pairs", [2, 9])
def test_a_model_that_has_collapsed_is_at_chance(pairs: int) -> None:
    same = torch.ones(pairs, 4)
    loss, found, heard = matching_loss(same, same, torch.arange(pairs), NONE, torch.tensor(3.0), 0.0)
    assert float(loss) == pytest.approx(2 * np.log(pairs), rel=1e-6)
    # Scores tie, and whoever wins the tie is right once.
    assert (float(found), float(heard)) == pytest.approx((1 / pairs, 1 / pairs))


# ------------------------------------------------------------------------------------------------------- task


def make_views(pairs: int, seed: int, first_id: int = 0, dim: int = 8) -> Views:
    """Random pairs of a part of an update, each of another image."""
    rng = np.random.default_rng(seed)
    spoken, seen = (torch.from_numpy(rng.standard_normal((pairs, dim))).float().requires_grad_() for _ in range(2))
    ids = torch.arange(first_id, first_id + pairs)
    nothing = torch.zeros(0)
    return Views(
        Ragged(()), nothing, nothing, (), (), lambda: (nothing, nothing, nothing),
        spoken=spoken, seen=seen, image_ids=ids, pair_seeds=ids.clone(),
    )  # fmt: skip


def outcome_of(task: Grounding, *parts: Views) -> Outcome:
    """The outcome of an update of these parts, as the first of them computes it."""
    shares = [task.share(part) for part in parts]
    outcome: Outcome = task(parts[0], tuple(torch.cat(tensors) for tensors in zip(*shares, strict=True)))
    return outcome


def settle(task: Grounding, outcome: Outcome, times: int = 1) -> None:
    """As the engine does: each of `times` parts brings its share, and what crosses ranks is float32."""
    assert outcome.statistics is not None
    parts = [outcome.statistics / times for _ in range(times)]
    with torch.no_grad():
        task.settle(torch.stack([part.float() for part in parts]).sum(0), 1)


def test_a_dot_product_has_no_temperature_and_a_cosine_has_one() -> None:
    assert not list(Grounding(config(similarity="dot")).parameters())
    task = Grounding(config(temperature=0.05))
    views = make_views(3, 0)
    assert float(outcome_of(task, views).sums["scale"]) == pytest.approx(20, rel=1e-6)
    outcome_of(task, views).loss.backward()
    (log_scale,) = task.parameters()
    assert log_scale.grad is not None
    assert log_scale.grad.abs() > 0


def test_the_temperature_stops_falling_where_it_can_still_rise() -> None:
    task = Grounding(config())
    assert task.log_scale is not None
    with torch.no_grad():
        task.log_scale.fill_(9.0)
    settle(task, outcome_of(task, make_views(3, 0)))
    assert task.log_scale.exp().item() == pytest.approx(MAX_SCALE, rel=1e-5)
    outcome_of(task, make_views(3, 0)).loss.backward()
    assert task.log_scale.grad is not None
    assert task.log_scale.grad.abs() > 0


def test_the_queue_holds_the_latest_pairs_whatever_number_of_parts_brought_them() -> None:
    task = Grounding(config(queue_size=5, similarity="dot"))
    # Nine in three parts: float32 thirds of a number of an image, three times, are rounded to it.
    pairs = [make_views(3, index, first_id=100_003 + 3 * index) for index in range(3)]
    settle(task, outcome_of(task, *pairs), times=3)
    assert task.queue_ids.tolist() == [100_007, 100_008, 100_009, 100_010, 100_011]
    spoken = torch.cat([part.spoken for part in pairs if part.spoken is not None])[-5:]
    assert torch.allclose(task.queue[:, 0], spoken, rtol=1e-6)
    settle(task, outcome_of(task, make_views(2, 7, first_id=0)))
    assert task.queue_ids.tolist() == [100_009, 100_010, 100_011, 0, 1]


def test_what_is_queued_is_told_from_too() -> None:
    task, plain = Grounding(config(queue_size=4)), Grounding(config())
    before, now = make_views(4, 0, first_id=10), make_views(3, 1)
    first = outcome_of(task, before)
    assert float(first.loss) == pytest.approx(float(outcome_of(plain, before).loss))
    settle(task, first)
    assert float(outcome_of(task, now).loss) > float(outcome_of(plain, now).loss)
    # All of one image: the queue's captions of it are told from nothing.
    same = make_views(1, 2, first_id=11)
    with torch.no_grad():
        task.queue_ids.fill_(11)
    assert float(outcome_of(task, same).loss) == 0


@pytest.mark.parametrize("queue_size", [0, 4])
def test_an_update_without_pairs_changes_nothing(queue_size: int) -> None:
    task = Grounding(config(queue_size=queue_size))
    settle(task, outcome_of(task, make_views(3, 0)))
    held, views = task.queue_ids.clone(), make_views(0, 0)
    outcome = outcome_of(task, views)
    outcome.loss.backward()
    assert float(outcome.loss) == 0
    settle(task, outcome)
    assert torch.equal(task.queue_ids, held)
    assert task.monitor()["embedding_std"] > 0
    assert task.monitor() == {}


def test_what_is_watched_shows_a_collapse() -> None:
    task, views = Grounding(config()), make_views(6, 0)
    settle(task, outcome_of(task, views))
    healthy = task.monitor()["embedding_std"]
    assert views.spoken is not None
    with torch.no_grad():
        views.spoken.copy_(torch.ones(8) / np.sqrt(8))
    settle(task, outcome_of(task, views))
    assert task.monitor()["embedding_std"] < 0.01 < 0.3 < healthy


# ------------------------------------------------------------------------------------------------ speech side


@pytest.mark.parametrize("widths", [(), (6,), (6, 10)])
def test_an_utterance_alone_is_one_among_others(widths: tuple[int, ...]) -> None:
    grounder = make_grounder(branch_widths=widths)
    # Rows with the leading one: 2 is the shortest utterance there is.
    x_FD, frames = states((2, 31, 9, 3, 40))
    together = grounder.speech(x_FD, frames)
    for row, rows in zip(together, frames.slices(), strict=True):
        (alone,) = grounder.speech(x_FD[rows], Ragged((rows.stop - rows.start,)))
        # Sums of float32 in another order.
        assert torch.allclose(row, alone, atol=2e-6)
        # All of it is heard, the leading state too.
        for place in (rows.start, rows.start + 1, rows.stop - 1):
            other = x_FD.clone()
            other[place] += 1.0
            assert (grounder.speech(other, frames) - together).abs().max() > 1e-5


@pytest.mark.parametrize("widths", [(), (6, 10)])
def test_the_largest_values_over_time_are_those_of_an_utterance_alone(widths: tuple[int, ...]) -> None:
    grounder = make_grounder(branch_widths=widths, pooling="max")
    side = grounder.speech_side
    assert not [name for name, _ in side.named_parameters() if name.startswith(("lead.", "layer."))]
    x_FD, frames = states((2, 31, 9, 3, 40))
    together = grounder.speech(x_FD, frames)
    for row, rows in zip(together, frames.slices(), strict=True):
        (part,) = side.shortened([x_FD[rows.start + 1 : rows.stop]])
        largest = torch.stack([channel.max() for channel in part.unbind(1)])
        # Sums of float32 in another order.
        assert torch.allclose(row, F.normalize(side.out(largest), dim=0), atol=2e-6)


@given(st.integers(1, 40), st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=30)
def test_a_block_is_its_convolutions_on_what_is_there(length: int, stride: int) -> None:
    torch.manual_seed(0)
    block = Residual(3, 4, stride)
    x_1CT = torch.randn(1, 3, length)
    found, counts = block(F.pad(x_1CT, (0, 7)), torch.tensor([length]))

    def convolved(layer: nn.Conv1d, norm: nn.Module, x: Tensor) -> Tensor:
        """Frame by frame, the zeros beyond both ends spelled out."""
        half, kernel = layer.kernel_size[0] // 2, layer.kernel_size[0]
        padded = F.pad(x, (half, half))
        step = layer.stride[0]
        windows = [padded[..., at : at + kernel] for at in range(0, x.shape[-1], step)]
        weight, bias = layer.weight, layer.bias
        assert bias is not None
        values = [norm(torch.einsum("oik,bik->bo", weight, window) + bias) for window in windows]
        return torch.stack(values, -1)

    hidden = F.relu(convolved(block.first, block.first_norm, x_1CT))
    wanted = convolved(block.second, block.second_norm, hidden) + convolved(block.shortcut, block.shortcut_norm, x_1CT)
    count = -(-length // stride)
    assert counts.tolist() == [count]
    assert torch.allclose(found[..., :count], F.relu(wanted), atol=1e-5)
    assert not found[..., count:].any()


def test_the_leading_vector_stands_before_every_utterance() -> None:
    grounder = make_grounder()
    z_FD, frames = states((3, 1, 5))
    led_FD, led = grounder.prepend(z_FD, frames)
    assert led.lengths == (4, 2, 6)
    for rows, before in zip(led.slices(), frames.slices(), strict=True):
        assert torch.equal(led_FD[rows.start], grounder.cls)
        assert torch.equal(led_FD[rows.start + 1 : rows.stop], z_FD[before])


@pytest.mark.parametrize(("layers", "wanted"), [(12, 8), (3, 2), (2, 1), (1, 1)])
def test_speech_is_read_two_thirds_up(layers: int, wanted: int) -> None:
    assert Grounder(DIM, layers, config()).layer == wanted
    assert Grounder(DIM, layers, config(layer=1)).layer == 1


def test_heads_that_do_not_divide_the_width_are_refused_on_one_line() -> None:
    with pytest.raises(ValueError, match=r"branch_heads: found 5, wanted a divisor of the encoder's dim 16") as caught:
        Grounder(DIM, 3, config(branch_heads=5))
    assert "\n" not in str(caught.value)


def test_cosines_have_length_one_and_dot_products_have_not() -> None:
    x_FD, frames = states((4, 6))
    lengths = make_grounder().speech(x_FD, frames).norm(dim=1)
    assert lengths.tolist() == pytest.approx([1, 1], abs=1e-6)
    raw = make_grounder(similarity="dot")
    assert F.normalize(raw.speech(x_FD, frames), dim=1).flatten().tolist() == pytest.approx(
        make_grounder().speech(x_FD, frames).flatten().tolist(), abs=1e-6
    )
    assert abs(float(raw.image([random_pixels(1)]).norm()) - 1) > 1e-3


# ------------------------------------------------------------------------------------------------- image side


def vision(kind: str, folder: Path) -> Path:
    """A transformers vision model with random weights, and what it takes of pixels."""
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    model: Any = (
        ViTModel(ViTConfig(**shape, intermediate_size=32, patch_size=8))
        if kind == "vit"
        else Dinov2Model(Dinov2Config(**shape, mlp_ratio=2, patch_size=8))
    )
    model.save_pretrained(folder)
    seen = {"do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    seen |= {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(seen))
    return folder


@pytest.mark.parametrize("image", [IMAGE, REGIONS], ids=["small", "regions"])
def test_an_image_alone_is_one_among_others(image: dict[str, Any]) -> None:
    grounder = make_grounder(image)
    pictures = random_regions(3) if image is REGIONS else (random_pixels(3),)
    together = grounder.image(pictures)
    assert (together[0] - together[1]).abs().max() > 1e-3
    for index in range(3):
        (alone,) = grounder.image([tensor[index : index + 1] for tensor in pictures])
        assert torch.allclose(together[index], alone, atol=2e-6)


def test_a_small_vit_sees_every_patch_and_where_it_is() -> None:
    grounder, pixels = make_grounder(), random_pixels(1)
    vector = grounder.image([pixels])
    for corner in ((0, 0), (0, 11), (11, 0), (11, 11)):
        other = pixels.clone()
        other[0, :, *corner] ^= 255
        assert (grounder.image([other]) - vector).abs().max() > 1e-6
    assert (grounder.image([pixels.roll(6, dims=3)]) - vector).abs().max() > 1e-3


def test_regions_are_what_they_show_and_where_in_no_order() -> None:
    torch.manual_seed(0)
    regions = Regions(ImageConfig.model_validate({**REGIONS, "num_layers": 1})).eval()
    shaken(regions)
    features, boxes = random_regions(2)
    entries: list[Tensor] = []
    regions.layers[0].register_forward_pre_hook(lambda _, inputs: entries.append(inputs[0].detach()))
    vectors = regions(features, boxes)
    # e = (LN(W f) + LN(W' box)) / 2 behind the leading vector (grounding.md §1.1).
    wanted = (
        regions.features_norm(regions.features(features[1, 2])) + regions.boxes_norm(regions.boxes(boxes[1, 2]))
    ) / 2
    assert torch.allclose(entries[0].view(2, 5, -1)[1, 3], wanted, atol=1e-6)
    assert torch.allclose(regions(features.flip(1), boxes.flip(1)), vectors, atol=2e-6)
    assert (regions(features, boxes.flip(1)) - vectors).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_a_transformers_model_sees_what_its_own_processor_gives_it(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    foreign = load_foreign(vision(kind, tmp_path))
    pixels = random_pixels(2, foreign.side)
    assert foreign.side == 16
    values = (pixels.float() / 255 - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor([0.2, 0.25, 0.3])[
        :, None, None
    ]
    with torch.inference_mode():
        wanted = AutoModel.from_pretrained(tmp_path).eval()(pixel_values=values).pooler_output
        assert torch.allclose(foreign(pixels), wanted, atol=1e-6)
    foreign.save(tmp_path / "again")
    again = load_foreign(tmp_path / "again")
    with torch.inference_mode():
        assert torch.equal(again(pixels), foreign(pixels))
    assert [path.name for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt")] == []


def test_a_classifier_has_no_pooler_and_none_is_drawn(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, ViTConfig

    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    AutoModelForImageClassification.from_config(ViTConfig(**shape, intermediate_size=32, patch_size=8)).save_pretrained(
        tmp_path
    )
    foreign, other, pixels = load_foreign(tmp_path), load_foreign(tmp_path), random_pixels(2, 16)
    foreign.save(tmp_path / "again")
    again = load_foreign(tmp_path / "again")
    with torch.inference_mode():
        wanted = foreign(pixels)
        assert torch.equal(other(pixels), wanted)
        assert torch.equal(again(pixels), wanted)


def test_a_pickled_vision_model_is_refused(tmp_path: Path) -> None:
    folder = vision("vit", tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle") as caught:
        load_foreign(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["config", "weights", "lost", "speech"])
def test_what_is_no_vision_model_is_refused_on_one_line(damage: str, tmp_path: Path) -> None:
    folder = vision("vit", tmp_path)
    if damage == "config":
        (folder / "config.json").write_text('{"model_type": "nonsense"}')
    elif damage == "weights":
        (folder / "model.safetensors").write_bytes(b"123")
    elif damage == "lost":
        tensors = load_file(folder / "model.safetensors")
        del tensors["layernorm.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        from transformers import HubertConfig, HubertModel

        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        (folder / "preprocessor_config.json").unlink()
        HubertModel(HubertConfig(**shape, num_conv_pos_embedding_groups=2)).save_pretrained(folder)
    with pytest.raises(ValueError, match="found no vision model that transformers opens") as caught:
        load_foreign(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "transformers"}, "found no path"),
        ({"path": "somewhere"}, "wanted one for transformers alone"),
        ({"side": 25}, "25 is not divisible by image.patch 12"),
        ({"dim": 30}, "30 is not divisible by image.num_heads 4"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ImageConfig.model_validate(values)


# -------------------------------------------------------------------------------------------- written and read


def assert_same_model(one: Grounder, two: Grounder, pictures: tuple[Tensor, ...] | None) -> None:
    """They make the same vectors, bit for bit."""
    x_FD, frames = states((4, 11))
    with torch.inference_mode():
        assert torch.equal(one.cls, two.cls)
        assert torch.equal(one.speech(x_FD, frames), two.speech(x_FD, frames))
        if pictures is not None:
            assert torch.equal(one.image(pictures), two.image(pictures))


@pytest.mark.parametrize("kind", ["small", "regions", "vit", "frozen"])
def test_what_is_saved_is_loaded(kind: str, tmp_path: Path) -> None:
    image = {"small": IMAGE, "regions": REGIONS}.get(kind)
    if image is None:
        folder = vision("vit", tmp_path / "vision")
        image = {"kind": "transformers", "path": folder, "trained": kind == "vit"}
    grounder = make_grounder(image)
    (tmp_path / "out").mkdir()
    save_grounder(grounder, tmp_path / "out")
    # It stands alone, and moves.
    (tmp_path / "out").rename(tmp_path / "moved")
    if kind in ("vit", "frozen"):
        (tmp_path / "vision").rename(tmp_path / "gone")
    pictures = {
        "small": (random_pixels(2),),
        "regions": random_regions(2),
        "vit": (random_pixels(2, 16),),
        "frozen": (states((2,))[0],),
    }[kind]
    drawn = torch.random.get_rng_state()
    loaded = load_grounder(tmp_path / "moved", with_images=True)
    assert loaded is not None
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert not loaded.training
    assert loaded.layer == grounder.layer == 2
    assert_same_model(grounder, loaded, pictures)
    if kind == "frozen":
        # What has seen the images goes with what reads them.
        assert isinstance(load_foreign(tmp_path / "moved" / "image_encoder"), Foreign)
    speech = load_grounder(tmp_path / "moved")
    assert speech is not None
    assert speech.image_side is None
    assert_same_model(grounder, speech, None)
    # And what is loaded is saved as it was.
    (tmp_path / "again").mkdir()
    save_grounder(loaded, tmp_path / "again")
    for path in (path for path in (tmp_path / "moved").rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "moved")).read_bytes()


def test_an_encoder_that_was_not_grounded_has_none(tmp_path: Path) -> None:
    assert load_grounder(tmp_path) is None
    (tmp_path / "out").mkdir()
    carry_grounder(tmp_path, tmp_path / "out", 0)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("damage", ["cut", "missing", "other", "settings", "keys"])
def test_what_is_damaged_is_refused_on_one_line(damage: str, tmp_path: Path) -> None:
    save_grounder(make_grounder(), tmp_path)
    weights, about = tmp_path / "grounding.safetensors", tmp_path / "grounding.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    elif damage == "other":
        weights.write_bytes(b"")
        save_grounder(make_grounder(branch_widths=()), tmp_path / "..")
        weights.write_bytes((tmp_path / ".." / "grounding.safetensors").read_bytes())
    elif damage == "settings":
        about.write_text(about.read_text().replace('"dot"', '"near"').replace('"cosine"', '"near"'))
    else:
        about.write_text("{}")
    with pytest.raises(
        ValueError, match=r"grounding\.json and grounding\.safetensors that do not go together"
    ) as caught:
        load_grounder(tmp_path)
    assert "\n" not in str(caught.value)


def test_alignment_carries_on_what_it_does_not_touch(tmp_path: Path) -> None:
    source, target = tmp_path / "grounded", tmp_path / "aligned"
    source.mkdir()
    target.mkdir()
    save_grounder(make_grounder({"kind": "transformers", "path": vision("vit", tmp_path / "vision")}), source)
    with pytest.raises(ValueError, match="grounded on layer 2 of which the lowest 1 stand still"):
        carry_grounder(source, target, 1)
    carry_grounder(source, target, 2)
    assert {path.name: path.read_bytes() for path in source.rglob("*") if path.is_file()} == {
        path.name: path.read_bytes() for path in target.rglob("*") if path.is_file()
    }


# ------------------------------------------------------------------------------------------------- it can learn


def make_engine_of_pairs(**grounding: Any) -> Engine:
    """A random encoder with grounding alone."""
    values = {"phases": [{"weights": {"grounding": 1.0}}], "grounding": {**config().model_dump(), **grounding}}
    return build_engine(GroundConfig.model_validate(values), make_encoder(), 0)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_six_utterances_learn_their_images(similarity: str) -> None:
    """Noise and noise: every pair is found both ways after a few updates, from one in six by chance."""
    engine = make_engine_of_pairs(similarity=similarity).train()
    batch = replace(
        make_batch([5_000, 3_000, 4_000, 6_000, 3_500, 4_500]),
        pictures=(random_pixels(6),),
        image_ids=torch.arange(6),
    )
    optimizer = build_optimizer(engine, GroundConfig.model_validate({"phases": [{"weights": {"grounding": 1}}]}).optim)
    for group in optimizer.param_groups:
        group["lr"] = 0.003
    for update in range(40):
        optimizer.zero_grad()
        loss, sums = engine(batch, {"grounding": 1.0}, update)
        loss.backward()
        optimizer.step()
        engine.after_update(update)
    assert float(sums["grounding/speech_to_image"]) == float(sums["grounding/image_to_speech"]) == 1
    # All of both sides has learned, and the encoder up to the layer that is read, but nothing above.
    idle = {name for name, parameter in engine.named_parameters() if parameter.grad is None}
    top = f"encoder.context.layers.{encoder_config().num_layers - 1}."
    assert idle
    assert all(name.startswith(top) or "mask" in name or "context" in name for name in idle), idle
