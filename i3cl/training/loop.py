"""The loop that every training worker runs: batches, losses, optimiser, validation, checkpoints.

A step has `cluster.workers` shares of `train.batch` images. Worker r of w takes the shares r, r + w, …: one share each when all
workers are there, more when some are lost. The gradient is the mean over all shares, so a run does not depend on w (except for
the running statistics of its norms, which come from the shares that worker 0 saw).
"""

from __future__ import annotations

import inspect
import json
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import nn

from i3cl import observe, storage
from i3cl.config import Settings, to_yaml
from i3cl.data.formats.records import ImageRecord
from i3cl.data.loading.images import ImageError, check_size, decode_image
from i3cl.data.loading.ingest import mix, read_source, source_names, training_batches
from i3cl.data.loading.transforms import TrainingImage, to_target
from i3cl.detections import Detections
from i3cl.errors import UserError, inside
from i3cl.evaluation.metrics.batch import EvalImage, mark_small
from i3cl.evaluation.metrics.metric import DetectionMetric
from i3cl.evaluation.metrics.protocols import iou_rules
from i3cl.inference.device import autocast, full_float32
from i3cl.inference.predictor import Predictor
from i3cl.model.checkpoint import STATE, load_weights, save_checkpoint
from i3cl.model.network import I3CL
from i3cl.model.placement import to_device
from i3cl.model.shipped import folder_of
from i3cl.model.targets import read_truths
from i3cl.runtime.resources import machine_cores
from i3cl.training.schedule import WeightAverage, describe_rate, learning_rate, make_optimizer

REMOTE_EVERY = 30.0
"""Seconds between two uploads of the log to S3; every checkpoint uploads it too."""
_ASK_EVERY = 2.0
"""Seconds between two checks whether a machine's end has been announced; each is a round trip that all workers wait for."""
_SHOWN = 20
"""Unusable images that a run names one by one."""
STOPPED = "stopped.txt"
"""File of the run directory in which one of several workers says why training cannot go on, for the workers started after it."""
Pair = tuple[torch.Tensor, dict[str, Any]]
"""What the network trains on: an image and its target."""
T = TypeVar("T")


class MachineLeaves(Exception):
    """A machine of this run will be taken away; the state is saved."""


