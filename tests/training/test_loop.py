"""The training loop in one process: it learns, it continues exactly, it stops on NaN, it survives empty images."""

import json
import re
import shutil
import weakref

import numpy as np
import pytest
import torch

from i3cl.config import with_overrides
from i3cl.data.formats.records import record_from_row
from i3cl.data.loading.images import decode_image
from i3cl.data.loading.transforms import EvalTransform, to_target
from i3cl.detections import Detections
from i3cl.errors import UserError
from i3cl.model.network import I3CL
from i3cl.model.targets import read_truths
from i3cl.training import loop
from i3cl.training.loop import Trainer, TrainingStopped, exchange_options


def make_trainer(settings, run, **overrides):
    settings = with_overrides(settings, overrides, "test") if overrides else settings
    torch.manual_seed(settings.train.seed)
    torch.set_num_threads(1)
    return Trainer(settings, I3CL(settings.model), torch.device("cpu"), 0, 1, str(run))


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def loss_on_fixed_proposals(trainer):
    """Total loss of the first six images with proposals around the truth, the same before and after training.

    The losses of a run itself do not compare: they grow with the positives that a better proposal network finds.
    """
    torch.manual_seed(0)
    rows, data = trainer.mixture.table.to_pylist()[:6], trainer.settings.data
    transform = EvalTransform(data.test_short_side, data.test_long_side)
    images, targets = zip(*[to_target(transform(decode_image(row["path"]), record_from_row(row))) for row in rows])
    boxes = [target["boxes"] for target in targets]
    shifts = torch.tensor([[0.0, 0, 0, 0], [2, 1, 2, 1], [-2, 1, -2, 1], [30, 0, 30, 0], [0, -25, 0, -25]])
    proposals = [(b[:, None] + shifts).reshape(-1, 4) for b in boxes]
    model = trainer.model.train()
    with torch.no_grad():
        levels = model.features(model.batch(images))
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        losses = model.losses_of(levels, sizes, read_truths(targets, torch.device("cpu")), proposals)
    return float(sum(losses.values()))


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_thirty_steps_lower_the_loss_and_resume_bit_for_bit(tiny_settings, tmp_path, decay):
    whole = make_trainer(tiny_settings, tmp_path / "whole", **{"train.average_decay": decay})
    saved = tmp_path / "checkpoint"
    reports = []

    def keep_first(metrics, step):
        reports.append((step, metrics))
        if step == 15:
            whole.save(saved)

    before = loss_on_fixed_proposals(make_trainer(tiny_settings, tmp_path / "untrained"))
    whole.run(keep_first)
    trained = make_trainer(tiny_settings, tmp_path / "trained")
    trained.model.load_state_dict(whole.model.state_dict())
    assert loss_on_fixed_proposals(trained) < 0.95 * before
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert len(losses) == 30
    assert [step for step, _ in reports] == [15, 30]
    assert {"hmean", "recall", "precision", "loss_mask"} <= reports[-1][1].keys()

    continued = make_trainer(tiny_settings, tmp_path / "continued", **{"train.average_decay": decay, "train.seed": 0})
    continued.restore(saved)
    assert continued.step == 15
    continued.run(lambda metrics, step: None)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, continued.model.state_dict()[name]), name
    again = [json.loads(line)["loss"] for line in (tmp_path / "continued" / "metrics.jsonl").read_text().splitlines()]
    assert again == losses


def test_nan_names_step_part_and_images(tiny_settings, tmp_path):
    trainer = make_trainer(tiny_settings, tmp_path / "run")
    with torch.no_grad():
        next(p for name, p in trainer.model.named_parameters() if name.startswith("heads.mask")).fill_(float("nan"))
    with pytest.raises(TrainingStopped, match=r"step 1: .*loss_mask = nan.*images of the batch: \d+\.jpg, \d+\.jpg"):
        trainer.run(lambda metrics, step: None)


def test_checkpoint_alone_is_enough_to_predict(tiny_settings, tmp_path, tiny_set):
    import i3cl

    trainer = make_trainer(tiny_settings, tmp_path / "run", **{"train.steps": 1, "model.score_threshold": 0.0})
    trainer.run(lambda metrics, step: None)
    trainer.save(tmp_path / "checkpoint")
    model = i3cl.load(str(tmp_path / "checkpoint"))
    assert not model.training
    found = i3cl.detect(model, [str(tiny_set / "images" / "0.jpg")], score_threshold=0.0)[0]
    assert (found.height, found.width) == (96, 96) and len(found) > 0
    for polygon, score in found:
        assert polygon.shape[1] == 2 and len(polygon) >= 3 and 0 <= score <= 1
        assert polygon.min() >= 0 and polygon.max() <= 96
    trainer.model.recipe = trainer.settings
    expected = i3cl.detect(trainer.model.eval(), [str(tiny_set / "images" / "0.jpg")], score_threshold=0.0)[0]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected])


