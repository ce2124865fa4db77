"""The training loop in one process: it learns, it continues exactly, it stops on NaN, it survives empty images."""

import json

import pytest
import torch

from i3cl.config import with_overrides
from i3cl.data.formats.records import record_from_row
from i3cl.data.loading.images import decode_image
from i3cl.data.loading.transforms import EvalTransform, to_target
from i3cl.model.network import I3CL
from i3cl.model.targets import read_truths
from i3cl.training.loop import Trainer, TrainingStopped


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
    """Body of a process of a gloo group: trains to the end; rank 0 leaves its weights in `run`."""
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=workers)
    torch.set_num_threads(1)
    torch.manual_seed(settings.train.seed)
    trainer = Trainer(settings, I3CL(settings.model), torch.device("cpu"), rank, workers, str(run))
    trainer.parallel = torch.nn.parallel.DistributedDataParallel(trainer.model, find_unused_parameters=True)
    trainer.run(lambda metrics, step: None)
    if rank == 0:
        torch.save(trainer.model.state_dict(), run / "weights.pt")
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


def test_a_machine_that_leaves_costs_no_step(tiny_settings, tmp_path):
    from i3cl.training.loop import MachineLeaves

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
    assert asked == [5, 10]
    assert [step for step, _ in reports] == [10]
    assert "hmean" not in reports[0][1], "there may be no time to validate"
    continued = make_trainer(settings, tmp_path / "continued")
    continued.restore(tmp_path / "checkpoint")
    continued.run(lambda metrics, step: None)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, continued.model.state_dict()[name]), name