class TrainingStopped(RuntimeError):
    """Training cannot go on, and would fail again: a loss that is not a number, an unusable image, too little memory.

    The message is one line for the user. Raised on every rank.
    """


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's per-worker function. `config`: {'settings': the resolved tree as a dict, 'run': run directory}.

    Returns {'stopped': message} when training cannot go on (so that Ray does not retry what would fail again), else {}.
    """
    import ray.train
    from ray.exceptions import RayActorError
    from ray.train import CheckpointUploadMode
    from ray.train.torch import get_device, prepare_model

    settings = Settings.model_validate(config["settings"])
    note = storage.join(config["run"], STOPPED)
    stopped = storage.read_text_if_there(note)
    if stopped is not None:
        # Ray starts the workers again after any failure; this one would come again.
        return {"stopped": stopped}
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    # Blocks of memory that grow leave fewer unusable gaps when image sizes change from step to step.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device = get_device()
    threads = settings.cluster.threads or max(1, machine_cores() // context.get_local_world_size())
    torch.set_num_threads(threads)
    torch.manual_seed(settings.train.seed)

    try:
        if not storage.exists(storage.join(config["run"], "settings.yaml")):  # the driver has written it
            raise UserError(
                f"storage: {config['run']} is not there on {socket.gethostname()}; give a folder that all machines of the "
                "cluster share or an s3:// URL"
            )
        trainer = prepare(settings, device, rank, workers, config["run"])
    except UserError as error:
        if workers > 1:
            # Other nodes may not have this fault; their workers would wait for this one.
            raise
        return {"stopped": str(error)}
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            try:
                trainer.restore(Path(folder))
            except UserError as error:  # the same in every worker
                return {"stopped": str(error)}
    if rank == 0:
        observe.training_started(config["run"], workers)
    where = observe.place(config["run"], "train")
    observe.note(f"rank {rank} of {workers} on {device}: from step {trainer.step}", **where, rank=rank, step=trainer.step)
    trainer.parallel = prepare_model(trainer.model, parallel_strategy_kwargs=exchange_options())

    uploading: Path | None = None
    warned = False

    def leaving() -> bool:
        nonlocal warned
        warned = ray.train.get_preemption_info() is not None
        return warned

    def report(metrics: dict[str, Any], step: int) -> None:
        nonlocal uploading
        if rank:
            ray.train.report(metrics)
            return
        started = time.perf_counter()
        folder = Path(tempfile.mkdtemp(prefix="checkpoint_"))
        trainer.save(folder)
        # Training goes on while a checkpoint travels to S3. Not while the one before is still on its way, or the disk would fill;
        # and not when a machine is about to be taken away.
        waits = warned or (uploading is not None and uploading.exists())
        mode = CheckpointUploadMode.ASYNC if storage.is_remote(config["run"]) and not waits else CheckpointUploadMode.SYNC
        uploading = folder
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"step_{step:07d}",
            checkpoint_upload_mode=mode,
            delete_local_checkpoint_after_upload=True,
        )
        seconds = time.perf_counter() - started
        observe.checkpoint(config["run"], seconds)
        observe.note(
            f"checkpoint of step {step} held up training {seconds:.1f} s", **where, rank=rank, step=step, seconds=seconds
        )

    try:
        trainer.run(report, leaving)
    except MachineLeaves as notice:
        observe.note(str(notice), **where, level="WARNING", rank=rank, step=trainer.step)
        # Ray must have registered the checkpoint before the workers end. It does not count this error as a failure: it starts
        # the workers again at once, on the machines that stay.
        ray.train.get_all_reported_checkpoints(timeout_s=30)
        raise RayActorError(error_msg=str(notice), preempted=True) from None
    except TrainingStopped as stop:
        return {"stopped": str(stop)}
    except UserError as error:
        if workers > 1:
            # The other workers wait for this one's gradients: only its failure ends them.
            storage.write_text_atomic(note, str(error))
            raise
        # From a Ray Data task the error comes in a wrapper of Ray's, whose text is a traceback.
        return {"stopped": str(inside(error, UserError))}
    return {}


def exchange_options() -> dict[str, bool]:
    """Arguments of DistributedDataParallel for this network.

    Every trained parameter has a gradient at every step, so none has to be searched for. Statistics are not sent at every step:
    training does not read them, and before validation every rank takes those of rank 0.
    """
    known = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
    statistics = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {"gradient_as_bucket_view": True, statistics: False}


def prepare(settings: Settings, device: torch.device, rank: int, workers: int, run: str) -> Trainer:
    """A trainer at step 0 with the network's initial weights; its log's notes say what was loaded and what is new.

    Args:
        settings: as `launch.located` returns them.
        device: where the network runs.
        rank: number of this worker.
        workers: how many there are.
        run: run directory.

    Raises:
        UserError: the weights are missing or belong to another network.
    """
    full_float32(settings.train.precision)
    model = I3CL(settings.model)
    notes = []
    if model.backbone.report is not None:
        notes.append(f"backbone weights '{settings.model.backbone.weights}': {model.backbone.report}")
    if settings.train.start_from:
        with storage.local_copy(folder_of(settings.train.start_from), without=STATE) as folder:
            notes.append(f"start_from {settings.train.start_from}: {load_weights(model, folder)}")
    try:
        model = model.to(device).to(memory_format=torch.channels_last)
        trainer = Trainer(settings, model, device, rank, workers, run)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory ({_where(device)}) for the network alone; free it or take a smaller model.backbone"
        ) from None
    notes.append(describe_rate(trainer.steps, trainer.images_per_step, settings.train))
    trainer.log.notes(notes)
    return trainer


@dataclass
class MetricsLog:
    """Rows of numbers by step, written as JSON lines and TensorBoard events to the run directory by rank 0 alone.

    A run that continues drops the rows after its checkpoint, so that no step appears twice.
    """

    run: str
    enabled: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    _events: Any = None
    _flushed: float = -math.inf

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, which has `step`; its numbers also go to TensorBoard."""
        self.rows.append(row)
        if not self.enabled:
            return
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            self._folder = (
                tempfile.mkdtemp(prefix="events_") if storage.is_remote(self.run) else storage.join(self.run, "tensorboard")
            )
            self._events = SummaryWriter(self._folder, purge_step=row.get("step"))
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self._events.add_scalar(key, value, row["step"])

    def notes(self, lines: list[str]) -> None:
        """Put lines of text in front of the first row of a new run."""
        if self.enabled and lines and not self.rows:
            self.rows.append({"step": 0, "notes": lines})

    def flush(self, now: bool = True) -> None:
        """Write the whole log. With now=False, at most twice a minute to S3, where every write sends all of it."""
        if not self.enabled or (not now and storage.is_remote(self.run) and time.monotonic() - self._flushed < REMOTE_EVERY):
            return
        self._flushed = time.monotonic()
        storage.write_text_atomic(storage.join(self.run, "metrics.jsonl"), "".join(json.dumps(row) + "\n" for row in self.rows))
        if self._events is not None:
            self._events.flush()
            if storage.is_remote(self.run):
                for path in Path(self._folder).iterdir():
                    storage.write_bytes_atomic(storage.join(self.run, "tensorboard", path.name), path.read_bytes())


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; a thread makes the next one while one is in use."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        end = object()
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


