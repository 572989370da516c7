"""Entry points of the distribution."""

from sglang_ext.errors import StartupError


def register() -> None:
    """``sglang.srt.plugins`` entry point, run in every process of the engine.

    Raises:
        StartupError: the extension is selected and does not fit this engine.
    """
    try:
        from sglang_ext.adapter import setup

        setup.install()
    except Exception as error:
        raise StartupError(f"cannot load the plugin: {error!r}") from error
