"""The catalog that a gateway serves: read at its start, and again whenever it is told so."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from app.settings import GatewaySettings
from broker.settings import SettingsError
from models.catalog import CatalogError, ModelSpec, UnknownModelError, get_spec, load_catalog

log = logging.getLogger(__name__)


class ServedCatalog(Mapping[str, ModelSpec]):
    """The entries by name. `reload` swaps them all at once; a spec that somebody holds stays as it is.

    `version` counts the readings. Raises SettingsError or CatalogError where the first one fails.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._models = read_catalog(settings)
        self.version = 1

    def reload(self) -> None:
        """Reads the files again. What can't be served changes nothing, and is logged in one line."""
        try:
            models = read_catalog(self._settings)
        except (SettingsError, CatalogError) as error:
            log.error("the catalog stays as it was: %s", error)
            return
        changed = [name for name in self._models.keys() | models if self._models.get(name) != models.get(name)]
        log.info("the catalog was read again, changed: %s", ", ".join(sorted(changed)) or "nothing")
        self._models, self.version = models, self.version + 1

    def __getitem__(self, name: str) -> ModelSpec:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)


def read_catalog(settings: GatewaySettings) -> dict[str, ModelSpec]:
    """Raises CatalogError, or SettingsError where the default model isn't in it."""
    catalog = load_catalog(settings.catalog, settings.extra_catalog)
    try:
        get_spec(catalog, settings.default_model)
    except UnknownModelError as error:
        raise SettingsError(f"FEWSTEP_DEFAULT_MODEL={settings.default_model!r}: {error}") from error
    return catalog
