"""The directory of a storage in files."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_ext.doctor.finding import Finding, fault, ok
from sglang_ext.planning.table import size

_SETTING = "--hicache-storage-backend-extra-config file_storage_path"
_VARIABLE = "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"
_DEFAULT = "/tmp/hicache"


def check(settings: Mapping[str, Any], environment: Mapping[str, str]) -> Finding:
    """Whether a server can keep its pages.

    Args:
        settings: of the storage backend.
    """
    source = _VARIABLE if environment.get(_VARIABLE) else _SETTING
    place = Path(environment.get(_VARIABLE) or str(settings.get("file_storage_path") or _DEFAULT))
    folder = place
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return fault(
            "storage",
            f"{place} cannot be written to: {error.strerror}",
            f"name a directory in which this user may write ({source})",
        )
    made = "" if place == folder else ", will be made"
    return ok("storage", f"file, {place}{made}, {size(shutil.disk_usage(folder).free)} free")