class _SourceLosses:
    """Mean loss of the images of each training set since the last row of the log."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._sums: dict[int, float] = {}
        self._counts: dict[int, int] = {}

    def add(self, images: list[TrainingImage], shares: list[float]) -> None:
        """shares: what each image of a batch added to the batch's loss."""
        for image, share in zip(images, shares, strict=True):
            self._sums[image.source] = self._sums.get(image.source, 0.0) + share * len(images)
            self._counts[image.source] = self._counts.get(image.source, 0) + 1

    def row(self) -> dict[str, float]:
        """loss/NAME of every set that had an image; begins again at nothing."""
        row = {f"loss/{self.names[source]}": self._sums[source] / self._counts[source] for source in sorted(self._sums)}
        self._sums, self._counts = {}, {}
        return row


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _where(device: torch.device) -> str:
    """What ran out of memory, in words."""
    if device.type != "cuda":
        return "this machine"
    return f"{torch.cuda.get_device_name(device)}, {torch.cuda.mem_get_info(device)[1] / 2**30:.0f} GiB"


def _stand_in() -> Pair:
    """What a rank without usable images puts through the network, so that it keeps step until all ranks stop together."""
    nothing = torch.zeros(0, dtype=torch.int64)
    target = {"boxes": torch.zeros(0, 4), "labels": nothing, "masks": [], "image_weight": 0.0}
    return torch.zeros(3, 64, 64), target


def _not_finite(losses: dict[str, float], samples: list[TrainingImage]) -> list[str]:
    """What is wrong with the losses of one batch: one line or none."""
    parts = [f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value)]
    names = ", ".join(sample.record.file_name for sample in samples)
    return [f"{', '.join(parts)}; images of the batch: {names}"] if parts else []