def test_metrics_reach_tensorboard(tiny_settings, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tiny_settings, tmp_path / "run", **{"train.steps": 2, "train.checkpoint_every": 2})
    trainer.run(lambda metrics, step: None)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.step for event in events.Scalars("hmean")] == [2]


def test_images_without_instances_train(tiny_settings, tmp_path, tiny_set):
    source = {"annotations": str(tiny_set / "unlabelled.json"), "images": str(tiny_set / "images")}
    trainer = make_trainer(tiny_settings, tmp_path / "run", **{"data.train": [source], "train.steps": 2})
    trainer.run(lambda metrics, step: None)
    assert trainer.step == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def train_in_a_group(rank, workers, settings, run, rendezvous):
    """Body of a process of a gloo group: trains to the end; rank 0 leaves in `run` its weights and when it asked the others."""
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=workers)
    torch.set_num_threads(1)
    torch.manual_seed(settings.train.seed)
    trainer = Trainer(settings, I3CL(settings.model), torch.device("cpu"), rank, workers, str(run))
    trainer.parallel = torch.nn.parallel.DistributedDataParallel(trainer.model, **exchange_options())
    calls, reduce = [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda tensor: calls.append(trainer.step) or reduce(tensor)
    trainer.run(lambda metrics, step: None)
    if rank == 0:
        torch.save(trainer.model.state_dict(), run / "weights.pt")
        (run / "calls.json").write_text(json.dumps(calls))
    torch.distributed.destroy_process_group()


def test_a_run_does_not_depend_on_how_many_workers_are_there(tiny_settings, tmp_path):
    steps = {"train.steps": 3, "train.checkpoint_every": 3, "cluster.workers": 3, "data.validation": None}
    # Plain SGD: AdamW makes steps of full size out of the rounding of vanishing gradients.
    steps |= {"train.optimizer": "sgd", "train.learning_rate": 0.05, "train.warmup_steps": 0}
    settings = with_overrides(tiny_settings, steps, "test")
    alone = make_trainer(settings, tmp_path / "alone")
    before = weights(alone)
    alone.run(lambda metrics, step: None)
    run = tmp_path / "two"
    run.mkdir()
    # Three shares on two workers: one takes two of them.
    arguments = (2, settings, run, tmp_path / "rendezvous")
    torch.multiprocessing.spawn(train_in_a_group, arguments, nprocs=2)
    together = torch.load(run / "weights.pt", weights_only=True)
    moved = 0.0
    # Parameters only: running statistics are those of the batches that the first worker saw.
    for name, tensor in alone.model.named_parameters():
        assert torch.allclose(tensor, together[name], atol=1e-5), name
        moved = max(moved, float((tensor - before[name]).abs().max()))
    assert moved > 1e-3
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert json.loads((run / "calls.json").read_text()) == [0, 1, 2], "beside the gradients one exchange a step"


def test_the_network_is_set_to_training_once(tiny_settings, tmp_path, monkeypatch):
    trainer = make_trainer(
        tiny_settings, tmp_path / "run", **{"train.steps": 3, "train.checkpoint_every": 3, "data.validation": None}
    )
    modes, train = [], trainer.model.train
    monkeypatch.setattr(trainer.model, "train", lambda mode=True: modes.append(mode) or train(mode))
    trainer.model.eval()
    modes.clear()
    trainer.run(lambda metrics, step: None)
    assert modes == [True]


def all_but_one(trainer, records, root):
    """In place of a network that has learnt to read: every text of an image but the last."""
    for record in records:
        polygons = [instance.polygon for instance in record.instances][:-1]
        scores = np.linspace(0.9, 0.6, len(polygons), dtype=np.float32)
        yield record, Detections(polygons, scores, height=record.height, width=record.width)


def validate_in_a_group(rank, workers, settings, run, rendezvous):
    """Body of a process of a gloo group: validates; leaves its metrics and how many images it measured."""
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=workers)
    torch.set_num_threads(1)
    torch.manual_seed(settings.train.seed)
    trainer = Trainer(settings, I3CL(settings.model), torch.device("cpu"), rank, workers, str(run))
    Trainer._detect = all_but_one
    measured, update = [], loop.DetectionMetric.update
    loop.DetectionMetric.update = lambda metric, images: measured.append(len(images)) or update(metric, images)
    (run / f"{rank}.json").write_text(json.dumps([trainer.validate(), measured]))
    torch.distributed.destroy_process_group()


