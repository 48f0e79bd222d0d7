"""Choose the model and level for an encoding or a decoding, and keep them loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from ..bitstream import FormatError, SgaFile
from ..settings import Settings
from .catalogue import ModelNotFoundError, builtin_models, find_model, read_by_id
from .file import read_model
from .level import LevelModel, Model
from .recent import RecentlyUsed

_PREFERRED = {"cuda": ("mshyper-192", "mshyper-128", "lite"), "cpu": ("lite", "mshyper-128", "mshyper-192")}
_FOR_REFINED = "-refined"  # lite-refined, whose decoder suits refined latents, takes the place of lite for them


class LevelCache:
    """Levels of models on one device. All models that were read stay loaded, and the levels that were used last.

    Parameters
    ----------
    model : str, optional
        Name or path of the only model to use. None (or "auto"): when encoding the best built-in one for the device, λ
        and method, when decoding the one that the file names.
    device : torch.device

    Raises
    ------
    ModelNotFoundError, ModelError
        When the named model does not exist or is damaged.
    """

    def __init__(self, model: str | None, device: torch.device) -> None:
        self.device = device
        self._models: dict[Path, Model] = {}
        self._levels: RecentlyUsed[LevelModel] = RecentlyUsed()
        self._named = None if model in (None, "auto") else self._read(find_model(str(model)))

    def for_encoding(self, settings: Settings) -> LevelModel:
        """The level to encode with: that of `model_for` which is nearest to `settings.coding_lambda`.

        Raises
        ------
        ModelNotFoundError, ModelError
        """
        model = self.model_for(settings)
        return self._open(model, model.level_for(settings.coding_lambda))

    def model_for(self, settings: Settings) -> Model:
        """The model to encode with.

        Raises
        ------
        ModelNotFoundError, ModelError
        """
        return self._named or self._best(settings.lmbda, settings.refines)

    def for_decoding(self, file: SgaFile) -> LevelModel:
        """The level that a file was encoded with.

        Raises
        ------
        ModelNotFoundError, ModelError
        FormatError
            When the model has no such level.
        """
        wanted = file.model_id.hex()
        if self._named is None:
            model = read_by_id(file.model_id, self._read)
        elif self._named.id == wanted:
            model = self._named
        else:
            raise ModelNotFoundError(
                f"the file needs the model with id {wanted}, but {self._named.name} has id {self._named.id}"
            )
        if file.level >= len(model.gains):
            raise FormatError(f"damaged: level {file.level} of a model with {len(model.gains)} levels")
        return self._open(model, file.level)

    def _best(self, lmbda: float, refined: bool) -> Model:
        known = {info.name: info for info in builtin_models()}
        preferred = _PREFERRED[self.device.type if self.device.type in _PREFERRED else "cpu"]
        suitable = [n for n in preferred if n in known and lmbda >= 0.9 * min(known[n].metadata["anchors"])]
        suitable += [name for name in _PREFERRED["cpu"] if name in known]  # λ below the anchors of all
        if not suitable:
            raise ModelNotFoundError("no built-in model is installed; name one with --model")
        chosen = known[suitable[0]]
        return self._read((known.get(chosen.name + _FOR_REFINED, chosen) if refined else chosen).path)

    def _read(self, path: Path) -> Model:
        if path not in self._models:
            self._models[path] = read_model(path)
        return self._models[path]

    def _open(self, model: Model, level: int) -> LevelModel:
        return self._levels.get((model.id, level), lambda: model.at(level, self.device))