class Trainer:
    """Everything that one worker needs for training; `run` trains from the current step to the last."""

    def __init__(self, settings: Settings, model: I3CL, device: torch.device, rank: int, workers: int, run: str) -> None:
        self.settings = settings
        self.model = model
        self.parallel: nn.Module = model
        self.device = device
        self.rank = rank
        self.workers = workers
        self.shares = range(rank, settings.cluster.workers, workers)
        self.step = 0
        self.log = MetricsLog(run, rank == 0)
        self.by_source = _SourceLosses(source_names(settings.data.train))
        model.keep_image_losses = len(settings.data.train) > 1
        self.skipped: dict[str, None] = {}
        """Why images were left out, each once, in the order in which they were met."""
        self._told = 0
        self._asked = time.monotonic()
        self._ask = False
        self.optimizer = make_optimizer(model, settings.train)
        self.average = WeightAverage(model, settings.train.average_decay) if settings.train.average_decay else None
        data = settings.data
        self.mixture = mix(data.train, settings.data_root, data.skip_bad, check_files=False, batch=settings.train.batch)
        self.images_per_step = settings.train.batch * settings.cluster.workers
        self.steps = settings.train.steps
        if settings.train.epochs is not None:
            self.steps = self.mixture.steps(settings.train.epochs, self.images_per_step)
        self.validation: tuple[Sequence[ImageRecord], str] | None = None
        self._validation_checked = False
        if settings.data.validation is not None:
            records = read_source(settings.data.validation, settings.data_root, settings.data.skip_bad, check_files=False)
            kept = records.records[: settings.train.validate_images or None]
            self.validation = (kept[rank::workers], records.images_root)

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint directory that `save` wrote."""
        try:
            state = torch.load(folder / STATE / "state.pt", map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).split("\n")[0] or "the file is empty"
            if isinstance(error, UnpicklingError):
                reason = "damaged, or holds more than tensors and numbers"
            raise UserError(
                f"{folder / STATE / 'state.pt'}: training cannot continue from it ({reason}); give another name=…"
            ) from error
        self.step = state["step"]
        if self.average is not None:
            self.model.load_state_dict(state["model"])
            load_weights(self.average.model, folder)
            self.average.updates = state["updates"]
        else:
            load_weights(self.model, folder)
        self.optimizer.load_state_dict(state["optimizer"])
        lines = (folder / STATE / "metrics.jsonl").read_text().splitlines()
        self.log.rows = [json.loads(line) for line in lines]

    def save(self, folder: Path) -> None:
        """Write a complete checkpoint: weights and settings for prediction, and separately the state of training."""
        save_checkpoint(self._best_model(), folder, to_yaml(self.settings))
        state: dict[str, Any] = {"step": self.step, "optimizer": self.optimizer.state_dict()}
        if self.average is not None:
            state |= {"model": self.model.state_dict(), "updates": self.average.updates}
        (folder / STATE).mkdir()
        torch.save(state, folder / STATE / "state.pt")
        (folder / STATE / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.log.rows))

    def _best_model(self) -> I3CL:
        return self.model if self.average is None else self.average.model  # type: ignore[return-value]

    def run(self, report: Callable[[dict[str, Any], int], None], leaving: Callable[[], bool] = lambda: False) -> None:
        """Train to the last step, or until `train.patience` ends the run.

        Args:
            report: called with metrics and step at every checkpoint, on every rank.
            leaving: whether a machine is about to be taken away; gives the same answer on every rank.

        Raises:
            MachineLeaves: a machine will be taken away; a checkpoint has been saved, without validation, as time is short.
            TrainingStopped: training cannot go on; on every rank.
            UserError: memory ran out while gradients were computed or applied; on this rank alone.
        """
        train = self.settings.train
        batches = self._ready_batches()
        # Once: going through all modules at every step takes longer than many of its kernels.
        self.parallel.train()
        sums: dict[str, float] = {}
        since, images, data_time = time.perf_counter(), 0, 0.0
        while self.step < self.steps and not self.stalled():
            losses, rate, waited = self._train_step(batches)
            self.step += 1
            images += self.images_per_step
            data_time += waited
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value
            last = self.step == self.steps
            checkpoint = last or self.step % train.checkpoint_every == 0
            warned = not last and self._ask and leaving()
            if checkpoint or warned or self.step % train.log_every == 0:
                elapsed = time.perf_counter() - since
                count = images / self.images_per_step
                row: dict[str, Any] = {"step": self.step, "steps": self.steps}
                row |= {name: value / count for name, value in sums.items()}
                if len(self.by_source.names) > 1:
                    row |= self.by_source.row()
                row |= {"learning_rate": rate, "images_per_second": images / elapsed, "data_wait": data_time / elapsed}
                if checkpoint and not warned:
                    row |= self.validate()
                    row |= self._left_out()
                self.log.add(row)
                if not last and self.stalled():
                    best = max(past["hmean"] for past in self.log.rows if "hmean" in past)
                    note = f"stopped at step {self.step}: F has not risen above {best:.3f} for {train.patience} checkpoints"
                    row["notes"] = [*row.get("notes", ()), f"{note} (train.patience)"]
                self.log.flush(checkpoint or warned)
                observe.training(self.log.run, self.rank, row)
                if checkpoint or warned:
                    report({key: value for key, value in row.items() if isinstance(value, int | float)}, self.step)
                since, images, sums, data_time = time.perf_counter(), 0, {}, 0.0
            if warned:
                raise MachineLeaves(f"step {self.step}: a machine of this run will be taken away; saved, and going on without it")

    def stalled(self) -> bool:
        """Whether the last train.patience validations brought no better F than those before; the same on every rank."""
        patience = self.settings.train.patience
        scores = [row["hmean"] for row in self.log.rows if "hmean" in row]
        return 0 < patience < len(scores) and max(scores[-patience:]) <= max(scores[:-patience])

    def _left_out(self) -> dict[str, Any]:
        """How many images data.skip_bad has left out so far on all ranks, with lines about the new ones; {} for none."""
        if not self.settings.data.skip_bad:
            return {}
        if self.workers > 1:
            gathered: list[Any] = [None] * self.workers
            torch.distributed.all_gather_object(gathered, list(self.skipped))
            self.skipped |= dict.fromkeys(reason for part in gathered for reason in part)
        if not self.skipped:
            return {}
        row: dict[str, Any] = {"skipped_images": len(self.skipped)}
        new = list(self.skipped)[self._told : _SHOWN]
        if len(self.skipped) > self._told:
            row["notes"] = [f"left out: {reason}" for reason in new] + [f"left out so far: {len(self.skipped)} images"]
        self._told = len(self.skipped)
        return row

    def _batches(self) -> Iterator[list[TrainingImage]]:
        return training_batches(
            self.mixture,
            self.settings.data,
            steps=range(self.step, self.steps),
            batch=self.settings.train.batch,
            shares=self.shares,
            of=self.settings.cluster.workers,
            seed=self.settings.train.seed,
            workers=self.workers,
        )

    def _ready_batches(self) -> Iterator[tuple[list[TrainingImage], list[Pair]]]:
        """Batches with their tensors; for a GPU, a thread prepares the next batch in pinned memory while the GPU computes."""
        gpu = self.device.type == "cuda"

        def ready(samples: list[TrainingImage]) -> tuple[list[TrainingImage], list[Pair]]:
            return samples, [to_target(sample) for sample in samples]

        def pinned(samples: list[TrainingImage]) -> tuple[list[TrainingImage], list[Pair]]:
            return samples, [(image.pin_memory(), target) for image, target in ready(samples)[1]]

        return _one_ahead(map(pinned, self._batches())) if gpu else map(ready, self._batches())

    def _train_step(self, batches: Iterator[tuple[list[TrainingImage], list[Pair]]]) -> tuple[dict[str, float], float, float]:
        """One step over this worker's shares: mean losses, learning rate, seconds spent waiting for data.

        TrainingStopped, on every rank, for what is wrong on any of them before gradients are exchanged; UserError for memory
        that ran out while they were, or afterwards.
        """
        train = self.settings.train
        rate = learning_rate(self.step, self.steps, self.images_per_step, train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        bad: list[str] = []
        waited = 0.0
        for share in self.shares:
            waiting = time.perf_counter()
            try:
                samples, pairs = next(batches) if not bad else ([], [_stand_in()])
            except UserError as error:
                bad.append(str(error))
                samples, pairs = [], [_stand_in()]
            waited += time.perf_counter() - waiting
            self.skipped |= dict.fromkeys(sample.problem for sample in samples if sample.problem)
            last = share == self.shares[-1]
            with nullcontext() if last else self._without_exchange():
                stacked, numbers = self._forward(share, samples, pairs, bad)
                if last:
                    self._agree(bad)
                if stacked is not None and not bad:
                    self._backward(stacked, pairs)
            for name, value in numbers.items():
                sums[name] = sums.get(name, 0.0) + value / len(self.shares)
        self._update(pairs)
        return {"loss": sum(sums.values())} | sums, rate, waited

    def _forward(
        self, share: int, samples: list[TrainingImage], pairs: list[Pair], bad: list[str]
    ) -> tuple[torch.Tensor | None, dict[str, float]]:
        """The losses of one share, as one tensor and as numbers; what is wrong with them goes into `bad`."""
        try:
            losses = self._losses(share, pairs)
            stacked = torch.stack(list(losses.values()))
            of_images = self.model.image_losses if self.model.keep_image_losses else None
            # One transfer for all numbers: reading them one by one would make the CPU wait for the GPU each time.
            flat = stacked.detach() if of_images is None else torch.cat([stacked.detach(), of_images])
            values = flat.tolist()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            # Text alone: the error holds the whole failed pass in memory.
            bad.append(self._too_large(pairs))
            return None, {}
        numbers = dict(zip(losses, values, strict=False))
        if samples and of_images is not None:
            self.by_source.add(samples, values[len(numbers) :])
        problems = _not_finite(numbers, samples)
        bad += [f"step {self.step + 1}: {problem}; lower train.learning_rate or check them" for problem in problems]
        return stacked, numbers

    def _backward(self, losses: torch.Tensor, pairs: list[Pair]) -> None:
        # The workers exchange the mean of their gradients; the mean over the shares is wanted.
        with self._memory(pairs):
            (losses.sum() * (self.workers / self.settings.cluster.workers)).backward()

    def _update(self, pairs: list[Pair]) -> None:
        """Apply the gradients. The optimiser takes its own memory, for AdamW twice the weights, at the first step only."""
        with self._memory(pairs):
            if self.settings.train.gradient_clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.train.gradient_clip)
            self.optimizer.step()
            if self.average is not None:
                self.average.update()

    @contextmanager
    def _memory(self, pairs: list[Pair]) -> Iterator[None]:
        """UserError with step, sizes and remedy in place of memory that runs out inside."""
        try:
            yield
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise UserError(self._too_large(pairs)) from None

    def _too_large(self, pairs: list[Pair]) -> str:
        """A line for the user about the images that the memory of this worker did not hold."""
        sizes = ", ".join(
            f"{image.shape[2]} x {image.shape[1]} with {len(target['labels'])} instances" for image, target in pairs
        )
        return (
            f"step {self.step + 1}: out of memory ({_where(self.device)}) for a batch of {len(pairs)} images of {sizes}; lower "
            "train.batch, data.transform.crop, short_sides or long_cap, or set model.backbone.checkpointing=true or "
            "train.precision=bfloat16"
        )

    def _without_exchange(self) -> AbstractContextManager[None]:
        """A context in which gradients add up in this worker and are not exchanged."""
        if isinstance(self.parallel, nn.parallel.DistributedDataParallel):
            return self.parallel.no_sync()
        return nullcontext()

    def _losses(self, share: int, pairs: list[Pair]) -> dict[str, torch.Tensor]:
        # Dropout and the samplers draw from torch's generator. Seeding it by step and share makes a resumed run identical.
        torch.manual_seed((self.settings.train.seed * 1_000_003 + self.step) * 4099 + share)
        images = [image.to(self.device, non_blocking=True) for image, _ in pairs]
        # Read here, where the targets are on the CPU: DistributedDataParallel would move them to the GPU first, and checking
        # and sorting them there makes the CPU wait several times an image.
        truths = read_truths([target for _, target in pairs], self.device)
        with autocast(self.settings.train.precision, self.device, training=True):
            return self.parallel(images, truths)

    def _agree(self, bad: list[str]) -> None:
        """TrainingStopped, on every rank, when any has something `bad`; else all know whether it is time to ask for notices."""
        stop, ask = bool(bad), self.rank == 0 and time.monotonic() - self._asked >= _ASK_EVERY
        if self.workers > 1:
            # All ranks must stop together, or the others would wait in the gradient exchange; and ask together.
            flags = to_device(torch.tensor([float(stop), float(ask)]), self.device)
            torch.distributed.all_reduce(flags)
            stop, ask = (flag > 0 for flag in flags.tolist())
        self._ask = ask
        if ask:
            self._asked = time.monotonic()
        if stop:
            self._stop_all(bad[0] if bad else None)

    def _stop_all(self, message: str | None) -> NoReturn:
        """TrainingStopped with the first message of any rank; called on every rank."""
        if self.workers > 1:
            messages: list[str | None] = [None] * self.workers
            torch.distributed.all_gather_object(messages, message)
            message = next(text for text in messages if text)
        raise TrainingStopped(message)

    def _share_statistics(self) -> None:
        """Copy the normalisation statistics of rank 0 to every rank, so that all validate the network that is saved."""
        if self.workers > 1:
            for buffer in self._best_model().buffers():
                torch.distributed.broadcast(buffer, src=0)

    def _detect(self, records: Sequence[ImageRecord], root: str) -> Iterator[tuple[ImageRecord, Detections]]:
        """Detections of the validation images; with data.skip_bad unusable ones are left out, from the first time on."""
        if self.settings.data.skip_bad and not self._validation_checked:
            usable = []
            for record in records:
                try:
                    image = decode_image(storage.join(root, record.file_name), upright=self.settings.data.upright)
                    check_size(record.file_name, image.shape[:2], (record.height, record.width))
                    usable.append(record)
                except ImageError as error:
                    self.skipped[str(error)] = None
            records = usable
            self.validation, self._validation_checked = (records, root), True
        return Predictor(self._best_model(), self.settings).detect_records(records, root)

    def validate(self) -> dict[str, float]:
        """Score the network on the validation set.

        Returns:
            hmean, recall and precision at the best threshold, that threshold, and hmean_large, over the whole set, on every
            rank; {} without a validation set.

        Raises:
            TrainingStopped: an image cannot be used, or memory ran out; on every rank.
        """
        if self.validation is None:
            return {}
        self._share_statistics()
        found: list[EvalImage] = []
        fault = None
        try:
            for record, detections in self._detect(*self.validation):
                check_size(record.file_name, (detections.height, detections.width), (record.height, record.width))
                truths, ignore = [i.polygon for i in record.instances], np.array([i.ignore for i in record.instances], bool)
                found.append(EvalImage(str(record.id), truths, ignore, detections.polygons, detections.scores))
        except UserError as error:
            fault = str(error)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            fault = (
                f"step {self.step}: out of memory ({_where(self.device)}) in validation, at test size "
                f"{self.settings.data.test_short_side}/{self.settings.data.test_long_side}; lower data.test_short_side and "
                "test_long_side, or set data.tile"
            )
        self.parallel.train()
        evaluate = self.settings.evaluate
        rules = iou_rules(evaluate.iou, evaluate.matching)
        every, large = DetectionMetric(rules), DetectionMetric(rules)
        every.update(found)
        large.update([replace(i, ignore=mark_small(i.truths, i.ignore, evaluate.small_side)) for i in found])
        if self.workers > 1:
            # Measured polygons are exchanged, because measuring takes most of the time.
            gathered: list[Any] = [None] * self.workers
            torch.distributed.all_gather_object(gathered, (every, large, fault))
            every, large = DetectionMetric(rules), DetectionMetric(rules)
            for part, part_large, _ in gathered:
                every.merge(part)
                large.merge(part_large)
            fault = next((text for *_, text in gathered if text), None)
        if fault:
            raise TrainingStopped(fault)
        best, best_large = every.summary(evaluate.score_threshold), large.summary(evaluate.score_threshold)
        return {
            "hmean": best.hmean,
            "recall": best.recall,
            "precision": best.precision,
            "threshold": best.threshold or 0.0,
            "hmean_large": best_large.hmean,
        }
