# SPDX-License-Identifier: Apache-2.0
"""Features that ignore padding and batch mates, thresholds by definition, and every routing rule by hand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dmole.data.collate import collate
from dmole.data.sample import Sample
from dmole.methods.dmole.features import FeatureStore, router_features
from dmole.methods.dmole.routing import Router, train_autoencoder, voted
from dmole.methods.dmole.settings import RouterSettings
from dmole.models.adapters import add_experts, attach
from dmole.models.prompts import instruction_ids
from dmole.models.vision_language import VisionLanguageModel
from dmole_kernels import ExpertGates
from mini_cmit.model.tiny import build_tiny_model

FAST = RouterSettings(hidden=16, epochs=30, batch_size=16, learning_rate=1e-2, final_learning_rate=1e-3)


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return build_tiny_model(0)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    folder = tmp_path_factory.mktemp("images")
    made = []
    for i, text in enumerate(("Answer.", "Answer with the letter. " * 2, "Describe the image.", "no")):
        image: Path = folder / f"{i}.png"
        Image.new("RGB", (16, 16), (60 * i, 90, 200 - 40 * i)).save(image)
        made.append(Sample(id=f"s{i}", images=(image,), instruction=text, answers=("yes",)))
    return tuple(made)


def cluster(centre: int, count: int = 40, width: int = 12, seed: int = 0) -> Tensor:
    """Unit vectors near a direction of their own."""
    generator = torch.Generator().manual_seed(100 * seed + centre)
    z = torch.zeros(width)
    z[3 * centre : 3 * centre + 3] = torch.tensor([1.0, 0.6, 0.3])
    return F.normalize(z + 0.05 * torch.rand(count, width, generator=generator), dim=1)


def router_of(*tasks: str, settings: RouterSettings = FAST) -> Router:
    router = Router(settings)
    for i, task in enumerate(tasks):
        router.add_task(task, cluster(i), generator=torch.Generator().manual_seed(i))
    return router


class Scripted(Router):
    """A router whose errors and thresholds are given: the rules alone."""

    def __init__(self, errors: list[list[float]], thresholds: list[float], top_k: int = 2) -> None:
        super().__init__(RouterSettings(top_k=top_k))
        self.tasks = tuple("abcdefgh"[: len(thresholds)])
        self._thresholds_T = torch.tensor(thresholds)
        self.scripted = torch.tensor(errors)

    def errors(self, features_ND: Tensor) -> Tensor:
        return self.scripted


# Features


def test_features_are_unit_vectors_of_both_towers(vlm: VisionLanguageModel, samples: tuple[Sample, ...]) -> None:
    z = router_features(vlm, samples)
    assert z.shape == (4, 64) and z.dtype == torch.float32 and not z.requires_grad
    assert torch.allclose(z.norm(dim=1), torch.ones(4))
    with torch.no_grad():
        sample = samples[1]
        batch = collate(vlm, [sample], with_answers=False)
        tower = vlm.model.model.vision_tower(pixel_values=batch.encoded.inputs["pixel_values"])
        vision = tower.last_hidden_state.amax(dim=1)
        ids, _ = instruction_ids(vlm.processor, [sample.instruction])
        assert vlm.tokenizer.decode(ids[0]).strip() == sample.instruction.strip()
        text = vlm.model.model.language_model(input_ids=ids).last_hidden_state.amax(dim=1)
    assert torch.allclose(z[1], F.normalize(torch.cat([vision, text], dim=1), dim=1)[0], atol=1e-5)


def test_a_feature_does_not_depend_on_batch_mates(vlm: VisionLanguageModel, samples: tuple[Sample, ...]) -> None:
    """The longest instruction pads the others; pooling over padding would move their features by far more than this."""
    together = router_features(vlm, samples)
    alone = torch.cat([router_features(vlm, (sample,)) for sample in samples])
    assert torch.allclose(together, alone, atol=1e-6)
    assert torch.allclose(router_features(vlm, samples, batch_size=3), together, atol=1e-6)


def test_features_are_of_the_pretrained_model(samples: tuple[Sample, ...]) -> None:
    vlm = build_tiny_model(0)
    before = router_features(vlm, samples)
    adapters = attach(vlm.model, vlm.candidates, gates={t: ExpertGates() for t in vlm.candidates}, dropout=0.5)
    add_experts(adapters, adapters, "e", rank=2, alpha=4.0)
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.bank.expert("e").lora_b)
    vlm.model.train()
    assert torch.equal(router_features(vlm, samples), before)
    assert vlm.model.training
    assert adapters[next(iter(adapters))].bank.expert("e").lora_b.requires_grad


def test_the_store_computes_each_batch_once(
    vlm: VisionLanguageModel, samples: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []

    def counted(vlm: VisionLanguageModel, samples: Sequence[Sample], *, batch_size: int) -> Tensor:
        computed.append(len(samples))
        return router_features(vlm, samples, batch_size=batch_size)

    monkeypatch.setattr("dmole.methods.dmole.features.router_features", counted)
    store = FeatureStore(vlm, batch_size=2)
    first = store.features(samples[:3])
    kept = first.clone()
    first.zero_()  # the caller's own copy
    renamed = [replace(sample, id="other") for sample in samples[:3]]
    assert torch.equal(store.features(renamed), kept) and computed == [3] and len(store) == 1
    with torch.inference_mode():  # as evaluation calls it
        store.features(samples)
    assert computed == [3, 4]


def test_what_the_store_holds_changes_no_bit_of_another_batch(samples: tuple[Sample, ...]) -> None:
    """With entries by sample, a batch would get the bits of the batches in which its samples came first."""
    vlm = build_tiny_model(0)
    many = [replace(samples[i % 4], instruction=f"{samples[i % 4].instruction} {'yes ' * i}") for i in range(24)]
    store = FeatureStore(vlm)
    for sample in many[:8]:
        store.features([sample])
    store.features(many[4:20])
    assert torch.equal(store.features(many), FeatureStore(vlm).features(many))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(store.features(many), FeatureStore(vlm).features(many))
    finally:
        torch.set_num_threads(before)


def test_an_instruction_without_tokens_is_refused(vlm: VisionLanguageModel, samples: tuple[Sample, ...]) -> None:
    empty = replace(samples[0], id="mute", instruction=" ")
    with pytest.raises(ValueError, match="samples 's3' to 'mute': instruction: got a text without a token"):
        router_features(vlm, (samples[3], empty))


def test_a_sample_without_images_has_zeros_for_the_vision_tower(
    vlm: VisionLanguageModel, samples: tuple[Sample, ...]
) -> None:
    z = router_features(vlm, (replace(samples[0], images=()), samples[1]))
    assert not z[0, :32].any() and z[0, 32:].any() and z[1, :32].any()


# Autoencoders and thresholds


@pytest.mark.parametrize("decoder", ["sigmoid", "linear"])
def test_training_lowers_the_error_and_repeats(decoder: str) -> None:
    settings = RouterSettings(hidden=16, epochs=40, batch_size=8, learning_rate=1e-2, decoder=decoder)  # type: ignore[arg-type]
    z = cluster(0)
    trained, losses = train_autoencoder(z, settings, generator=torch.Generator().manual_seed(0))
    assert len(losses) == 40 and losses[-1] < 0.2 * losses[0]
    torch.manual_seed(123)  # the global state plays no part
    again, losses_again = train_autoencoder(z, settings, generator=torch.Generator().manual_seed(0))
    assert losses == losses_again
    assert torch.equal(trained.decoder_weight_DH, again.decoder_weight_DH)
    other, _ = train_autoencoder(z, settings, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(trained.decoder_weight_DH, other.decoder_weight_DH)


@pytest.mark.parametrize("decoder", ["sigmoid", "linear"])
def test_errors_are_those_of_equation_9(decoder: str) -> None:
    settings = RouterSettings(hidden=5, epochs=2, decoder=decoder)  # type: ignore[arg-type]
    z = cluster(0)
    ae, _ = train_autoencoder(z, settings, generator=torch.Generator().manual_seed(3))
    hidden = F.linear(z, ae.encoder_weight_HD, ae.encoder_bias_H).relu()
    output = F.linear(hidden, ae.decoder_weight_DH, ae.decoder_bias_D)
    output = output.sigmoid() if decoder == "sigmoid" else output
    router = Router(settings)
    router.add_task("t", z, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(router.errors(z)[:, 0], (output - z).square().mean(dim=1), atol=1e-6)


def test_patience_stops_early() -> None:
    settings = RouterSettings(hidden=4, epochs=500, learning_rate=0.5, final_learning_rate=0.5, patience=3)
    _, losses = train_autoencoder(cluster(0), settings, generator=torch.Generator().manual_seed(0))
    assert len(losses) < 500
    assert min(losses[-3:]) >= min(losses[:-3])


def test_the_threshold_is_a_quantile_times_the_margin() -> None:
    settings = RouterSettings(hidden=16, epochs=5, quantile=0.9, margin=1.5)
    router = Router(settings)
    threshold = router.add_task("t", cluster(0), generator=torch.Generator().manual_seed(0))
    want = 1.5 * float(router.errors(cluster(0))[:, 0].quantile(0.9))
    assert threshold == pytest.approx(want) == pytest.approx(router.thresholds["t"])

    held_out = cluster(0, seed=7)
    calibrated = Router(settings)
    generator = torch.Generator().manual_seed(0)
    threshold = calibrated.add_task("t", cluster(0), generator=generator, calibration_ND=held_out)
    assert threshold == pytest.approx(1.5 * float(calibrated.errors(held_out)[:, 0].quantile(0.9)))
    assert threshold != pytest.approx(want, rel=1e-6)


def test_tasks_are_told_apart_and_strangers_go_to_the_base_model() -> None:
    router = router_of("a", "b", "c")
    for i, task in enumerate("abc"):
        routes = router.select(cluster(i, seed=5))
        assert sum(chosen[:1] == (task,) for chosen in routes.chosen) >= 36
    assert router.select(cluster(3)).chosen == ((),) * 40


def test_router_refuses_a_task_twice_and_no_data() -> None:
    router = router_of("a")
    with pytest.raises(ValueError, match="task: got 'a', which the router has; expected a new one"):
        router.add_task("a", cluster(0), generator=torch.Generator())
    with pytest.raises(ValueError, match=r"features: got \(0, 12\); expected \[N, D\] with at least one sample"):
        router.add_task("b", torch.empty(0, 12), generator=torch.Generator())


def test_state_round_trip() -> None:
    router = router_of("a", "b")
    tensors, meta = router.state()
    loaded = Router(FAST)
    loaded.load_state(tensors, meta)
    z = torch.cat([cluster(0, seed=5), cluster(1, seed=5)])
    assert loaded.tasks == ("a", "b") and loaded.thresholds == router.thresholds
    assert torch.equal(loaded.errors(z), router.errors(z))
    for each in (router, loaded):
        each.add_task("c", cluster(2), generator=torch.Generator().manual_seed(2))
    assert torch.equal(loaded.errors(z), router.errors(z))

    empty = Router(FAST)
    empty.load_state(*Router(FAST).state())
    assert empty.tasks == ()
    with pytest.raises(ValueError, match="router state: got tensors of .* tasks; expected .* with 1 each"):
        loaded.load_state(tensors, {**meta, "tasks": ["a"]})


# The rules


def test_top_two_under_the_threshold_best_first() -> None:
    router = Scripted(
        [
            [0.3, 0.1, 0.2],  # all under: the two lowest
            [0.3, 0.9, 0.9],  # one under
            [0.9, 0.9, 0.9],  # none: base model
            [0.5, 0.4, 0.9],  # equal to the threshold counts as under (Eq. 10)
        ],
        [0.5, 0.5, 0.5],
    )
    routes = router.select(torch.zeros(4, 1))
    assert routes.chosen == (("b", "c"), ("a",), (), ("b", "a"))
    assert routes.gate_NT.tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]


def test_a_threshold_is_the_tasks_own() -> None:
    router = Scripted([[0.3, 0.4]], [0.2, 0.5])
    assert router.select(torch.zeros(1, 1)).chosen == (("b",),)
    assert Scripted([[0.3, 0.4]], [0.5, 0.5], top_k=1).select(torch.zeros(1, 1)).chosen == (("a",),)


def test_a_batch_of_many_tasks_is_served_wrongly_by_its_vote() -> None:
    """Four tasks, two samples each: per sample all are right; the vote serves two tasks, or one, to everybody."""
    errors = [[0.1 if t == n // 2 else 0.9 for t in range(4)] for n in range(8)]
    own = ["abcd"[n // 2] for n in range(8)]
    router = Scripted(errors, [0.5] * 4)
    per_sample = router.select(torch.zeros(8, 1)).chosen
    assert per_sample == tuple((task,) for task in own)
    voted = router.select(torch.zeros(8, 1), mode="batch_vote").chosen
    assert voted == (("a",),) * 8  # a quarter of the votes each: no runner-up reaches 30 %


def test_the_vote_elects_a_second_expert_from_thirty_percent() -> None:
    def batch(a: int, b: int, nobody: int) -> Scripted:
        rows = [[0.1, 0.9]] * a + [[0.9, 0.1]] * b + [[0.9, 0.9]] * nobody
        return Scripted(rows, [0.5, 0.5])

    assert batch(7, 3, 0).select(torch.zeros(10, 1), mode="batch_vote").chosen == (("a", "b"),) * 10
    assert batch(8, 2, 0).select(torch.zeros(10, 1), mode="batch_vote").chosen == (("a",),) * 10
    assert batch(0, 4, 6).select(torch.zeros(10, 1), mode="batch_vote").chosen == (("b",),) * 10
    assert batch(0, 0, 3).select(torch.zeros(3, 1), mode="batch_vote").chosen == ((),) * 3
    with pytest.raises(ValueError, match="mode: got 'vote'; expected 'per_sample' or 'batch_vote'"):
        batch(1, 1, 0).select(torch.zeros(2, 1), mode="vote")  # type: ignore[arg-type]


def test_nearest_old_task() -> None:
    router = Scripted([[0.3, 0.1], [0.2, 0.9], [0.7, 0.8]], [0.25, 0.05])
    z = torch.zeros(3, 1)
    assert router.nearest(z).tolist() == [1, 0, 0]
    assert router.nearest(z, within_threshold=True).tolist() == [-1, 0, -1]
    assert Router(FAST).nearest(z).tolist() == [-1, -1, -1]


def test_the_public_code_s_batch_votes_for_its_neighbour() -> None:
    assert voted(torch.tensor([2, -1, 2, 0])).tolist() == [2, 2, 2, 2]
    assert voted(torch.tensor([-1, -1])).tolist() == [-1, -1]
    # Four tasks with a quarter of the votes each: none has 30 %, and the new expert is alone.
    assert voted(torch.tensor([0, 1, 2, 3])).tolist() == [-1, -1, -1, -1]


def test_without_tasks_everybody_gets_the_base_model() -> None:
    routes = Router(FAST).select(cluster(0))
    assert routes.chosen == ((),) * 40 and routes.gate_NT.shape == (40, 0)