def test_every_worker_measures_its_own_validation_images(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_detect", all_but_one)
    for images in (3, 1):  # one more than workers, and fewer
        settings = with_overrides(tiny_settings, {"train.validate_images": images}, "test")
        run = tmp_path / str(images)
        run.mkdir()
        alone = make_trainer(settings, run / "alone").validate()
        torch.multiprocessing.spawn(validate_in_a_group, (2, settings, run, run / "rendezvous"), nprocs=2)
        (first, measured), (second, measured_too) = (json.loads((run / f"{rank}.json").read_text()) for rank in range(2))
        assert first == second == alone
        assert 0 < alone["recall"] < 1 == alone["precision"]
        assert (measured, measured_too) == ([images - images // 2] * 2, [images // 2] * 2)


def test_a_machine_that_leaves_costs_no_step(tiny_settings, tmp_path, monkeypatch):
    from i3cl.training.loop import MachineLeaves

    monkeypatch.setattr(loop, "_ASK_EVERY", 0.0)
    settings = with_overrides(tiny_settings, {"train.steps": 12, "train.checkpoint_every": 12, "train.log_every": 6}, "test")
    whole = make_trainer(settings, tmp_path / "whole")
    whole.run(lambda metrics, step: None)
    warned, reports = make_trainer(settings, tmp_path / "warned"), []
    asked = []

    def leaving():
        asked.append(warned.step)
        return warned.step == 10

    def keep(metrics, step):
        reports.append((step, metrics))
        warned.save(tmp_path / "checkpoint")

    with pytest.raises(MachineLeaves, match="step 10: a machine of this run will be taken away"):
        warned.run(keep, leaving)
    assert asked == list(range(1, 11))
    assert [step for step, _ in reports] == [10]
    assert "hmean" not in reports[0][1], "there may be no time to validate"
    continued = make_trainer(settings, tmp_path / "continued")
    continued.restore(tmp_path / "checkpoint")
    continued.run(lambda metrics, step: None)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, continued.model.state_dict()[name]), name


def test_notices_are_asked_for_by_the_clock(tiny_settings, tmp_path):
    asked = []
    trainer = make_trainer(tiny_settings, tmp_path / "run", **{"train.steps": 3, "train.checkpoint_every": 3})
    trainer._asked = float("-inf")
    trainer.run(lambda metrics, step: None, lambda: bool(asked.append(trainer.step)))
    assert asked[:1] == [1], "long ago: at once"
    assert asked == sorted(set(asked))


# ------------------------------------------------------------------------------------------- several training sets


def two_sets(tiny_set):
    labelled = {"annotations": str(tiny_set / "set.json"), "images": str(tiny_set / "images"), "per_step": 1}
    strong = {"jitter": 1.0, "erase": 1.0, "policies": ["resize_only"]}
    return [labelled, {**labelled, "name": "pseudo", "per_step": 2, "loss_scale": 0.5, "transform": strong}]


def test_a_composed_step_continues_bit_for_bit_and_logs_losses_by_source(tiny_settings, tiny_set, tmp_path):
    changes = {"data.train": two_sets(tiny_set), "train.batch": 3, "train.steps": 6, "train.checkpoint_every": 3}
    changes |= {"train.average_decay": 0.9, "data.validation": None}
    whole = make_trainer(tiny_settings, tmp_path / "whole", **changes)
    whole.run(lambda metrics, step: whole.save(tmp_path / "checkpoint") if step == 3 else None)
    continued = make_trainer(tiny_settings, tmp_path / "continued", **changes)
    continued.restore(tmp_path / "checkpoint")
    continued.run(lambda metrics, step: None)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, continued.model.state_dict()[name]), name
    rows, again = ([row for row in t.log.rows if "loss" in row] for t in (whole, continued))
    assert [row["loss"] for row in rows] == [row["loss"] for row in again]
    for row in rows:
        # One image of the first set and two of the second add up to the mean over the three.
        assert (row["loss/set"] + 2 * row["loss/pseudo"]) / 3 == pytest.approx(row["loss"], rel=1e-4)


def test_batches_know_their_source_its_weight_and_its_augmentation(tiny_settings, tiny_set, tmp_path):
    trainer = make_trainer(tiny_settings, tmp_path / "run", **{"data.train": two_sets(tiny_set), "train.batch": 3})
    samples = next(trainer._batches())
    assert [sample.source for sample in samples] == [0, 1, 1]
    assert [to_target(sample)[1]["image_weight"] for sample in samples] == [1.0, 0.5, 0.5]
    erased = [bool((sample.image == (124, 116, 104)).all(axis=2).mean() > 0.005) for sample in samples]
    assert erased == [False, True, True]


# --------------------------------------------------------------------------------------------------- early stopping


def test_patience_stops_at_the_same_step_again_after_a_restart(tiny_settings, tmp_path, monkeypatch):
    scores = {1: 0.1, 2: 0.5, 3: 0.4, 4: 0.5, 5: 0.9}
    changes = {"train.steps": 5, "train.checkpoint_every": 1, "train.patience": 2}
    monkeypatch.setattr(Trainer, "validate", lambda self: {"hmean": scores[self.step]})
    trainer = make_trainer(tiny_settings, tmp_path / "run", **changes)
    trainer.run(lambda metrics, step: trainer.save(tmp_path / f"at-{step}"))
    assert trainer.step == 4, "3 and 4 are no better than 2"
    assert "F has not risen above 0.500 for 2 checkpoints" in trainer.log.rows[-1]["notes"][0]
    continued = make_trainer(tiny_settings, tmp_path / "continued", **changes)
    continued.restore(tmp_path / "at-4")
    continued.run(lambda metrics, step: pytest.fail("it has stopped"))
    off = make_trainer(tiny_settings, tmp_path / "off", **{**changes, "train.patience": 0})
    off.run(lambda metrics, step: None)
    assert off.step == 5


# ---------------------------------------------------------------------------------------------------------- faults


@pytest.fixture
def broken_set(tiny_set, tmp_path):
    """The tiny set with one file cut off and one that lies on its side; what a recipe changes to train on it."""
    shutil.copytree(tiny_set / "images", tmp_path / "images")
    whole = (tmp_path / "images" / "3.jpg").read_bytes()
    (tmp_path / "images" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    tree = json.loads((tiny_set / "set.json").read_text())
    tree["images"][5]["height"] = 120
    (tmp_path / "set.json").write_text(json.dumps(tree))
    return {"annotations": str(tmp_path / "set.json"), "images": str(tmp_path / "images")}


def test_an_unusable_image_stops_training_with_its_name(tiny_settings, broken_set, tmp_path):
    trainer = make_trainer(tiny_settings, tmp_path / "run", **{"data.train": [broken_set], "data.validation": None})
    with pytest.raises(TrainingStopped, match=r"3\.jpg: cannot be decoded|5\.jpg: the image is 96 x 96 but .* 96 x 120"):
        trainer.run(lambda metrics, step: None)
    trainer = make_trainer(tiny_settings, tmp_path / "valid", **{"data.validation": broken_set, "train.steps": 1})
    trainer.validation = (trainer.mixture._records[3:4], str(tmp_path / "images"))
    with pytest.raises(TrainingStopped, match=r"3\.jpg: cannot be decoded"):
        trainer.run(lambda metrics, step: None)


@pytest.mark.parametrize("through_ray", [False, True])
def test_skip_bad_leaves_unusable_images_out_and_counts_them(tiny_settings, broken_set, tmp_path, ray_cluster, through_ray):
    changes = {"data.train": [broken_set], "data.validation": broken_set, "data.skip_bad": True, "train.validate_images": 0}
    changes |= {"train.steps": 6, "train.checkpoint_every": 6, "data.ray_data": through_ray}
    trainer = make_trainer(tiny_settings, tmp_path / "run", **changes)
    trainer.run(lambda metrics, step: None)
    (row,) = [row for row in trainer.log.rows if "hmean" in row]
    assert row["skipped_images"] == 2
    assert "3.jpg: cannot be decoded" in "\n".join(row["notes"]) and "5.jpg: the image is 96 x 96" in "\n".join(row["notes"])
    assert row["notes"][-1] == "left out so far: 2 images"


def faulty_in_a_group(rank, workers, settings, run, rendezvous):
    """Body of a process of a gloo group whose rank 1 meets an unusable image; writes what stopped it."""
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=workers)
    torch.set_num_threads(1)
    trainer = Trainer(settings, I3CL(settings.model), torch.device("cpu"), rank, workers, str(run))
    trainer.parallel = torch.nn.parallel.DistributedDataParallel(trainer.model, **exchange_options())
    whole = trainer._batches()

    def cut_off():
        yield next(whole)
        yield next(whole)
        raise UserError("cut.jpg: cannot be decoded")

    if rank:
        trainer._batches = cut_off
    try:
        trainer.run(lambda metrics, step: None)
    except TrainingStopped as stop:
        (run / f"{rank}.txt").write_text(str(stop))
    torch.distributed.destroy_process_group()


def test_all_workers_stop_for_an_image_of_one(tiny_settings, tmp_path):
    settings = with_overrides(tiny_settings, {"cluster.workers": 2, "data.validation": None}, "test")
    torch.multiprocessing.spawn(faulty_in_a_group, (2, settings, tmp_path, tmp_path / "rendezvous"), nprocs=2)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["cut.jpg: cannot be decoded"] * 2


@pytest.mark.parametrize("place", ["forward", "backward", "update"])
def test_out_of_memory_names_step_sizes_and_remedy(tiny_settings, tmp_path, monkeypatch, place):
    trainer = make_trainer(tiny_settings, tmp_path / "run")
    held = []

    def full(*_, **__):
        tensor = torch.zeros(8)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    if place == "forward":
        monkeypatch.setattr(trainer, "_losses", full)
    elif place == "backward":
        monkeypatch.setattr(torch.Tensor, "backward", full)
    else:
        monkeypatch.setattr(trainer.optimizer, "step", full)
    with pytest.raises((TrainingStopped, UserError)) as stopped:
        trainer.run(lambda metrics, step: None)
    assert re.match(
        r"step 1: out of memory \(this machine\) for a batch of 2 images of 96 x 96 with \d+ instances, 96 x 96 with \d+ "
        r"instances; lower train\.batch, .*short_sides",
        str(stopped.value),
    )
    if place == "forward":
        assert held[0]() is None, "the failed pass is not kept alive"


def test_out_of_memory_in_validation_names_the_test_size(tiny_settings, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_settings, tmp_path / "run", **{"train.steps": 1})

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer, "_detect", full)
    with pytest.raises(
        TrainingStopped, match=r"^step 1: out of memory \(this machine\) in validation, at test size 96/96; lower"
    ):
        trainer.run(lambda metrics, step: None)


