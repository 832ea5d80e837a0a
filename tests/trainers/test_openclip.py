"""OpenCLIP: tokens, text tower, views, losses on one and two ranks, and micro-batches that see the whole batch."""

from __future__ import annotations

import datetime
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from trainers import text, vit
from trainers.augment import IMAGENET_MEAN, IMAGENET_STD, draw_resized_boxes
from trainers.config import ScenesConfig, TrialConfig, resolve
from trainers.data.scenes import Renderer, _caption
from trainers.methods import Batch, Progress, Upcoming, Views
from trainers.methods.openclip import Features, OpenCLIP
from trainers.optim import build_optimizer
from trainers.streams import Streams

PROGRESS = Progress(step=0, steps=10)
IMAGES = 8
TINY = {
    "method": "openclip",
    "preset": "short",
    "model.size": "nano",
    "model.patch_size": 8,
    "model.image_size": 16,
    "model.layer_scale": None,
    "model.pre_norm": True,
    "model.norm_eps": 1e-5,
    "openclip.embed_dim": 16,
    "openclip.text_width": 16,
    "openclip.text_layers": 2,
    "openclip.text_heads": 2,
    "openclip.context_length": 24,
}


def config(**settings: object) -> TrialConfig:
    return resolve({**TINY, **settings})


def method(trial: TrialConfig, seed: int = 0) -> OpenCLIP:
    streams = Streams(seed)
    return OpenCLIP(trial, vit.build(trial.model, streams), 0, streams).train()


def captions(count: int = IMAGES) -> list[str]:
    photographs = ["a cat", "bricks", "galaxies"]
    boxes = np.zeros((2, 5), np.float32)
    written = []
    for index in range(count):
        boxes[:, 4] = index % 10, np.nan if index % 3 else index % 7
        written.append(_caption(boxes, photographs[index % 3]))
    return written


def batch(trained: OpenCLIP, count: int = IMAGES, size: int = 20) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    prepared = trained.prepare(Upcoming(0, count, np.arange(count), captions(count)))
    return Batch(images, {}, prepared)


def parts_of(views: Views, parts: int) -> list[Views]:
    chunks = {name: value.chunk(parts) for name, value in views.items()}
    return [{name: values[part] for name, values in chunks.items()} for part in range(parts)]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}


def backward(trained: OpenCLIP, views: Sequence[Views], model: nn.Module | None = None) -> tuple[list[float], Any]:
    """Loss that each micro-batch reports, and the sum of their gradients, as the loop has them."""
    trained.zero_grad()
    if len(views) > 1:
        trained.remember(views, Progress(0, 10, 0, len(views)))
    losses = []
    for part, view in enumerate(views):
        reported = (model or trained)(view, Progress(0, 10, part, len(views)))
        (loss,) = reported.values()
        loss.backward()
        losses.append(float(loss.detach()))
    return losses, gradients(trained)


def test_tokens_are_those_of_open_clip_without_the_columns_behind_the_longest_caption() -> None:
    written = [*captions(3), "", "Das Wetter: 21 °C, it&amp;s  “fine”… 😀", "UPPER lower", "word " * 40]
    official = SimpleTokenizer(context_length=24)
    assert official.vocab_size == text.VOCABULARY
    tokens = text.tokens_of(written, 24)
    assert tokens.dtype == torch.int64 and torch.equal(tokens, official(written))
    assert tokens[-1].tolist() == [official.sot_token_id] + official.encode("word") * 22 + [official.eot_token_id]
    assert tokens[3].tolist() == [official.sot_token_id, official.eot_token_id] + [0] * 22
    short = text.tokens_of(written[:3], 24)
    assert short.shape[1] < 24 and torch.equal(short, official(written[:3])[:, : short.shape[1]])
    assert not official(written[:3])[:, short.shape[1] :].any() and short[:, -1].any()
    # An encoding may be 0 like the columns behind the end.
    assert text.tokens_of(["!~"], 24).tolist() == [[official.sot_token_id, 0, 349, official.eot_token_id]]


