"""The engine of this environment, asked what a server would ask it; for ``sglang-ext doctor``."""

import argparse
import contextlib
import importlib.metadata
import io
from collections.abc import Iterator, Sequence
from typing import Any

from sglang_ext.adapter import engine_contract
from sglang_ext.config import BACKEND, TOGGLE
from sglang_ext.errors import StartupError

PLUGINS = "sglang.srt.plugins"
"""Group of entry points."""


class InstalledEngine:
    """Engine (see ``doctor.installation``). Nothing is imported before it is asked for."""

    def version_problem(self) -> str | None:
        """Why its version does not fit, or None."""
        try:
            return engine_contract.version_problem()
        except ImportError as error:
            return f"sglang {engine_contract.ENGINE_VERSION} is needed and not there: {error}"

    def plugins(self) -> dict[str, str | None]:
        """Entry points of plugins by name: why one cannot be loaded, or None."""
        found: dict[str, str | None] = {}
        for point in importlib.metadata.entry_points(group=PLUGINS):
            try:
                point.load()
            except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a plugin raises
                found[point.name] = repr(error)
            else:
                found[point.name] = None
        return found

    def hooks_problem(self) -> str | None:
        """Load the plugins as a server does: why a hook did not take effect, or None."""
        from sglang.srt.plugins import load_plugins

        from sglang_ext.adapter import setup

        try:
            load_plugins()
            setup.verify_hooks()
        except StartupError as error:
            return str(error)
        return None

    def signatures_problem(self) -> str | None:
        """Where its functions differ from what we call, or None."""
        return engine_contract.problem()

    def shown_patches(self) -> list[str]:
        """Names of the patches that it shows when it runs."""
        from sglang_ext.adapter import engine_patches

        return engine_patches.applied()

    def device(self) -> str:
        """``cuda`` or ``cpu``: where it would run."""
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def line_problems(self, words: Sequence[str], *, selected: bool) -> list[str]:
        """What of a launch line is not understood or not supported, as far as the line says it:
        what the engine makes of it when it starts is checked then.

        Args:
            selected: whether the environment selects the cache.
        """
        from sglang.srt.server_args import ServerArgs

        from sglang_ext.adapter.options import refused
        from sglang_ext.adapter.setup import lay_out_by_pages, select

        parser = argparse.ArgumentParser(prog="launch line")
        ServerArgs.add_cli_args(parser)
        try:
            with _errors() as said:
                options: Any = ServerArgs.from_cli_args(parser.parse_args(list(words)))
        except SystemExit:
            return [said.getvalue().strip().splitlines()[-1]]
        if selected:
            select(options)
        if options.radix_cache_backend != BACKEND:
            return [
                f"it does not select this cache: {TOGGLE}=1 or --radix-cache-backend {BACKEND} "
                "is missing"
            ]
        lay_out_by_pages(options)
        return refused(options)

    def storage_settings(self, text: str | None) -> dict[str, Any]:
        """What ``--hicache-storage-backend-extra-config`` says.

        Raises:
            ValueError: it cannot be read.
        """
        from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
            HybridCacheController,
        )

        try:
            settings: dict[str, Any]
            settings, *_ = HybridCacheController.parse_storage_backend_extra_config(text)
        except (ValueError, OSError, AttributeError) as error:
            raise ValueError(str(error)) from error
        return settings


@contextlib.contextmanager
def _errors() -> Iterator[io.StringIO]:
    """What is written to the standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        yield said
