"""Pixels for image classifiers: ready-made arrays, or images that the model's own processor prepares."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.errors import UserError
from regraft.inspect.loading import Loaded, quiet
from regraft.inspect.rows import Row, need


def load_processor(loaded: Loaded) -> Any:
    """The image processor in the model's folder. Raises RG602 if there is none or a package for it is missing."""
    import transformers

    need("PIL", "eval", "preparing images")
    if not (loaded.folder / "preprocessor_config.json").exists():
        what = "the model's folder has no preprocessor_config.json, so images cannot be prepared"
        fix = "save the image processor beside the model, or give a pixel_values column"
        raise UserError("RG602", what, where=str(loaded.folder), fix=fix)
    try:
        with quiet():
            return transformers.AutoImageProcessor.from_pretrained(loaded.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        what = f"the model's image processor cannot be loaded: {str(error).strip().splitlines()[:1]}"
        raise UserError("RG602", what, where=str(loaded.folder), fix="install the package it names") from None


def pixel_values(row: Row, column: str, channels: int) -> Tensor:
    """Ready-made input of one image as float32 (C, H, W); an (H, W) array is taken as one channel.

    Raises:
        UserError: RG601 if the field is no finite array of numbers of that shape.
    """
    array = array_of(row, column)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.shape[0] != channels:
        what = f"{column!r} has shape {array.shape}, and the model takes {channels} channel(s) by height by width"
        raise UserError("RG601", what, where=row.where, fix="give lists of channels, rows and columns")
    if not np.isfinite(array).all():
        raise UserError("RG601", f"{column!r} holds NaN or infinity", where=row.where, fix="mend the data")
    return torch.from_numpy(array)


def stacked(rows: Sequence[Row], column: str, loaded: Loaded) -> Tensor:
    """Ready-made inputs of several images, (B, C, H, W), of as many channels as the model takes.

    Raises:
        UserError: RG601 as `pixel_values`, and for arrays of different sizes.
    """
    channels = int(getattr(getattr(loaded.config, "vision_config", loaded.config), "num_channels", 3))
    values = [pixel_values(row, column, channels) for row in rows]
    for row, value in zip(rows, values, strict=True):
        if value.shape != values[0].shape:
            what = f"the image is {tuple(value.shape)} and others are {tuple(values[0].shape)}"
            raise UserError("RG601", what, where=row.where, fix="give arrays of one shape")
    return torch.stack(values)


def picture(row: Row, column: str, folder: Path) -> Any:
    """An image as `PIL.Image`: from a file name (relative to the data's folder), bytes, nested lists or an image.

    Nested lists are (H, W) or (H, W, 3) with values from 0 to 255.

    Raises:
        UserError: RG601 if there is no such file, or it is no image.
    """
    images = importlib.import_module("PIL.Image")
    value = row.get(column)
    if isinstance(value, images.Image):
        return value.convert("RGB")
    if isinstance(value, str) and not value.lstrip().startswith("["):
        path = (folder / value).resolve()
        if not path.is_relative_to(folder.resolve()):
            what = f"the image {value!r} lies outside the folder of the data"
            raise UserError("RG601", what, where=row.where, fix="keep images beside the data file")
        if not path.is_file():
            raise UserError("RG601", f"there is no image {value!r}", where=row.where, fix="check the file name")
        try:
            with images.open(path) as image:
                return image.convert("RGB")
        except (OSError, ValueError, images.DecompressionBombError) as error:
            raise UserError("RG601", f"{value!r} is no image: {error}", where=row.where, fix="mend the file") from None
    array = array_of(row, column)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or not array.size:
        what = f"{column!r} has shape {array.shape}, not (height, width) or (height, width, 3)"
        raise UserError("RG601", what, where=row.where, fix="mend the data")
    if not ((array >= 0) & (array <= 255)).all():
        what = f"{column!r} has values outside 0 to 255"
        raise UserError("RG601", what, where=row.where, fix="scale the pixels, or call the column pixel_values")
    return images.fromarray(array.round().astype(np.uint8)).convert("RGB")


def array_of(row: Row, column: str) -> Any:
    """A field that holds numbers as a float32 array, also from nested lists in a CSV file; RG601 otherwise."""
    value = row.get(column)
    try:
        if isinstance(value, str):
            value = json.loads(value)  # lists in a CSV file
        return np.asarray(value, dtype=np.float32)
    except (ValueError, TypeError, RecursionError):
        what = f"{column!r} is no array of numbers"
        raise UserError("RG601", what, where=row.where, fix="give nested lists of equal length") from None