def test_workers_that_start_after_a_failure_of_one_only_carry_its_message(tiny_settings, tmp_path):
    (tmp_path / loop.STOPPED).write_text("step 1: out of memory")
    config = {"settings": tiny_settings.model_dump(mode="json"), "run": str(tmp_path)}
    assert loop.train_worker(config) == {"stopped": "step 1: out of memory"}


def gradients_in_a_group(rank, workers, settings, out, rendezvous):
    """Body of a process of a gloo group: the gradients of two steps with the old and the new options."""
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=workers)
    torch.set_num_threads(1)
    found = []
    for options in ({"find_unused_parameters": True}, exchange_options()):
        torch.manual_seed(0)
        trainer = Trainer(settings, I3CL(settings.model), torch.device("cpu"), rank, workers, str(out))
        trainer.parallel = torch.nn.parallel.DistributedDataParallel(trainer.model, **options).train()
        batches = trainer._ready_batches()
        for _ in range(2):
            trainer.optimizer.zero_grad(set_to_none=True)
            sum(trainer._losses(rank, next(batches)[1]).values()).backward()
            trainer.optimizer.step()
            trainer.step += 1
        found.append({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
    if rank == 0:
        torch.save(found, out / "gradients.pt")
    torch.distributed.destroy_process_group()


def test_leaner_exchange_gives_equal_gradients(tiny_settings, tmp_path):
    settings = with_overrides(tiny_settings, {"cluster.workers": 2, "data.validation": None}, "test")
    torch.multiprocessing.spawn(gradients_in_a_group, (2, settings, tmp_path, tmp_path / "rendezvous"), nprocs=2)
    old, new = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert old.keys() == new.keys() and len(old) > 50
    assert all(torch.equal(gradient, new[name]) for name, gradient in old.items())
    assert any(gradient.abs().max() > 1e-3 for gradient in old.values())