def test_columns_without_tokens_change_neither_features_nor_gradients() -> None:
    tower = text.build_text_tower(config().openclip, Streams(0)).double()  # type: ignore[arg-type]
    tokens = text.tokens_of(captions(), 24)
    assert tokens.shape[1] <= 18
    weights = torch.randn(len(tokens), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for whole in (tokens, F.pad(tokens, (0, 24 - tokens.shape[1]))):
        tower.zero_grad()
        features = text.encode(tower, whole) if whole is tokens else tower(whole)
        (features * weights).sum().backward()
        results.append((features, gradients(tower)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    assert set(results[0][1]) == {name for name, _ in tower.named_parameters()}


def test_the_text_tower_starts_as_open_clips_from_streams_of_its_own() -> None:
    settings = resolve({**TINY, "openclip.text_width": 64, "openclip.embed_dim": 32}).openclip
    assert settings is not None
    before = torch.get_rng_state()
    tower = text.build_text_tower(settings, Streams(0))
    assert torch.equal(before, torch.get_rng_state())
    official = TextTransformer(24, text.VOCABULARY, 64, 2, 2, output_dim=32).state_dict()
    for name, weight in tower.state_dict().items():
        spread = float(official[name].std())
        # The deviation of n values has a relative error of 1 / √2n; five of those, of both.
        assert float(weight.std()) == pytest.approx(spread, rel=5 / math.sqrt(weight.numel())), name
        assert float(weight.mean()) == pytest.approx(
            float(official[name].mean()), abs=8 * spread / weight.numel() ** 0.5
        )
        assert float(weight.abs().max()) <= 1.5 * float(official[name].abs().max()) + 1e-6, name
    again, other = (text.build_text_tower(settings, Streams(seed)).state_dict() for seed in (0, 1))
    assert all(torch.equal(weight, again[name]) for name, weight in tower.state_dict().items())
    drawn = {name for name, weight in tower.state_dict().items() if float(weight.std()) > 0}
    assert drawn == {name for name in again if not torch.equal(again[name], other[name])}


def test_register_counts_share_weights_and_views() -> None:
    plain, registers = (method(config(**{"model.num_registers": count})) for count in (0, 4))
    theirs = registers.state_dict()
    assert set(theirs) - set(plain.state_dict()) == {"backbone.reg_token"}
    assert all(torch.equal(weight, theirs[name]) for name, weight in plain.state_dict().items())
    for _ in range(3):
        ours, others = (one.views(batch(one), one.streams) for one in (plain, registers))
        assert torch.equal(ours["images"], others["images"]) and torch.equal(ours["text"], others["text"])
    assert float(plain.image_projection.detach().std()) == pytest.approx(64**-0.5, rel=0.1)  # 1,024 values


def test_views_are_resized_crops_without_flips_normalised() -> None:
    trained = method(config(**{"openclip.crop_scale": (0.3, 0.7)}))
    views = trained.views(batch(trained), Streams(0))
    boxes = draw_resized_boxes(IMAGES, 20, Streams(0).torch("augment"), scale=(0.3, 0.7))
    area = boxes[:, 2] * boxes[:, 3] / 400
    assert float(area.min()) > 0.25 and float(area.max()) < 0.75
    for image, box, view in zip(
        batch(trained).images.permute(0, 3, 1, 2), boxes.tolist(), views["images"], strict=True
    ):
        crop = tv.resized_crop(image, *box, [16, 16], interpolation=tv.InterpolationMode.BICUBIC, antialias=True)
        torch.testing.assert_close(view, tv.normalize(crop.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD)))
    assert torch.equal(views["text"], batch(trained).prepared["text"])


def test_a_rank_sees_its_rows_of_what_all_ranks_draw() -> None:
    trained = method(config())
    whole = batch(trained)
    seen = trained.views(whole, Streams(0))
    for first in (0, 4):
        rows = slice(first, first + 4)
        own = Batch(whole.images[rows], {}, {"text": whole.prepared["text"][rows]}, first=first, total=IMAGES)
        views = trained.views(own, Streams(0))
        assert torch.equal(views["images"], seen["images"][rows]) and torch.equal(views["text"], seen["text"][rows])


def test_wrong_input_is_named() -> None:
    trained = method(config())
    with pytest.raises(ValueError, match=r"^method openclip needs captions, which this data set does not provide$"):
        trained.prepare(Upcoming(0, 4, np.arange(4)))

    class Classless(nn.Module):
        embed_dim, num_registers = 8, 0

        def tokens(self, images: Tensor) -> vit.Tokens:
            return vit.Tokens(None, images.new_zeros(len(images), 0, 8), images.new_zeros(len(images), 4, 8))

    own = OpenCLIP(config(), Classless(), 0, Streams(0))
    with pytest.raises(ValueError, match="learns from the class token, which this backbone does not have"):
        own.losses(own.views(batch(own), Streams(0)), PROGRESS)


def test_losses_equal_open_clips_and_the_definition() -> None:
    trained = method(config())
    views = trained.views(batch(trained), Streams(0))
    images, texts = trained.features(views)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(IMAGES))
    losses = trained.losses(views, PROGRESS)
    assert set(losses) == {"contrastive"} and losses["contrastive"].dtype == torch.float32
    torch.testing.assert_close(losses["contrastive"], ClipLoss()(images, texts, torch.tensor(1 / 0.07)))
    similarity = images @ texts.T / 0.07
    rows, columns = (-torch.log_softmax(similarity, dim=axis).diagonal().mean() for axis in (1, 0))
    torch.testing.assert_close(losses["contrastive"], (rows + columns) / 2)


def test_siglips_loss_equals_open_clips_and_the_definition() -> None:
    trained = method(config(**{"openclip.loss": "siglip"}))
    views = trained.views(batch(trained), Streams(0))
    images, texts = trained.features(views)
    loss = trained.losses(views, PROGRESS)["contrastive"]
    torch.testing.assert_close(loss, SigLipLoss()(images, texts, torch.tensor(10.0), torch.tensor(-10.0)))
    logits = 10 * images @ texts.T - 10
    sign = 2 * torch.eye(IMAGES) - 1
    torch.testing.assert_close(loss, torch.log1p(torch.exp(-sign * logits)).sum() / IMAGES)


def test_the_loss_of_known_features_by_hand() -> None:
    """Two orthogonal pairs at scale ln 3: e^(ln 3) = 3, so each row's share is 3 / (3 + 1)."""
    trained = method(config())
    with torch.no_grad():
        trained.logit_scale.fill_(math.log(math.log(3)))
    pairs = Features(torch.eye(2), torch.eye(2))
    assert trained._loss(pairs, 1).item() == pytest.approx(-math.log(3 / 4))
    assert trained._loss(Features(torch.eye(2), torch.eye(2).flip(0)), 1).item() == pytest.approx(-math.log(1 / 4))


def test_the_scale_is_learned_within_its_limits_and_not_decayed() -> None:
    trained = method(config(**{"openclip.max_logit_scale": 20.0}))
    assert trained.logit_scale.item() == pytest.approx(2.6592600)  # ln(1 / 0.07)
    assert not hasattr(trained, "logit_bias")
    for value, kept in ((5.0, math.log(20)), (-1.0, 0.0), (2.0, 2.0)):
        with torch.no_grad():
            trained.logit_scale.fill_(value)
        trained.after_step(PROGRESS)
        assert trained.logit_scale.item() == pytest.approx(kept)
    siglip = method(config(**{"openclip.loss": "siglip"}))
    assert (siglip.logit_scale.item(), siglip.logit_bias.item()) == (pytest.approx(math.log(10)), -10.0)
    groups = build_optimizer(siglip, siglip.config.optim).param_groups
    kept_ids = {id(value) for group in groups if group["weight_decay"] == 0.0 for value in group["params"]}
    assert {id(siglip.logit_scale), id(siglip.logit_bias)} <= kept_ids
    assert id(siglip.image_projection) not in kept_ids and id(siglip.text.text_projection) not in kept_ids


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_all_parameters_learn(loss: str) -> None:
    trained = method(config(**{"openclip.loss": loss, "model.num_registers": 2}))
    _, learned = backward(trained, [trained.views(batch(trained), trained.streams)])
    assert [name for name, _ in trained.named_parameters() if name not in learned or not learned[name].any()] == []


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_micro_batches_give_the_loss_and_the_gradients_of_the_whole_batch(loss: str, drop_path: float) -> None:
    trained = method(config(**{"openclip.loss": loss, "model.drop_path": drop_path, "model.num_registers": 2}))
    whole = trained.views(batch(trained), trained.streams)
    for parts in (2, 4):
        pieces = parts_of(whole, parts)
        stand = trained.streams.state_dict()
        losses, summed = backward(trained, pieces)
        after = trained.streams.torch("drop_path").get_state()
        trained.streams.load_state_dict(stand)
        # What one pass computes that lets branches fall as they fell in the micro-batches.
        features = [trained.features(piece) for piece in pieces]
        assert torch.equal(after, trained.streams.torch("drop_path").get_state())
        assert torch.equal(after, stand["torch"]["drop_path"]) == (drop_path == 0.0)
        trained.zero_grad()
        expected = trained._loss(Features(*map(torch.cat, zip(*features, strict=True))), 1)
        expected.backward()
        assert losses == pytest.approx([expected.item()] * parts, abs=1e-5)
        torch.testing.assert_close(summed, gradients(trained), rtol=1e-5, atol=1e-5)
    if drop_path == 0.0:
        (single,), at_once = backward(trained, [whole])
        assert single == pytest.approx(losses[0], abs=1e-5)
        torch.testing.assert_close(summed, at_once, rtol=1e-5, atol=1e-5)


def test_micro_batches_under_autocast_within_one_context() -> None:
    trained = method(config())
    pieces = parts_of(trained.views(batch(trained), trained.streams), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, summed = backward(trained, pieces)
    assert set(summed) == {name for name, _ in trained.named_parameters()}
    (exact,), _ = backward(trained, [trained.views(batch(trained), Streams(0))])
    assert losses[0] == pytest.approx(exact, rel=0.02) and losses[0] != exact
    assert trained._remembered == []


def test_activation_checkpointing_of_the_text_tower_changes_nothing() -> None:
    results = []
    for checkpointing in (False, True):
        trained = method(config(**{"execution.activation_checkpointing": checkpointing}))
        assert trained.text.transformer.grad_checkpointing is checkpointing
        results.append(backward(trained, [trained.views(batch(trained), trained.streams)]))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


def _setting(loss: str) -> tuple[OpenCLIP, Views]:
    trained = method(config(**{"openclip.loss": loss, "model.num_registers": 2}))
    return trained, trained.views(batch(trained), trained.streams)


def _second_rank(_: int, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.save(_rank(1, folder), f"{folder}/second.pt")


def _rank(rank: int, folder: str) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """Losses and gradients of one of two ranks with each loss, at once and in two micro-batches."""
    store, timeout = f"file://{folder}/store", datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=timeout)
    results = {}
    try:
        for loss in ("clip", "siglip"):
            trained, views = _setting(loss)
            parallel = nn.parallel.DistributedDataParallel(trained)
            rows = slice(rank * IMAGES // 2, (rank + 1) * IMAGES // 2)
            own = {name: value[rows] for name, value in views.items()}
            results[f"{loss} at once"] = backward(trained, [own], parallel)
            results[f"{loss} in parts"] = _in_parts(parallel, parts_of(own, 2))
    finally:
        dist.destroy_process_group()
    return results


def _in_parts(parallel: Any, views: Sequence[Views]) -> tuple[list[float], dict[str, Tensor]]:
    """As the loop accumulates: gradients are averaged over ranks with the last micro-batch."""
    parallel.module.zero_grad()
    parallel.module.remember(views, Progress(0, 10, 0, 2))
    with parallel.no_sync():
        first = parallel(views[0], Progress(0, 10, 0, 2))["contrastive"]
        first.backward()
    second = parallel(views[1], Progress(0, 10, 1, 2))["contrastive"]
    second.backward()
    return [float(first.detach()), float(second.detach())], gradients(parallel.module)


def test_two_ranks_have_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    second = torch.multiprocessing.spawn(_second_rank, (str(tmp_path),), nprocs=1, join=False)
    ranks = [_rank(0, str(tmp_path))]
    second.join()
    ranks.append(torch.load(tmp_path / "second.pt", weights_only=True))
    for loss in ("clip", "siglip"):
        trained, views = _setting(loss)
        (expected,), learned = backward(trained, [views])
        assert learned["logit_scale"].abs() > 1e-4
        for name in (f"{loss} at once", f"{loss} in parts"):
            (of_first, ours), (of_second, theirs) = (rank[name] for rank in ranks)
            assert of_first != of_second, "each rank has the loss of its own rows"
            for one, other in zip(of_first, of_second, strict=True):
                assert (one + other) / 2 == pytest.approx(expected, abs=1e-6)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            torch.testing.assert_close(ours, learned, rtol=1e-5, atol=1e-5)


LIKE = math.log(16)  # loss of sixteen pairs where nothing is told apart
LIKE_PAIRWISE = 15 * math.log(16 / 15) + math.log(16)  # the least with one logit for all, which is -ln 15


@pytest.mark.parametrize(("loss", "chance"), [("clip", LIKE), ("siglip", LIKE_PAIRWISE)])
def test_training_on_scenes_learns_which_caption_belongs_to_an_image(loss: str, chance: float) -> None:
    images, targets = Renderer(ScenesConfig(), 0, "train", 16).render(0, 16)
    trained = method(config(**{"openclip.loss": loss, "model.num_registers": 2}))
    prepared = trained.prepare(Upcoming(0, 16, np.arange(16), targets["captions"]))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        views = trained.views(Batch(torch.from_numpy(images), {}, prepared), trained.streams)
        optimizer.zero_grad()
        value = trained.losses(views, PROGRESS)["contrastive"]
        value.backward()
        optimizer.step()
        trained.after_step(PROGRESS)
        losses.append(float(value.detach()))
    assert np.mean(losses[-5:]) < 0.85 * chance < chance < losses[0], losses
