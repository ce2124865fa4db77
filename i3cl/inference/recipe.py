"""What a checkpoint's own recipe says about prediction, and what the user puts in its place.

The keys of `TEST_SIZE` and `TILE` that a recipe or command line gives count for every checkpoint; each one that is not given
comes from the checkpoint's own recipe. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from i3cl import storage
from i3cl.config import Settings, TileSettings, load_settings
from i3cl.data.loading.images import test_scale
from i3cl.errors import UserError
from i3cl.model.shipped import folder_of, not_a_checkpoint

TEST_SIZE = ("data.test_short_side", "data.test_long_side", "data.test_upscale")
"""Settings keys that say how large the network sees an image."""
TILE = "data.tile"
"""Settings key that says whether, and into what, an image is cut."""
Given = Mapping[str, Any]
"""Some of the keys of `TEST_SIZE` and `TILE` -> the values, as JSON has them, that take the place of the checkpoint's own."""
AS_TRAINED: Given = {}
"""Every checkpoint at its own test size and tiles: for models of this run, whose recipes hold all that was given."""


@dataclass(frozen=True)
class TestSize:
    """How an image is scaled for the network."""

    __test__ = False  # the name is the field's, but it is not a test

    short_side: int
    """Pixels; the short side is at most this ..."""
    long_side: int
    """... and the long side at most this; the smaller ratio counts."""
    upscale: bool
    """Whether images that are smaller are enlarged."""

    def scale(self, height: int, width: int, short_side: int | None = None) -> float:
        """Factor for an image of height x width pixels; short_side: of a view, in place of this size's own."""
        return test_scale(height, width, short_side or self.short_side, self.long_side, self.upscale)

    def __str__(self) -> str:
        return f"{self.short_side}/{self.long_side}" + ("" if self.upscale else " without enlarging")


def recipe_of(checkpoint: str) -> Settings:
    """The settings of a checkpoint directory (local or s3://), or of a detector in the package. UserError when it is neither."""
    file = storage.join(folder_of(checkpoint), "settings.yaml")
    if not storage.is_file(file):
        raise not_a_checkpoint(checkpoint)
    with storage.local_copy(file) as path:
        return load_settings(path)


def given_size(settings: Settings) -> Given:
    """The keys of `TEST_SIZE` and `TILE` that the recipe or the command line gives, with their values."""
    keys = [key for key in (*TEST_SIZE, TILE) if key.removeprefix("data.") in settings.data.model_fields_set]
    return {key: _own(settings, key) for key in keys}


def _own(recipe: Settings, key: str) -> Any:
    """What a recipe says for a key, as JSON has it; an overlap of tiles in pixels, so that equal tiles are equal."""
    value = getattr(recipe.data, key.removeprefix("data."))
    return {"side": value.side, "overlap": value.overlap_pixels} if isinstance(value, TileSettings) else value


def tiles(recipe: Settings, given: Given = AS_TRAINED) -> TileSettings | None:
    """The tiles in which a checkpoint of this recipe sees large images; None: it sees every image as a whole."""
    value = given.get(TILE) if TILE in given else _own(recipe, TILE)
    return None if value is None else TileSettings.model_validate(value)


def describe_tiles(tile: TileSettings | None) -> str:
    """'tiles of 1024 px that share 256', or 'no tiles'."""
    return "no tiles" if tile is None else f"tiles of {tile.side} px that share {tile.overlap_pixels}"


def test_size(recipe: Settings, given: Given = AS_TRAINED) -> TestSize:
    """The size at which a checkpoint of this recipe sees images."""
    return TestSize(*(given.get(key, getattr(recipe.data, key.removeprefix("data."))) for key in TEST_SIZE))


test_size.__test__ = False  # type: ignore[attr-defined]


def effective(recipes: Mapping[str, Settings], given: Given) -> Given:
    """Those of `given` that differ from what at least one of the recipes says."""
    return {key: value for key, value in given.items() if any(_own(recipe, key) != value for recipe in recipes.values())}


def chosen_exif(recipes: Mapping[str, Settings], settings: Settings) -> Literal["stored", "upright"]:
    """data.exif of the recipe or the command line where it gives it, else of the checkpoints' own recipes.

    UserError when it is not given and the checkpoints were trained in different frames.
    """
    if "exif" in settings.data.model_fields_set or not recipes:
        return settings.data.exif
    frames = {name: recipe.data.exif for name, recipe in recipes.items()}
    if len(set(frames.values())) > 1:
        each = ", ".join(f"{name} {frame}" for name, frame in frames.items())
        raise UserError(
            f"data.exif: the checkpoints were trained with different values ({each}); give data.exif=stored or upright"
        )
    return next(iter(frames.values()))


def describe_sizes(recipes: Mapping[str, Settings], given: Given) -> str:
    """One line for people: the test size and the tiles of every member and where they come from.

    'test size 640/1024 from the checkpoint', 'test size a 320/1024, b 320/1333 (data.test_short_side as given, the rest from the
    checkpoints); tiles of 1024 px that share 256 (data.tile as given)'. Tiles are left out where nobody asks for any.
    """
    source = "the checkpoint" if len(recipes) == 1 else "the checkpoints"
    text = f"test size {_by_member({name: str(test_size(recipe, given)) for name, recipe in recipes.items()})}"
    keys = [key for key in given if key in TEST_SIZE]
    rest = "" if len(keys) == len(TEST_SIZE) else f", the rest from {source}"
    text += f" ({', '.join(keys)} as given{rest})" if keys else f" from {source}"
    if given.get(TILE) is None and all(recipe.data.tile is None for recipe in recipes.values()):
        return text
    text += f"; {_by_member({name: describe_tiles(tiles(recipe, given)) for name, recipe in recipes.items()})}"
    return text + (f" ({TILE} as given)" if TILE in given else f" from {source}")


def _by_member(texts: Mapping[str, str]) -> str:
    """What holds for every member, said once where it is the same for all."""
    same = len(set(texts.values())) == 1
    return next(iter(texts.values())) if same else ", ".join(f"{name} {text}" for name, text in texts.items())
